"""Pictures that lie beside figures, put into the page itself."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ckptavg.report.gather import Evidence
from ckptavg.report.markup import Html, code, element, escaped, paragraph
from ckptavg.units import size

MAX_PICTURE_BYTES = 20_000_000
_PNG = b"\x89PNG\r\n\x1a\n"
_SVG_BEGINNING_BYTES = 4096
_TYPES = {".svg": "image/svg+xml", ".png": "image/png"}


@dataclass(frozen=True)
class Picture:
    """A picture: where it lies, its bytes, and what is wrong with it; None if nothing is."""

    path: Path
    content: bytes
    problem: str | None = None


def pictures_of(one: Evidence, others: Sequence[Evidence]) -> list[Picture]:
    """Return the pictures that belong to a file of figures, by their names.

    Those that begin with its name are its own, unless another file there has a longer one that
    fits; the rest of a kind goes to the first file of that kind. Of two formats SVG is taken.
    """
    here = [other for other in others if other.path.parent == one.path.parent]
    stems = [other.path.stem for other in here if other.kind == one.kind]
    found: dict[str, Path] = {}
    for suffix in (".png", ".svg"):
        for path in sorted(one.path.parent.glob(f"*{suffix}")):
            fitting = [stem for stem in stems if path.stem.startswith(stem)]
            owner = max(fitting, key=len) if fitting else stems[0]
            if path.stem.startswith(one.kind) and owner == one.path.stem and path.is_file():
                found[path.stem] = path
    return [_read(found[stem]) for stem in sorted(found)]


def _read(path: Path) -> Picture:
    try:
        nbytes = path.stat().st_size
        if nbytes > MAX_PICTURE_BYTES:
            why = f"has {size(nbytes)}, more than the {size(MAX_PICTURE_BYTES)} that are taken"
            return Picture(path, b"", why)
        content = path.read_bytes()
    except OSError as error:
        return Picture(path, b"", f"cannot be read: {(error.strerror or str(error)).lower()}")
    is_png = content.startswith(_PNG)
    is_svg = b"<svg" in content[:_SVG_BEGINNING_BYTES]
    if not (is_png if path.suffix == ".png" else is_svg):
        return Picture(path, b"", f"is no {path.suffix[1:].upper()} image")
    return Picture(path, content)


def figure(picture: Picture, caption: object, told: str) -> Html:
    """Return a picture with its caption; ``told`` says what it shows to those who do not see it.

    It is an image, in which no script runs and from which nothing is fetched.
    """
    if picture.problem is not None:
        name = code(picture.path.name)
        return paragraph("The picture ", name, f" {picture.problem}.", class_="missing")
    data = base64.b64encode(picture.content).decode("ascii")
    source = Html(f"data:{_TYPES[picture.path.suffix]};base64,{data}")
    image = element("img", src=source, alt=escaped(told))
    return Html(element("figure", image, element("figcaption", caption)) + "\n")
