"""The model card: what a model on the Hub says of itself, told by its provenance."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCardData, RepoCard

from ckptavg.errors import printable

_INHERITED = (
    "license", "license_name", "license_link", "language", "datasets", "pipeline_tag",
    "library_name",
)  # fmt: skip
_TAGS = ("merge", "checkpoint-averaging", "ckptavg")
_PAPER = "[Izmailov et al., 2018](https://arxiv.org/abs/1803.05407)"
_MAX_ROWS = 200
_HOW_TO_LOAD = """```python
import torch

model.load_state_dict(torch.load("model.pt", weights_only=True))
```
"""
_MODEL_ID = re.compile(r"[\w-][\w.-]*(?:/[\w-][\w.-]*)?")  # the Hub refuses a card with another


def model_card(
    told: Mapping[str, Any], repo: str, *, has_config: bool, own_text: str | None = None
) -> str:
    """Write the card of a model.

    The front matter follows the Hub's metadata for model cards: the repositories that the
    checkpoints came from are its ``base_model``, with the relation ``merge``.

    Args:
        told: The content of its ``ckptavg.json``.
        repo: ``org/name`` it will have on the Hub.
        has_config: Whether transformers can load it, as a ``config.json`` with a model type says.
        own_text: What its owner adds.
    """
    matter = _front_matter(told, has_config=has_config)
    parts = [
        f"---\n{ModelCardData(**matter).to_yaml()}\n---\n",
        f"# {repo.partition('/')[2]}\n",
        *_body(told),
    ]
    if own_text:
        parts.append(own_text.strip() + "\n")
    return "\n".join(parts)


def _front_matter(told: Mapping[str, Any], *, has_config: bool) -> dict[str, Any]:
    inherited = _parsed(told.get("inherited_card"))
    has_config = has_config and not _is_torch(told)  # transformers reads no model.pt
    matter: dict[str, Any] = {key: inherited[key] for key in _INHERITED if key in inherited}
    if has_config:
        matter.setdefault("library_name", "transformers")
    bases = list(dict.fromkeys(_base_models(told)))
    if bases:
        matter |= {
            "base_model": bases[0] if len(bases) == 1 else bases,
            "base_model_relation": "merge",
        }
    else:  # what the checkpoints themselves were made from
        bases = [one for one in _listed(inherited.get("base_model")) if _MODEL_ID.fullmatch(one)]
        if bases:
            matter["base_model"] = bases[0] if len(bases) == 1 else bases
    tags = dict.fromkeys([*_listed(inherited.get("tags")), *_TAGS])
    return matter | {"tags": list(tags)}


def _listed(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else value or []


def _parsed(text: Any) -> dict[str, str | list[str]]:
    """Read the front matter of the card that came with the checkpoints, if it can be read.

    Only text and lists of text are taken from it: it is foreign, and the Hub wants nothing else
    for what is inherited.
    """
    if not isinstance(text, str):
        return {}
    try:
        data = RepoCard(f"---\n{text}\n---\n").data
        found: dict[str, Any] = data.to_dict()  # type: ignore[no-untyped-call]  # it has no types
    except Exception:  # whatever a foreign card makes of the parser: it inherits nothing
        return {}
    texts: dict[str, str | list[str]] = {}
    for key, value in found.items():
        if isinstance(value, list):
            value = [one for one in value if isinstance(one, str)]
        if value and isinstance(value, (str, list)):
            texts[key] = value
    return texts


def _base_models(told: Mapping[str, Any]) -> Iterator[str]:
    """Yield the repositories that checkpoints came from, also by way of models made of them.

    What such a model tells of itself is foreign: what makes no sense in it is passed over.
    """
    waiting: list[Any] = [told]
    while waiting:
        one = waiting.pop()
        if not isinstance(one, Mapping):
            continue
        hub, checkpoints = one.get("hub"), one.get("checkpoints")
        if hub:
            repo = hub.get("repo") if isinstance(hub, Mapping) else None
            if isinstance(repo, str) and _MODEL_ID.fullmatch(repo):
                yield repo
        elif isinstance(checkpoints, list):
            waiting.extend(reversed(checkpoints))
        else:
            waiting.append(one.get("made_by_ckptavg"))


def _body(told: Mapping[str, Any]) -> Iterator[str]:
    checkpoints = told["checkpoints"]
    plural = "" if len(checkpoints) == 1 else "s"
    what = (
        f"The weighted mean of {len(checkpoints)} checkpoint{plural} of a training run (stochastic "
        f"weight averaging, {_PAPER})"
        if len(checkpoints) > 1
        else "An average that was made before, with something done to it"
        if checkpoints[0].get("made_by_ckptavg")
        else "One checkpoint of a training run"
    )
    yield f"{what}, made by ckptavg {told['ckptavg_version']}.\n"
    if _is_torch(told):
        yield "## How to load it\n"
        yield _HOW_TO_LOAD
    yield "## Checkpoints\n"
    yield "\n".join(_table(checkpoints)) + "\n"
    yield "## How it was made\n"
    yield "\n".join(_facts(told)) + "\n"
    if told.get("command"):
        yield f"```sh\n{_code(told['command'])}\n```\n"


def _is_torch(told: Mapping[str, Any]) -> bool:
    output = told.get("output")
    return isinstance(output, Mapping) and output.get("format") == "torch"


def _table(checkpoints: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield "| checkpoint | commit | step | coefficient |"
    yield "|---|---|---:|---:|"
    for one in checkpoints[:_MAX_ROWS]:
        hub, step = one.get("hub"), one.get("step")
        commit = f"`{hub['commit']}`" if hub else ""
        yield (
            f"| {_cell(str(one['source']))} | {commit} | {'' if step is None else step} "
            f"| {_coefficient(one['coefficient'])} |"
        )
    if len(checkpoints) > _MAX_ROWS:
        yield f"| and {len(checkpoints) - _MAX_ROWS} more: see ckptavg.json | | | |"


def _coefficient(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _facts(told: Mapping[str, Any]) -> Iterator[str]:
    recipe, tensors = told["recipe"], told["tensors"]
    yield (
        f"- scheme `{_code(told['scheme'])}`, sums in {recipe['accumulate']}, "
        f"dtype {recipe['dtype']}, integer tensors that differ from the {recipe['buffers']} "
        "checkpoint"
    )
    dtypes = ", ".join(f"{count} {name}" for name, count in tensors["averaged_dtypes"].items())
    listed = f" ({dtypes})" if dtypes else ""
    yield f"- {tensors['averaged']} tensors averaged{listed}, {len(tensors['copied'])} copied"
    for kind, modules in (tensors.get("derived") or {}).items():
        yield f"- {len(modules)} modules averaged by their weights ({_code(kind)})"
    adapter = told.get("adapter")
    if adapter:
        error = adapter.get("error")
        off = "" if error is None else f", off the mean of the products by {error:.3g} of its norm"
        yield f"- adapters averaged by {_code(adapter['method'])}, rank {adapter['rank']}{off}"
    batchnorm = told.get("batchnorm")
    if batchnorm and batchnorm.get("layers"):
        yield (
            f"- BatchNorm statistics of {len(batchnorm['layers'])} layers recomputed over "
            f"{batchnorm['n_samples']} samples ({batchnorm['n_batches']} batches)"
        )
    for name, value in (told.get("metrics") or {}).items():
        told_value = "not finite" if value is None else f"{value:.6g}"
        yield f"- {_cell(name)}: {told_value}"
    versions = told.get("versions") or {}
    if versions:
        yield "- versions: " + ", ".join(f"{name} {one}" for name, one in versions.items())


def _cell(text: str) -> str:
    """Make text safe for a cell: no end of line, no bar, nothing that markup would take up."""
    escaped = printable(text).replace("\\", "\\\\")
    for character in "|`*_<>[]":
        escaped = escaped.replace(character, f"\\{character}")
    return escaped


def _code(text: str) -> str:
    return printable(str(text)).replace("`", "'")
