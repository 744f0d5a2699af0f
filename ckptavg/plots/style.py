"""What all pictures have in common: colours, sizes, how they become files."""

import importlib.util
import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ckptavg.errors import UsageError
from ckptavg.metrics import Judge

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind people tell apart
BLUE, ORANGE, BLACK = "#0072B2", "#D55E00", "#000000"
GREEN, PURPLE, SKY, YELLOW, GREY = "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#666666"
SERIES = (BLUE, ORANGE, GREEN, PURPLE, SKY, YELLOW, BLACK, GREY)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
SURFACE = "viridis"  # as bright as it is high: also in grey, also to colour-blind people

_NAME_LENGTH = 48
_DPI = 150
_SETTINGS: dict[str, Any] = {
    "font.size": 10,
    "axes.titlesize": "medium",
    "legend.fontsize": "small",
    "legend.frameon": False,
    "svg.hashsalt": "ckptavg",  # the same figures give the same file
    "svg.fonttype": "path",  # looks the same where the font is missing
}


def require_matplotlib(remedy: str = "") -> None:
    """Refuse a plot where matplotlib is missing.

    Args:
        remedy: What to do instead of installing it, such as leaving pictures out.

    Raises:
        UsageError: If it is.
    """
    if importlib.util.find_spec("matplotlib") is None:
        instead = f" (or {remedy})" if remedy else ""
        raise UsageError(f"a plot needs matplotlib: pip install 'ckptavg[plots]'{instead}")


@contextmanager
def styled() -> Iterator[None]:
    """Let figures that are made meanwhile look alike, whatever the user's settings are."""
    import matplotlib as mpl

    with mpl.rc_context():
        mpl.rcdefaults()
        settings: Any = mpl.rcParams  # whose keys are known one by one
        settings.update(_SETTINGS)
        yield


def with_direction(judge: Judge) -> str:
    """Return the name of a metric, and what is better."""
    metric, mode = judge.settled
    return f"{metric} ({'lower' if mode == 'min' else 'higher'} is better)"


def png(figure: "Figure") -> bytes:
    """Return a figure as a PNG image."""
    return _saved(figure, "png", {"Software": None})


def svg(figure: "Figure") -> bytes:
    """Return a figure as an SVG image, the same bytes for the same figure."""
    return _saved(figure, "svg", {"Date": None, "Creator": None})


def pictures(name: str, figure: "Figure") -> dict[str, bytes]:
    """Return a figure as files of both kinds."""
    return {f"{name}.png": png(figure), f"{name}.svg": svg(figure)}


def short(name: str) -> str:
    """Return a name cut to a length that fits beside a plot; its end tells most."""
    return plain(name if len(name) <= _NAME_LENGTH else f"...{name[3 - _NAME_LENGTH :]}")


def plain(text: str) -> str:
    """Return text that is drawn as it is: between dollars, matplotlib would see a formula."""
    return text.replace("$", r"\$")


def open_up(figure: "Figure") -> None:
    """Give every panel a light grid and no box; colour bars stay as they are."""
    for panel in figure.axes:
        if panel.get_label() != "<colorbar>":
            panel.grid(alpha=0.25)
            panel.spines[["top", "right"]].set_visible(False)


def _saved(figure: "Figure", kind: str, metadata: dict[str, None]) -> bytes:
    image = io.BytesIO()
    figure.savefig(image, format=kind, dpi=_DPI, metadata=metadata)
    return image.getvalue()
