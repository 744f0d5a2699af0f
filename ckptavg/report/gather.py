"""What there is to tell: the models in an output, and what was measured of them."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckptavg import evidence_files, provenance
from ckptavg.checkpoint.folder import PROVENANCE_NAME, read_local_json
from ckptavg.errors import CheckpointError, ReportError

SEARCHES = {"sweep": "rows", "soup": "steps", "tune": "trials"}  # what their files hold
MEASUREMENTS = ("trajectory", "plane", "width", "path", "ensemble")  # in the order to read


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model that ckptavg wrote.

    Attributes:
        path: Its directory.
        name: What the page calls it.
        told: Its provenance.
    """

    path: Path
    name: str
    told: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """A file of figures that a search or a measurement left.

    Attributes:
        path: The JSON file.
        kind: Which command made it.
        told: Its content.
    """

    path: Path
    kind: str
    told: Mapping[str, Any]


def find_models(output: Path) -> list[Model]:
    """Return the model that a directory is, or those in it.

    Raises:
        ReportError: If there is none, or its provenance cannot be read.
    """
    if not output.exists():
        raise ReportError(f"{output}: is not there")
    if not output.is_dir():
        raise ReportError(f"{output}: is not a directory; a report is about a model directory")
    own = _provenance(output)
    if own is not None:
        return [Model(path=output, name=_name(output), told=own)]
    found = [(folder, _provenance(folder)) for folder in _folders(output)]
    models = [
        Model(path=folder, name=folder.name, told=told)
        for folder, told in found
        if told is not None
    ]
    if not models:
        raise ReportError(
            f"{output}: holds no {PROVENANCE_NAME}, neither itself nor in a directory in it: "
            "a report is about what ckptavg wrote"
        )
    return models


def find_evidence(
    output: Path, models: Sequence[Model], given: Iterable[str | Path]
) -> list[Evidence]:
    """Return what was measured, each file once, in the order to read.

    It is looked for in the output and in the directories in it, then where it is said to be.

    Raises:
        ReportError: If one cannot be read, or there is none where it is said to be.
    """
    found = [*_own_searches(models, output), *_in_directory(output, MEASUREMENTS)]
    for place in map(Path, given):
        kinds = (*SEARCHES, *MEASUREMENTS)
        if place.is_dir():
            there = list(_in_directory(place, kinds))
        elif place.exists():
            one = _evidence(place, kinds)
            there = [] if one is None else [one]
        else:
            raise ReportError(f"{place}: is not there")
        if not there:
            raise ReportError(
                f"{place}: holds no evidence: nothing that sweep, soup, tune, "
                f"{', '.join(MEASUREMENTS[:-1])} or {MEASUREMENTS[-1]} writes as JSON"
            )
        found += there
    once = {os.path.realpath(one.path): one for one in reversed(found)}
    order = (*SEARCHES, *MEASUREMENTS)
    unique = [one for one in found if once[os.path.realpath(one.path)] is one]
    return sorted(unique, key=lambda one: order.index(one.kind))


def _own_searches(models: Sequence[Model], output: Path) -> Iterator[Evidence]:
    """Yield what searches left in an output; a file that came along with a checkpoint is none."""
    copied = {
        model.path / name
        for model in models
        for name in _names(model.told, "side_files") - _names(model.told, "evidence")
    }
    for folder in dict.fromkeys((output, *(model.path for model in models))):
        for kind in SEARCHES:
            path = folder / f"{kind}.json"
            if path.is_file() and path not in copied:
                found = _evidence(path, SEARCHES)
                if found is not None:
                    yield found


def _names(told: Mapping[str, Any], key: str) -> set[str]:
    made = told.get("output")
    names = made.get(key) if isinstance(made, Mapping) else None
    return set(filter(_is_text, names)) if isinstance(names, list) else set()


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _in_directory(place: Path, kinds: Iterable[str]) -> Iterator[Evidence]:
    """Yield the evidence in a directory, and in those in it."""
    for folder in (place, *_folders(place)):
        for path in sorted(_listed(folder)):
            if path.suffix == ".json" and path.name.startswith(tuple(kinds)) and path.is_file():
                found = _evidence(path, kinds)
                if found is not None:
                    yield found


def _folders(place: Path) -> list[Path]:
    return sorted(path for path in _listed(place) if path.is_dir())


def _listed(place: Path) -> list[Path]:
    try:
        return list(place.iterdir())
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ReportError(f"{place}: cannot be listed: {reason}") from error


def _evidence(path: Path, kinds: Iterable[str]) -> Evidence | None:
    """Read a file; None if it is something else."""
    told = _read(path) or {}
    kind = told.get("kind") if "kind" in told else SEARCHES.get(path.stem) and path.stem
    if kind not in tuple(kinds) or "format_version" not in told:
        return None
    _check_version(path, told, evidence_files.FORMAT_VERSION)
    return Evidence(path=path, kind=str(kind), told=told)


def _provenance(folder: Path) -> Mapping[str, Any] | None:
    path = folder / PROVENANCE_NAME
    told = _read(path)
    if told is not None:
        _check_version(path, told, provenance.FORMAT_VERSION)
    return told


def _check_version(path: Path, told: Mapping[str, Any], version: int) -> None:
    found = told.get("format_version")
    if found != version:
        raise ReportError(
            f"{path}: is of format version {str(found)[:20]}, expected {version}: another version "
            "of ckptavg wrote it"
        )


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return read_local_json(path)
    except CheckpointError as error:
        raise ReportError(str(error)) from error


def _name(output: Path) -> str:
    return Path(os.path.realpath(output)).name or str(output)
