"""Text -> HTML: whatever is not markup already is escaped on its way in."""

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ckptavg.errors import printable, without_token

OPEN_ROWS = 16  # longer tables are folded
TOP_ROWS = 10  # of which these are shown
_VOID = ("img", "meta")  # have no end tag
_EMPTY = ("rect", "line")  # of SVG: have nothing in them, which has to be said


class Html(str):
    """Text that is markup; every other text is escaped where it goes into markup."""

    __slots__ = ()


def escaped(text: object) -> Html:
    """Return text as markup: no token in it, and no character that hides or turns round others."""
    return Html(html.escape(printable(without_token(str(text)))))


def joined(parts: Iterable[object], separator: str = "") -> Html:
    """Put parts together; those that are no markup are escaped, the separator is one."""
    return Html(separator.join(one if isinstance(one, Html) else escaped(one) for one in parts))


def element(tag: str, *parts: object, **attributes: object) -> Html:
    """Return an element.

    Args:
        tag: Its name.
        parts: What is in it, text or markup.
        attributes: By name; ``class_`` is ``class``, ``aria_label`` is ``aria-label``; None is left
            out.
    """
    words = [tag]
    for name, value in attributes.items():
        key = name.removesuffix("_").replace("_", "-")
        if value is not None:
            words.append(f'{key}="{value if isinstance(value, Html) else escaped(value)}"')
    start = " ".join(words)
    if tag in _VOID:
        return Html(f"<{start}>")
    return Html(f"<{start}/>" if tag in _EMPTY else f"<{start}>{joined(parts)}</{tag}>")


def paragraph(*parts: object, class_: str | None = None) -> Html:
    """Return a paragraph on a line of its own."""
    return Html(element("p", *parts, class_=class_) + "\n")


def code(text: object) -> Html:
    """Return a name, or anything else that is typed."""
    return element("code", text)


def codes(names: Iterable[object]) -> Html:
    """Return names, with commas between them."""
    return joined(map(code, names), ", ")


def block(text: str) -> Html:
    """Return lines to copy."""
    inside = joined(text.rstrip("\n").split("\n"), "\n")
    return Html(element("pre", element("code", inside), tabindex="0") + "\n")


def items(sentences: Iterable[object], class_: str | None = None) -> Html:
    """Return a list, one item a sentence."""
    return Html(element("ul", *(element("li", one) for one in sentences), class_=class_) + "\n")


def folded(summary: object, *content: object) -> Html:
    """Return what is shown on demand, and in print."""
    return Html(element("details", element("summary", summary), *content) + "\n")


def facts(pairs: Iterable[tuple[object, object]]) -> Html:
    """Return a list of terms and what they are."""
    rows = (
        element("div", element("dt", term), element("dd", value), class_="fact")
        for term, value in pairs
    )
    return Html(element("dl", *rows, class_="facts") + "\n")


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        title: What stands above it.
        kind: ``text``, ``number``, ``bar`` (a number and a bar), ``scheme`` or ``hash``, which have
            no place to break.
    """

    title: object
    kind: str = "number"


@dataclass(frozen=True)
class Row:
    """A row of a table: its cells, and whether it stands out."""

    cells: Sequence[object]
    stands_out: bool = False


def table(label: str, columns: Sequence[Column], rows: Iterable[Row]) -> Html:
    """Return a table in a box of its own, which scrolls where the screen is narrow.

    Args:
        label: What it is called for those who do not see it.
        columns: Its columns; the first one names the rows.
        rows: Its rows.
    """
    head = element(
        "tr", *(element("th", one.title, scope="col", class_=one.kind) for one in columns)
    )
    lines = [_line(columns, row) for row in rows]
    kind = "scroll whole" if len(lines) <= OPEN_ROWS else "scroll"  # on one sheet, or on several
    body = element("tbody", Html("\n"), *lines)
    inside = element("table", element("thead", head), Html("\n"), body)
    return Html(
        element("div", inside, class_=kind, role="region", aria_label=label, tabindex="0") + "\n"
    )


def _line(columns: Sequence[Column], row: Row) -> Html:
    cells = [
        element("th", cell, scope="row", class_=column.kind)
        if number == 0
        else element("td", cell, class_=column.kind)
        for number, (column, cell) in enumerate(zip(columns, row.cells, strict=True))
    ]
    return Html(element("tr", *cells, class_="out" if row.stands_out else None) + "\n")
