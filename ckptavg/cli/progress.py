"""Progress bars on stderr, one a stage; none where nobody watches."""

import sys
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from tqdm import tqdm

_UNITS = {
    "average": "B",
    "compare": "B",
    "load": "checkpoint",
    **dict.fromkeys(("plane", "width", "path"), "point"),
    "ensemble": "model",
    "distances": "checkpoint",
}


class ProgressBars:
    """A ``pipeline.Progress`` that draws; a context manager that leaves the screen clean."""

    def __init__(self, *, quiet: bool) -> None:
        """Draw only if ``quiet`` is off and stderr is a terminal."""
        self._draws = not quiet and sys.stderr is not None and sys.stderr.isatty()
        self._bar: tqdm[Any] | None = None
        self._stage = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._close()

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        """Show that ``done`` more units of a stage are done."""
        if not self._draws:
            return
        if self._bar is None or stage != self._stage:
            from tqdm import tqdm

            self._close()
            self._stage = stage
            self._bar = tqdm(
                total=total,
                desc=stage,
                unit=_UNITS.get(stage, "sample"),
                unit_scale=True,
                leave=False,
                file=sys.stderr,
            )
        self._bar.update(done)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
