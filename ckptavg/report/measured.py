"""What other commands measured: a finding, its pictures, and where the figures are."""

from collections.abc import Iterator, Sequence

from ckptavg.report.figures import sentence
from ckptavg.report.gather import Evidence
from ckptavg.report.markup import Html, block, code, folded, items, joined, paragraph
from ckptavg.report.pictures import Picture, figure
from ckptavg.report.sections import Section


def measured_section(one: Evidence, pictures: Sequence[Picture], where: str) -> Section:
    """Return what a measurement found.

    Args:
        one: Its file.
        pictures: Those that belong to it.
        where: What the page calls the file.
    """
    title = _text(one.told["title"])
    summary = [sentence(_text(text)) for text in one.told["summary"]]
    notes = [sentence(_text(text)) for text in one.told["notes"]]
    parts = [_finding(summary)] if summary else []
    parts += _figures(one, pictures, title, " ".join(summary))
    if notes:
        parts.append(items(notes, class_="notes"))
    csv = one.path.with_suffix(".csv")
    numbers = [code(where), *([code(csv.name)] if csv.is_file() else [])]
    parts.append(paragraph("All figures: ", joined(numbers, ", "), class_="numbers"))
    if one.told.get("command"):
        parts.append(folded("The command", block(_text(one.told["command"]))))
    return Section(title, joined(parts), one.kind.capitalize())


def _finding(summary: Sequence[str]) -> Html:
    if len(summary) == 1:
        return paragraph(summary[0], class_="finding")
    return items(summary, class_="finding")


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(value)
    return value


def _figures(
    one: Evidence, pictures: Sequence[Picture], title: str, summary: str
) -> Iterator[Html]:
    for picture in pictures:
        words = _beyond(picture.path.stem, one)
        shown = f"{words[:1].upper()}{words[1:]} " if words else ""
        caption = joined([shown, code(picture.path.name)])
        yield figure(picture, caption, f"{title}{f': {words}' if words else ''}. {summary}")


def _beyond(stem: str, one: Evidence) -> str:
    """Return in words what the name of a picture says beyond that of the figures."""
    known = one.path.stem if stem.startswith(one.path.stem) else one.kind
    rest = stem.removeprefix(known).replace("-", " ").replace("_", " ")
    return " ".join(rest.split())
