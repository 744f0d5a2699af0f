"""The sections about one model, from its provenance."""

import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckptavg.metrics import Mode, is_better
from ckptavg.report.batchnorm import batchnorm_section
from ckptavg.report.checkpoints import checkpoints_section
from ckptavg.report.figures import (
    counted,
    finite,
    label,
    number,
    sentence,
)
from ckptavg.report.gather import Model
from ckptavg.report.markup import (
    OPEN_ROWS,
    Column,
    Html,
    Row,
    block,
    code,
    codes,
    element,
    facts,
    folded,
    items,
    joined,
    paragraph,
    table,
)
from ckptavg.report.recipe import recipe_text
from ckptavg.report.summary import mode_of
from ckptavg.rerun import named_code
from ckptavg.units import size

_FEW_NAMES = 6
_SUMS = {"auto": "float64, those of 16-bit floats in float32"}
_DTYPES = {"same": "as in the checkpoints"}


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        title: Its heading.
        body: What is under that.
        kind: What the table of contents calls it; empty for the heading.
    """

    title: str
    body: Html
    kind: str = ""

    @property
    def in_contents(self) -> str:
        """What the table of contents calls it."""
        return self.kind or self.title


def sections(
    model: Model, known: Mapping[str, Mode], elsewhere: Collection[str]
) -> Iterator[Section]:
    """Yield what there is to say of a model, but for what it is in short.

    Args:
        model: Which.
        known: Which metrics are better small or large.
        elsewhere: Names of averages that the page shows as rows of a search.
    """
    told = model.told
    notes = [*told["notes"], *(told["batchnorm"] or {}).get("notes", ())]
    if notes:
        yield Section("Notes", items(dict.fromkeys(sentence(str(note)) for note in notes)))
    yield Section("Checkpoints", checkpoints_section(told))
    yield Section("Tensors", facts(_tensor_facts(told)))
    if told["batchnorm"]:
        yield Section("BatchNorm", batchnorm_section(told["batchnorm"]))
    if told.get("metrics"):
        yield Section("Evaluation", _evaluation(told, known, elsewhere))
    yield Section("Provenance", _provenance(model))


# ---- evaluation


def _evaluation(
    told: Mapping[str, Any], known: Mapping[str, Mode], elsewhere: Collection[str]
) -> Html:
    metrics = told["metrics"]
    rows = [(str(row["name"]), row["metrics"]) for row in told.get("comparison") or ()]
    own = next((at for at, (_, found) in enumerate(rows) if found == metrics), None)
    if own is None:
        rows.insert(0, ("this model", metrics))
        own = 0
    rows = [row for at, row in enumerate(rows) if at == own or row[0] not in elsewhere]
    own = next(at for at, (_, found) in enumerate(rows) if found == metrics)
    shown = metrics_table("Evaluation", rows, {own}, known)
    if len(rows) == 1:
        return shown
    which = "The row of this model is set off; the best value of each metric is bold."
    return joined([paragraph(which), shown])


def metrics_table(
    title: str,
    rows: Sequence[tuple[object, Mapping[str, Any]]],
    own: set[int],
    known: Mapping[str, Mode],
    before: Sequence[tuple[Column, Sequence[object]]] = (),
) -> Html:
    """Return a table of metrics, the best of each in bold.

    Args:
        title: What it is called.
        rows: What was judged, and what was said of it.
        own: The rows to set off.
        known: Which metrics are better small or large.
        before: Other columns, with a cell for each row.
    """
    names = list(dict.fromkeys(name for _, metrics in rows for name in metrics))
    best = {name: _best([metrics.get(name) for _, metrics in rows], name, known) for name in names}
    columns = [Column("", "text"), *(column for column, _ in before), *map(Column, names)]
    lines = []
    for at, (what, metrics) in enumerate(rows):
        cells = [
            (element("b", number(metrics[name])) if at in best[name] else number(metrics[name]))
            if name in metrics
            else ""
            for name in names
        ]
        name = what if isinstance(what, Html) else label(str(what))
        lines.append(Row([name, *(cells_of[at] for _, cells_of in before), *cells], at in own))
    return table(title, columns, lines)


def _best(values: Sequence[object], name: str, known: Mapping[str, Mode]) -> set[int]:
    """Return where the best values are; nowhere if that is not known, or there is no choice."""
    mode, there = mode_of(name, known), [finite(value) for value in values]
    drawn = [value for value in there if value is not None]
    if mode is None or len(drawn) < 2:
        return set()
    best = drawn[0]
    for value in drawn[1:]:
        best = value if is_better(value, best, mode) else best
    return {at for at, value in enumerate(there) if value == best}


# ---- tensors


def _tensor_facts(told: Mapping[str, Any]) -> Iterator[tuple[object, object]]:
    tensors, recipe, made = told["tensors"], told["recipe"], told["output"]
    dtypes = ", ".join(f"{number(n)} {name}" for name, n in tensors["averaged_dtypes"].items())
    yield (
        "averaged",
        f"{counted(tensors['averaged'], 'tensor')}" + (f" ({dtypes})" if dtypes else ""),
    )
    if tensors["copied"]:
        yield "copied", _names(tensors["copied"], "integer or bool tensor")
    differing = tensors.get("differing") or {}
    if differing.get("names"):
        where = joined([", taken from ", code(differing["taken_from"])])
        is_all = differing["names"] == tensors["copied"]
        count = f"all {len(differing['names'])}" if is_all else number(len(differing["names"]))
        yield "of which differ", joined([count, where])
        if not is_all:
            yield "", _names(differing["names"], "tensor")
    for kind, modules in (tensors.get("derived") or {}).items():
        yield f"computed as {kind}", _names(modules, "module")
    tied = tensors.get("tied") or {}
    if tied:
        yield "tied, averaged once", _names([f"{a} = {b}" for a, b in tied.items()], "tensor")
    adapter = told.get("adapter")
    if adapter:
        yield "adapters", _adapter(adapter)
    yield "sums in", _SUMS.get(recipe["accumulate"], recipe["accumulate"])
    yield "dtype", _DTYPES.get(recipe["dtype"], recipe["dtype"])
    yield "integers that differ", f"from the {recipe['buffers']} checkpoint"
    if recipe.get("allow_nonfinite"):
        yield "values that are not finite", "kept"
    shards = list(map(str, made["shards"]))
    files = codes(shards) if len(shards) <= _FEW_NAMES else counted(len(shards), "file")
    yield "weights", joined([f"{size(made['nbytes'])} in ", files])
    found = made.get("evidence") or ()
    side_files = [name for name in made["side_files"] if name not in found]
    if side_files:
        yield "side files", codes(side_files)
    yield "device", told["device"]


def _names(names: Sequence[object], noun: str) -> Html:
    count = counted(len(names), noun)
    if len(names) <= _FEW_NAMES:
        return joined([f"{count}: ", codes(names)])
    return folded(count, element("p", codes(names), class_="names"))


def _adapter(told: Mapping[str, Any]) -> str:
    text = f"by {told['method']}, rank {number(told['rank'])}"
    if told.get("error") is not None:
        text += f", off the mean of the products by {number(told['error'], 3)} of its norm"
    if told.get("largest_error_module"):
        text += (
            f", by at most {number(told['largest_error'], 3)} in a module "
            f"({told['largest_error_module']})"
        )
    return text


# ---- provenance


def _provenance(model: Model) -> Html:
    told = model.told
    versions = [f"{name} {one}" for name, one in (told.get("versions") or {}).items()]
    parts = [
        facts(
            [
                ("made", told["created"]),
                ("by", ", ".join([f"ckptavg {told['ckptavg_version']}", *versions])),
                ("scheme", code(told["scheme"])),
            ]
        )
    ]
    files = told["output"].get("files") or []
    if files:
        columns = [Column("file", "text"), Column("size"), Column("SHA-256", "hash")]
        rows = [
            Row([label(str(one["name"])), size(one["nbytes"]), code(one["sha256"])])
            for one in files
        ]
        whole = table("Files", columns, rows)
        is_long = len(rows) > OPEN_ROWS
        parts.append(folded(f"All {len(rows)} files", whole) if is_long else whole)
    if told.get("command"):
        parts += [paragraph("The command:"), block(str(told["command"]))]
    recorded = told.get("reproduce")
    recipe = recipe_text(recorded) if recorded else None
    if recipe is not None and recorded:
        parts += _reproduction(model, recipe, recorded)
    return joined(parts)


def _reproduction(model: Model, recipe: str, recorded: Mapping[str, Any]) -> Iterator[Html]:
    obstacles = recorded["obstacles"]
    yield paragraph(
        "The recipe that makes it again; saved beside the weights, ", code("ckptavg run"),
        " takes it (", code("directory"), " leads from there to where the command worked):",
    )  # fmt: skip
    yield block(recipe)
    verify = f"ckptavg verify {shlex.quote(str(model.path))}"
    if obstacles:
        yield paragraph("What keeps it from being made again bit for bit:")
        yield items(sentence(str(one)) for one in obstacles)
        yield paragraph("Whether its files are still what they were:")
        yield block(verify)
        return
    needed = named_code(recorded)
    runs = [", which runs ", codes(needed)] if needed else []
    yield paragraph("Whether it is still what it was, and comes out again bit for bit", *runs, ":")
    yield block(f"{verify} --reproduce{' --trust-code' if needed else ''}")
