"""The options of ``average_checkpoints`` that every command which averages takes, too."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self, TypedDict

from ckptavg.cycles import Recorded
from ckptavg.metrics import Mode
from ckptavg.plan import AveragePlan
from ckptavg.recipe import Accumulate, Buffers, OutputDType, Recipe
from ckptavg.results import Progress
from ckptavg.schemes import Scheme
from ckptavg.selection import Selection
from ckptavg.tensors import OutputFormat


class AverageOptions(TypedDict, total=False):
    """Selection, arithmetic, reading, machine and output; see ``average_checkpoints``."""

    last: int | None
    first: int | None
    every: int | None
    steps: tuple[int | None, int | None] | None
    match: str | Sequence[str]
    at_lr_minima: bool
    constant_lr: bool
    swad: bool
    swad_tolerance: float | None
    best: int | None
    log: str | Path | None
    lr_recorded: Recorded | None
    accumulate: Accumulate
    dtype: OutputDType
    buffers: Buffers
    allow_nonfinite: bool
    adapter_rank: int | None
    adapter_factors: bool
    state_key: str | None
    strip_prefixes: Sequence[str]
    keep_prefix: bool
    device: str
    memory_budget_bytes: int
    n_threads: int | None
    max_shard_bytes: int | None
    output_format: OutputFormat
    overwrite: bool
    include_code: bool
    cache: bool
    distributed: bool
    progress: Progress | None
    planned: Callable[[AveragePlan], None] | None
    command: str | None


@dataclass(frozen=True, kw_only=True)
class Request:
    """Those options, sorted by who wants them.

    Attributes:
        recipe: For the plan.
        preparing: Keyword arguments of ``prepared_average``.
        distributed, progress, planned, command: As in ``average_checkpoints``.
    """

    recipe: Recipe
    preparing: Mapping[str, Any]
    distributed: bool
    progress: Progress | None
    planned: Callable[[AveragePlan], None] | None
    command: str | None

    @classmethod
    def of(
        cls,
        schemes: Sequence[Scheme],
        options: Mapping[str, Any],
        *,
        metric: str | None = None,
        mode: Mode | None = None,
    ) -> Self:
        """Sort options.

        Args:
            schemes: What to average.
            options: Those of ``AverageOptions``.
            metric: What the evaluation is decided by; the selection goes by it, too.
            mode: Likewise.

        Raises:
            UsageError: If a value makes no sense.
        """
        left = dict(options)
        if left.get("best") is not None or left.get("swad"):
            left |= {"metric": metric, "mode": mode}
        if "match" in left:
            match = left["match"]
            left["match"] = (match,) if isinstance(match, str) else tuple(match)
        running = {
            "distributed": left.pop("distributed", False),
            "progress": left.pop("progress", None),
            "planned": left.pop("planned", None),
            "command": left.pop("command", None),
        }
        chosen, recipe = (
            {one.name: left.pop(one.name) for one in fields(kind) if one.name in left}
            for kind in (Selection, Recipe)
        )
        return cls(
            recipe=Recipe(schemes=tuple(schemes), **recipe),
            preparing={"selection": Selection(**chosen), **left},
            **running,
        )

    @property
    def overwrite(self) -> bool:
        """Whether an existing output is replaced."""
        return bool(self.preparing.get("overwrite", False))
