"""Numbers as people read them, and as bars."""

import math
import re
from collections.abc import Sequence

from ckptavg.report.markup import Html, element, joined

NOT_FINITE = "not finite"  # what JSON has no number for is null in our files
_MINUS = "\N{MINUS SIGN}"
_EDGE = re.compile(r".*[/@]")  # up to what a label may be cut after
_WORD = re.compile(r"[a-z]+[ ,:]")
_PIECE = re.compile(r"[^./@_]*[./@_]?")  # after which a name may be broken
_LABEL_CHARACTERS = 80
_HEAD_CHARACTERS = 24
_HEIGHT = 100


def number(value: object, digits: int = 6) -> str:
    """Return a number, or what stands for one.

    Raises:
        TypeError: If it is none.
    """
    if value is None:
        return NOT_FINITE
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(value)
    if isinstance(value, int):
        text = f"{value:,}"
    elif math.isfinite(value):
        text = f"{value:.{digits}g}"
    else:
        text = "NaN" if math.isnan(value) else f"{value:g}"
    return text.replace("-", _MINUS)


def plain(value: object) -> str:
    """Return a step or the like: a whole number without separators; empty if there is none."""
    return "" if value is None else number(value).replace(",", "")


def finite(value: object) -> float | None:
    """Return a value that can be drawn."""
    if isinstance(value, (int, float)) and math.isfinite(value):
        return float(value)
    return None


def counted(count: int, noun: str, several: str = "") -> str:
    """Return ``1 layer`` or ``7 layers``; ``several`` is the plural where it takes more than s."""
    return f"{number(count)} {noun if count == 1 else several or f'{noun}s'}"


def sentence(text: str) -> str:
    """Return what a note or a summary says as a sentence; a name that it begins with stays."""
    text = text.strip()
    if _WORD.match(text):
        text = f"{text[:1].upper()}{text[1:]}"
    return text if text.endswith((".", "!", "?", ":")) or not text else f"{text}."


def span(values: Sequence[object], noun: str) -> str:
    """Return ``steps 500 to 1500``; empty where one is not known."""
    known = [finite(value) for value in values]
    if not known or None in known:
        return ""
    first, last = min(values, key=_as_number), max(values, key=_as_number)
    one = plain(first)
    return f"{noun} {one}" if first == last else f"{noun}s {one} to {plain(last)}"


def _as_number(value: object) -> float:
    return finite(value) or 0.0


def short_labels(labels: Sequence[str]) -> tuple[str, list[str]]:
    """Return what all labels begin with, up to a slash or @, and the rest of each."""
    longest = min(len(label.rstrip("/@")) - 1 for label in labels)  # something stays
    common = 0
    while common < longest and len({label[common] for label in labels}) == 1:
        common += 1
    edge = _EDGE.match(labels[0][:common])
    start = edge.end() if edge else 0
    return labels[0][:start], [label[start:] for label in labels]


def label(text: str, full: str | None = None) -> Html:
    """Return a name, cut in its middle to a length that can be read; all of it is its title."""
    full = text if full is None else full
    if len(text) > _LABEL_CHARACTERS:
        tail = _LABEL_CHARACTERS - _HEAD_CHARACTERS - 1
        text = f"{text[:_HEAD_CHARACTERS]}…{text[-tail:]}"
    pieces = joined(filter(None, _PIECE.findall(text)), "<wbr>")
    return element("span", pieces, class_="name", title=None if text == full else full)


def bar(text: str, value: float | None, scale: Sequence[float]) -> Html:
    """Return a number with a bar from zero to it.

    Args:
        text: What is written.
        value: What is drawn; None draws nothing.
        scale: All that is drawn in the same column.
    """
    low, high = min(0.0, *scale, 0.0), max(0.0, *scale, 0.0)
    start, end = sorted((0.0, value or 0.0))
    return _drawn(text, low, high, (start, end), 0.0, is_negative=(value or 0.0) < 0)


def range_bar(text: str, ends: tuple[float, float] | None, scale: Sequence[float]) -> Html:
    """Return text with a bar between two factors, on a logarithmic axis around 1."""
    if ends is None or min(*ends, *scale, 1.0) <= 0:
        return _drawn(text, -1, 1, (0, 0), 0.0)
    logs = [abs(math.log(value)) for value in scale]
    reach = max(logs, default=0.0)
    return _drawn(text, -reach, reach, (math.log(ends[0]), math.log(ends[1])), 0.0)


def _drawn(
    text: str,
    low: float,
    high: float,
    drawn: tuple[float, float],
    origin: float,
    *,
    is_negative: bool = False,
) -> Html:
    length = (high - low) or 1.0
    places = [100 * (one - low) / length for one in (*drawn, origin)]
    start, end, zero = (min(max(place, 0.0), 100.0) for place in places)
    shape = element(
        "rect", x=f"{start:.2f}", y="0", width=f"{max(end - start, 0.0):.2f}", height="8",
        class_="minus" if is_negative else "plus",
    )  # fmt: skip
    axis = element("line", x1=f"{zero:.2f}", x2=f"{zero:.2f}", y1="0", y2="8")
    picture = element(
        "svg", shape, axis, viewBox="0 0 100 8", preserveAspectRatio="none", aria_hidden="true"
    )
    return element("span", element("span", text), picture, class_="bar")


def strip(values: Sequence[float | None], told: str) -> Html:
    """Return values as columns side by side; ``told`` says what they are to those who see none."""
    drawn = [value or 0.0 for value in values]
    low, high = min(0.0, *drawn), max(0.0, *drawn)
    scale = _HEIGHT / ((high - low) or 1.0)
    zero = high * scale
    shapes = [
        element(
            "rect", x=f"{at + 0.1:.1f}", width="0.8",
            y=f"{zero - max(value, 0.0) * scale:.2f}", height=f"{abs(value) * scale:.2f}",
            class_="minus" if value < 0 else "plus",
        )
        for at, value in enumerate(drawn)
    ]  # fmt: skip
    axis = element("line", x1="0", x2=len(drawn), y1=f"{zero:.2f}", y2=f"{zero:.2f}")
    return Html(
        element(
            "svg", joined(shapes), axis, viewBox=f"0 0 {len(drawn)} {_HEIGHT}",
            preserveAspectRatio="none", class_="strip", role="img", aria_label=told,
        )
        + "\n"
    )  # fmt: skip
