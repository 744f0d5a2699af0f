"""The whole page: what stands at its top, the table of contents, and the sections below."""

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ckptavg._version import __version__
from ckptavg.checkpoint.folder import PROVENANCE_NAME
from ckptavg.errors import ReportError
from ckptavg.evidence_names import GENERATOR
from ckptavg.metrics import Mode
from ckptavg.report.figures import label, number
from ckptavg.report.gather import SEARCHES, Evidence, Model
from ckptavg.report.markup import (
    Column,
    Html,
    code,
    element,
    escaped,
    folded,
    joined,
    paragraph,
)
from ckptavg.report.measured import measured_section
from ckptavg.report.pictures import pictures_of
from ckptavg.report.searches import search_section
from ckptavg.report.sections import Section, metrics_table, sections
from ckptavg.report.style import STYLE
from ckptavg.report.summary import batchnorm_words, modes, summary
from ckptavg.schemes import shortened

_MOST_OPEN_MODELS = 4  # of more, each is folded
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@dataclass(frozen=True)
class Page:
    """A page: its text, its headings, how many pictures it has, and notes on those it has not."""

    text: str
    sections: tuple[str, ...]
    n_pictures: int
    notes: tuple[str, ...]


def lay_out(output: Path, models: Sequence[Model], evidence: Sequence[Evidence]) -> Page:
    """Return the page about an output.

    Raises:
        ReportError: If something in a file makes no sense.
    """
    known: dict[str, Mode] = {}
    for one in evidence:
        if one.kind in SEARCHES:
            with _naming(one.path):
                known |= modes(one.told)
    pictures = {one.path: pictures_of(one, evidence) for one in evidence}
    found = []
    for one in evidence:
        tell = search_section if one.kind in SEARCHES else measured_section
        with _naming(one.path):
            found.append(tell(one, pictures[one.path], _where(one.path, output)))
    if len(models) == 1:
        name = models[0].name
        *before, last = _about(models[0], known, _judged(evidence, output))
        parts = [*before, *found, last]  # where it comes from ends the page
    else:
        name = Path(os.path.realpath(output)).name
        parts = [*_about_all(models, known, _judged(evidence, output)), *found]
    shown = [picture for of_one in pictures.values() for picture in of_one]
    return Page(
        text=_document(name, parts),
        sections=tuple(part.in_contents for part in parts),
        n_pictures=sum(picture.problem is None for picture in shown),
        notes=tuple(
            f"{picture.path}: {picture.problem}, so it is left out"
            for picture in shown
            if picture.problem is not None
        ),
    )


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Say which file it is that makes no sense."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ReportError(
            f"{path}: makes no sense: it was changed by hand, or is of another version"
        ) from error


def _where(path: Path, output: Path) -> str:
    """Return what the page calls a file: its place in the output, or as it was given."""
    inside = os.path.relpath(os.path.realpath(path), os.path.realpath(output))
    return str(path) if inside.startswith(os.pardir) else inside


def _judged(evidence: Sequence[Evidence], output: Path) -> set[str]:
    """Return the names of the averages that the sweep which made an output judged."""
    return {
        str(row["name"])
        for one in evidence
        if one.kind == "sweep" and one.path.parent == output
        for row in one.told["rows"]
    }


def _about(model: Model, known: Mapping[str, Mode], elsewhere: Collection[str]) -> list[Section]:
    with _naming(model.path / PROVENANCE_NAME):
        return [Section("Summary", summary(model.told, known)), *sections(model, known, elsewhere)]


def _about_all(
    models: Sequence[Model], known: Mapping[str, Mode], elsewhere: Collection[str]
) -> Iterator[Section]:
    """Yield what there is of several models: first of all together, then of each."""
    about = [
        _about(model, known, elsewhere) for model in models
    ]  # first: it sees what makes no sense
    yield Section("Overview", _overview(models, known))
    for at, (model, (short, *others)) in enumerate(zip(models, about, strict=True), 1):
        inside = joined(
            _under_heading(one, "h3", f"{_anchor(at)}-{part}") for part, one in enumerate(others, 1)
        )
        if len(models) > _MOST_OPEN_MODELS:
            inside = folded("Checkpoints, tensors and the rest", inside)
        yield Section(model.name, joined([short.body, inside]))


def _overview(models: Sequence[Model], known: Mapping[str, Mode]) -> Html:
    names = [
        element("a", label(model.name), href=f"#{_anchor(at)}")
        for at, model in enumerate(models, 1)
    ]
    told = [model.told for model in models]
    before: list[tuple[Column, Sequence[object]]] = [
        (Column("scheme", "scheme"), [code(shortened(str(one["scheme"]))) for one in told]),
        (Column("checkpoints"), [number(len(one["checkpoints"])) for one in told]),
        (Column("BN statistics", "text"), list(map(batchnorm_words, told))),
    ]
    rows = [(name, one.get("metrics") or {}) for name, one in zip(names, told, strict=True)]
    intro = paragraph(f"{len(models)} averages, made at once.", class_="lead")
    return joined([intro, metrics_table("Averages", rows, set(), known, before)])


def _anchor(at: int) -> str:
    """Return the id of the section of a model, counted from 1; the overview is before them."""
    return f"section-{at + 1}"


def _under_heading(section: Section, tag: str, anchor: str) -> Html:
    kicker = paragraph(section.kind, class_="kicker") if section.kind else Html("")
    heading = element(tag, section.title, id=f"{anchor}-title")
    inside = joined([kicker, heading, Html("\n"), section.body])
    return joined(
        [element("section", inside, id=anchor, aria_labelledby=f"{anchor}-title"), Html("\n")]
    )


def _document(name: str, parts: Sequence[Section]) -> str:
    head = joined(
        [
            Html('<meta charset="utf-8">'),
            Html(f'{GENERATOR}{escaped(__version__)}">'),
            element("meta", http_equiv="Content-Security-Policy", content=Html(_POLICY)),
            element("meta", name="viewport", content="width=device-width, initial-scale=1"),
            element("meta", name="color-scheme", content="light dark"),
            element("title", f"{name}: ckptavg report"),
            Html(f"<style>\n{STYLE}</style>"),
        ],
        "\n",
    )
    links = [
        element("li", element("a", part.in_contents, href=f"#section-{at}"))
        for at, part in enumerate(parts, 1)
    ]
    first, *others = parts
    kicker = paragraph("ckptavg report", class_="kicker")
    top = element("header", kicker, element("h1", name), Html("\n"), first.body, id="section-1")
    sections_below = [
        _under_heading(part, "h2", f"section-{at}") for at, part in enumerate(others, 2)
    ]
    body = joined(
        [
            top,
            element("nav", element("ol", *links), aria_label="Contents"),
            element("main", *sections_below),
            element("footer", f"Written by ckptavg {__version__}."),
        ],
        "\n",
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n</head>\n'
        f"<body>\n{body}\n</body>\n</html>\n"
    )
