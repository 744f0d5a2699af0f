"""Whether an output is still what its provenance says: its files, its sources, its bits."""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from ckptavg._version import __version__
from ckptavg.average.work import usable_cpus
from ckptavg.checkpoint.digests import SHA256
from ckptavg.checkpoint.files import PositionalFile
from ckptavg.checkpoint.folder import PROVENANCE_NAME, WEIGHT_SUFFIXES, read_local_json
from ckptavg.checkpoint.formats import open_file
from ckptavg.directories import files_below
from ckptavg.errors import (
    CheckpointError,
    HubError,
    SourceError,
    UsageError,
    VerificationError,
    told_storage_errors,
)
from ckptavg.evidence_names import is_report
from ckptavg.hashing import hash_file
from ckptavg.hub import parse_reference
from ckptavg.hub.threads import in_parallel
from ckptavg.provenance import has_own_hash
from ckptavg.recipe_file import RecipeTable
from ckptavg.rerun import ReproducedFile, named_code, run_again
from ckptavg.sources import HubAccess
from ckptavg.tensors import HubRevision

FileState = Literal["as written", "changed", "missing"]
SourceState = Literal["unchanged", "changed", "missing", "not checked"]


_REWRITTEN = "was written again since it was read"


@dataclass(frozen=True, kw_only=True)
class VerifiedFile:
    """A file that an output consists of; ``reason`` says what is wrong, None if nothing is."""

    name: str
    nbytes: int
    state: FileState
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class VerifiedSource:
    """A checkpoint that went into an output; ``reason`` says what is wrong, None if nothing is."""

    source: str
    state: SourceState
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class VerifyResult:
    """What was found out about an output.

    Attributes:
        output: Its directory.
        files: What its provenance lists.
        unlisted: Names of files in it that the provenance does not list, but for reports.
        sources: The checkpoints that went in.
        reproduced: The files, compared with those that were made again; None if none were.
        problems: What is not as recorded, one line each; none if all is well.
        notes: What else the user should know.
    """

    output: Path
    files: tuple[VerifiedFile, ...]
    unlisted: tuple[str, ...]
    sources: tuple[VerifiedSource, ...]
    reproduced: tuple[ReproducedFile, ...] | None
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether all is as recorded."""
        return not self.problems


@told_storage_errors()
def verify_output(
    output: str | Path,
    *,
    reproduce: bool = False,
    trust_code: bool = False,
    device: str | None = None,
    shows_progress: bool = False,
) -> VerifyResult:
    """Compare a model directory with what its ``ckptavg.json`` says of it.

    Every listed file must have its size and SHA-256, the weights' headers must tell the same
    scheme, ``ckptavg.json`` must have the hash that it tells of itself, and the checkpoints that
    went in must be as they were: the SHA-256 of local files where it was recorded
    (``--checksum``), else their size and modification time; the hashes of a commit on the Hub.
    Sources that are gone are told, but the output is whole without them. Nothing is changed, and
    no code is run unless it is trusted.

    Args:
        output: A model directory that ckptavg wrote.
        reproduce: Make it again, in a process of its own and a directory beside it that is removed
            afterwards, and compare byte for byte.
        trust_code: Import and call the model and data that the provenance names, which
            ``reproduce`` needs where a BatchNorm pass was made.
        device: Where it is made again; None is where it was made if bits depend on that.
        shows_progress: Let that process show its progress on stderr.

    Raises:
        VerificationError: If there is no provenance to compare with, or it makes no sense.
        UsageError: If ``reproduce`` would run code, and that is not trusted.
        OutputError: If the recipe fails, or cannot be run beside the output.
    """
    output = Path(output)
    told = _provenance(output)
    try:
        return _verified(
            output,
            told,
            reproduce=reproduce,
            trust_code=trust_code,
            device=device,
            shows_progress=shows_progress,
        )
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise VerificationError(
            f"{output}: its {PROVENANCE_NAME} makes no sense: it was changed by hand, or is of "
            "another version"
        ) from error


def _provenance(output: Path) -> dict[str, Any]:
    try:
        told = read_local_json(output / PROVENANCE_NAME)
    except CheckpointError as error:
        raise VerificationError(str(error)) from error
    if told is None:
        inside = sorted(path.parent.name for path in output.glob(f"*/{PROVENANCE_NAME}"))
        raise VerificationError(
            f"{output}: is not there"
            if not output.exists()
            else f"{output}: holds {len(inside)} models: verify them, such as {output / inside[0]}"
            if inside
            else f"{output}: holds no {PROVENANCE_NAME}, which says what to compare with"
        )
    if not isinstance(told.get("output"), dict) or "files" not in told["output"]:
        raise VerificationError(
            f"{output}: was written by ckptavg {told.get('ckptavg_version')}, which recorded no "
            "hashes: it cannot be verified"
        )
    return told


def _verified(
    output: Path,
    told: Mapping[str, Any],
    *,
    reproduce: bool,
    trust_code: bool,
    device: str | None,
    shows_progress: bool,
) -> VerifyResult:
    listed = told["output"]["files"]
    recipe: RecipeTable = told["reproduce"]
    base = Path(os.path.normpath(Path(os.path.realpath(output), recipe["directory"])))
    code = named_code(recipe)
    if reproduce and code and not trust_code:
        raise UsageError(
            f"{output}: making it again would run {', '.join(code)}, found from {base}; pass "
            "--trust-code if that code is yours"
        )
    for one in listed:
        _refuse_other_places(one["name"])
    files = in_parallel(lambda one: _verified_file(output, one), listed, usable_cpus())
    sources = _verified_sources(told["checkpoints"], base)
    problems = [f"{one.name} {one.reason}" for one in files if one.state != "as written"]
    whole = {one.name for one in files if one.state == "as written"}
    problems += _contradictions(output, told, whole)
    problems += _self_contradictions(output, told)
    notes = [
        f"the source {one.source} {one.reason}"
        for one in sources
        if one.state in ("missing", "not checked")
    ]
    names = {one["name"] for one in listed}
    unlisted = _unlisted(output, names)
    made = {*told["output"]["shards"], *told["output"]["side_files"]}
    problems += [
        f"{name} is not vouched for: {PROVENANCE_NAME} lists no hash of it"
        for name in sorted(
            made - names | {one for one in unlisted if one.endswith(WEIGHT_SUFFIXES)}
        )
    ]
    if unlisted:
        notes.append(f"not written by ckptavg: {', '.join(unlisted)}")
    notes += _other_versions(told)
    reproduced = None
    if reproduce:
        obstacles = _obstacles(recipe, sources, base)
        problems += [f"it was not made again: {one}" for one in obstacles]
        if not obstacles:
            reproduced = run_again(
                recipe,
                output,
                [one["name"] for one in listed if one["name"] not in told["output"]["evidence"]],
                directory=base,
                device=device,
                shows_progress=shows_progress,
            )
            problems += [
                f"{one.name} came out otherwise: {difference_text(one)}"
                for one in reproduced
                if not one.is_identical
            ]
            if code and problems and "seed" not in recipe["model"]:
                notes.append("data that is shuffled without --seed differs from run to run")
    # of the same size, it may be a copy: bits decide
    is_same = reproduced is not None and all(one.is_identical for one in reproduced)
    for one in sources:
        if one.state == "changed":
            told_of = notes if is_same and one.reason == _REWRITTEN else problems
            told_of.append(f"the source {one.source} {one.reason}")
    return VerifyResult(
        output=output,
        files=tuple(files),
        unlisted=unlisted,
        sources=sources,
        reproduced=reproduced,
        problems=tuple(problems),
        notes=tuple(notes),
    )


def difference_text(file: ReproducedFile) -> str:
    """Say in what a file differs from the one that was made again."""
    if not file.differing:
        return file.reason or "it is identical"
    first, *others = file.differing
    more = f", and {len(others)} more tensors" if others else ""
    return f"'{first.name}' in {first.n_differing} of {first.numel} elements{more}"


# ---- files


def _refuse_other_places(name: str) -> None:
    """Raise ValueError for a name that leads out of the output: the list may be foreign."""
    parts = PurePosixPath(name).parts
    if not parts or PurePosixPath(name).is_absolute() or ".." in parts or "\0" in name:
        raise ValueError(name)


def _verified_file(output: Path, told: Mapping[str, Any]) -> VerifiedFile:
    name, nbytes = str(told["name"]), int(told["nbytes"])
    state: FileState = "as written"
    reason = None
    path = output / name
    try:
        found = path.stat().st_size
        if found != nbytes:
            state, reason = "changed", f"has {found} bytes, not the {nbytes} that were written"
        elif hash_file(path).sha256 != told["sha256"]:
            state, reason = "changed", f"has other content in its {nbytes} bytes"
    except FileNotFoundError:
        state, reason = "missing", "is missing"
    except OSError as error:
        state, reason = "changed", f"cannot be read: {(error.strerror or str(error)).lower()}"
    return VerifiedFile(name=name, nbytes=nbytes, state=state, reason=reason)


def _unlisted(output: Path, listed: set[str]) -> tuple[str, ...]:
    found = {
        path.relative_to(output).as_posix() for path in files_below(output) if not is_report(path)
    }
    return tuple(sorted(found - listed - {PROVENANCE_NAME}))


def _contradictions(output: Path, told: Mapping[str, Any], whole: Collection[str]) -> list[str]:
    """Say where the weights' headers tell otherwise than the provenance, which lists itself not."""
    if told["output"]["format"] != "safetensors":
        return []
    steps = [one["step"] for one in told["checkpoints"]]
    expected = {
        "ckptavg_version": str(told["ckptavg_version"]),
        "ckptavg_scheme": str(told["scheme"]),
        "ckptavg_checkpoints": str(len(steps)),
    }
    if None not in steps:
        expected["ckptavg_steps"] = ",".join(map(str, steps))
    problems = []
    for name in told["output"]["shards"]:
        if name not in whole:  # it was changed, and that is told
            continue
        opened = open_file(PositionalFile(output / name, name), state_key=None)
        opened.close()
        for key, value in expected.items():
            if (found := opened.metadata.get(key)) != value:
                problems.append(
                    f"{PROVENANCE_NAME} says {key.removeprefix('ckptavg_')} {value}, "
                    f"the header of {name} {found}"
                )
    return problems[:1]


def _self_contradictions(output: Path, told: Mapping[str, Any]) -> list[str]:
    """Say whether any byte of the provenance differs from what was written."""
    is_right = has_own_hash((output / PROVENANCE_NAME).read_bytes())
    if is_right is None and told["ckptavg_version"] != __version__:  # which may not have told one
        return []
    if is_right is None:
        return [f"{PROVENANCE_NAME} was changed: it tells no hash of itself"]
    return [] if is_right else [f"{PROVENANCE_NAME} was changed: its own hash differs"]


def _other_versions(told: Mapping[str, Any]) -> list[str]:
    if told["ckptavg_version"] == __version__:
        return []
    return [f"it was written by ckptavg {told['ckptavg_version']}, this is {__version__}"]


# ---- sources


def _verified_sources(
    checkpoints: Sequence[Mapping[str, Any]], base: Path
) -> tuple[VerifiedSource, ...]:
    hub = HubAccess()

    def verified(one: Mapping[str, Any]) -> VerifiedSource:
        if one["hub"]:
            return _verified_on_hub(one, HubRevision(**one["hub"]), hub)
        return _verified_locally(one, base)

    try:
        return tuple(in_parallel(verified, checkpoints, usable_cpus()))
    finally:
        hub.cancel()


def _verified_locally(told: Mapping[str, Any], base: Path) -> VerifiedSource:
    """Compare sizes and times, and the content where a hash of it was recorded."""
    source = str(told["source"])
    state: SourceState = "unchanged"
    reason = None
    for file in told["files"]:
        path = base / file["path"]
        try:
            found = path.stat()
        except OSError as error:
            gone = isinstance(error, FileNotFoundError)
            why = "is not there any more" if gone else f"cannot be seen: {error.strerror}"
            return VerifiedSource(source=source, state="missing", reason=why)
        if found.st_size != file["nbytes"]:
            state = "changed"
            reason = f"has changed: {found.st_size} bytes, {file['nbytes']} when it was read"
        elif str(file["digest"] or "").startswith(f"{SHA256}:"):
            try:
                is_same = f"{SHA256}:{hash_file(path).sha256}" == file["digest"]
            except OSError as error:
                why = f"cannot be read: {(error.strerror or str(error)).lower()}"
                return VerifiedSource(source=source, state="missing", reason=why)
            if not is_same:
                state, reason = (
                    "changed",
                    f"has other content in the {found.st_size} bytes of {path.name}",
                )
        elif found.st_mtime_ns != file["mtime_ns"] and reason is None:
            state, reason = "changed", _REWRITTEN
    return VerifiedSource(source=source, state=state, reason=reason)


def _verified_on_hub(
    told: Mapping[str, Any], revision: HubRevision, hub: HubAccess
) -> VerifiedSource:
    from ckptavg.hub.transport import is_offline

    source = str(told["source"])
    if is_offline():
        return VerifiedSource(
            source=source, state="not checked", reason="was not checked: HF_HUB_OFFLINE is set"
        )
    try:
        for file in told["files"]:
            folder, _, name = _path_on_hub(file["path"], revision).rpartition("/")
            there = hub.connection.list_folder(revision._replace(path=folder)).get(name)
            if there is None:
                why = f"has no {name} on the Hub"
                return VerifiedSource(source=source, state="missing", reason=why)
            if there.size != file["nbytes"] or there.digest != (file["digest"] or there.digest):
                why = f"has another {name} on the Hub"
                return VerifiedSource(source=source, state="changed", reason=why)
    except SourceError as error:
        why = f"is not on the Hub any more: {error}"
        return VerifiedSource(source=source, state="missing", reason=why)
    except HubError as error:
        return VerifiedSource(
            source=source, state="not checked", reason=f"was not checked: {error}"
        )
    return VerifiedSource(source=source, state="unchanged")


def _path_on_hub(recorded: str, revision: HubRevision) -> str:
    """Return the path in the repository of a file that was streamed, or read from the cache."""
    reference = parse_reference(recorded)
    if reference is not None and reference.revision == revision.commit:
        return reference.path
    _, _, inside = recorded.rpartition(f"/snapshots/{revision.commit}/")
    return inside


# ---- reproduction


def _obstacles(
    recipe: Mapping[str, Any], sources: Sequence[VerifiedSource], base: Path
) -> list[str]:
    obstacles = [str(one) for one in recipe["obstacles"]]
    obstacles += [
        f"the source {one.source} {one.reason}"
        for one in sources
        if one.state == "missing" or (one.state == "changed" and one.reason != _REWRITTEN)
    ]
    if not base.is_dir():
        obstacles.append(f"{base}, where it was made, is not there")
    return obstacles


def result_json(result: VerifyResult) -> dict[str, Any]:
    """Return what ``--json`` prints."""
    return {**asdict(result), "ok": result.ok}
