"""A page as tests see it: its elements in order, and whether they fit into each other."""

from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"img", "meta", "wbr"}
OF_SVG = {"rect", "line"}


@dataclass
class Element:
    """An element: its name, its attributes, and the text in it."""

    tag: str
    attributes: dict[str, str | None]
    text: str = ""

    def get(self, name: str) -> str:
        """Return an attribute; empty without it."""
        return self.attributes.get(name) or ""


@dataclass
class Table:
    """A table: its name and the texts of its cells; ``out`` are the numbers of rows set off."""

    label: str
    header: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    out: list[int] = field(default_factory=list)


class Document(HTMLParser):
    """Reads a page, and refuses one whose elements do not fit into each other."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[Element] = []
        self._open: list[Element] = []
        self.tables: list[Table] = []
        self.feed(text)
        self.close()
        assert not self._open, f"left open: {[one.tag for one in self._open]}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"an attribute twice: {tag} {attrs}"
        assert tag not in OF_SVG, f"{tag} has to end in itself"
        one = Element(tag, dict(attrs))
        self.elements.append(one)
        if tag == "table":
            self.tables.append(Table(self._open[-1].get("aria-label")))
        if tag == "tr" and self.tables[-1].header:
            if one.get("class") == "out":
                self.tables[-1].out.append(len(self.tables[-1].rows))
            self.tables[-1].rows.append([])
        if tag not in VOID:
            self._open.append(one)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in OF_SVG, f"{tag} does not end in itself"
        self.elements.append(Element(tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        one = self._open.pop()
        assert one.tag == tag, f"{one.tag} ends as {tag}"
        if tag in ("td", "th"):
            assert tag == "td" or one.get("scope") in ("col", "row")
            table = self.tables[-1]
            (table.rows[-1] if table.rows else table.header).append(one.text)

    def handle_data(self, data: str) -> None:
        for one in self._open:
            one.text += data

    def all(self, tag: str) -> list[Element]:
        """Return all elements of a name."""
        return [one for one in self.elements if one.tag == tag]

    def one(self, tag: str) -> Element:
        """Return the only element of a name."""
        (found,) = self.all(tag)
        return found

    def table(self, label: str) -> Table:
        """Return the only table of a name."""
        (found,) = [one for one in self.tables if one.label == label]
        return found

    @property
    def headings(self) -> list[str]:
        """The headings, in order."""
        return [one.text for one in self.elements if one.tag in ("h1", "h2", "h3")]
