"""Is this one trajectory, and is averaging going to work? Told from the weights alone."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ckptavg.average import (
    DEFAULT_MEMORY_BUDGET_BYTES,
    Job,
    average,
    choose_device,
)
from ckptavg.blocks import Action
from ckptavg.checkpoint import widen_dtypes
from ckptavg.errors import UsageError, told_storage_errors
from ckptavg.evidence_files import (
    check_evidence_destination,
    data_files,
    evidence,
    publish_evidence,
)
from ckptavg.geometry import (
    Geometry,
    GramTable,
    LayerDrift,
    Matrix,
    TrajectoryPoint,
    TrajectoryResult,
    Verdict,
    judge,
)
from ckptavg.memory import peak_device_bytes, peak_host_bytes
from ckptavg.opening import Opened, opened_in_order, telling_what_was_fetched
from ckptavg.plan import AveragePlan, gram_table, plan_comparison
from ckptavg.prepare import workspace_for
from ckptavg.results import Progress
from ckptavg.selection import Selection
from ckptavg.sources import Source
from ckptavg.steps import stage_of

MOST_COMPONENTS = 10  # principal components whose coordinates are told


@told_storage_errors()
def trajectory(
    sources: Source | Sequence[Source],
    output: str | Path | None = None,
    *,
    selection: Selection | None = None,
    state_key: str | None = None,
    strip_prefixes: Sequence[str] = (),
    keep_prefix: bool = False,
    device: str = "auto",
    memory_budget_bytes: int = DEFAULT_MEMORY_BUDGET_BYTES,
    n_threads: int | None = None,
    cache: bool = False,
    plot: bool = True,
    overwrite: bool = False,
    progress: Progress | None = None,
    command: str | None = None,
) -> TrajectoryResult:
    """Compare the weights of checkpoints with each other, from one pass over them.

    Needs no model and no data. What comes out tells whether the checkpoints belong to one run,
    whether they lie around a centre or move on, and how many independent ones they are worth; only
    an evaluation tells how good their average is.

    Args:
        sources: As in ``average_checkpoints``.
        output: Directory for ``trajectory.json`` and ``.csv``, and pictures; None writes none.
        selection: Which of the sources are taken; None takes all.
        state_key: As in ``average_checkpoints``, like all up to ``cache``.
        strip_prefixes: Likewise.
        keep_prefix: Likewise.
        device: Likewise.
        memory_budget_bytes: Likewise.
        n_threads: Likewise.
        cache: Likewise.
        plot: Draw ``trajectory.png`` and ``.svg``, too, which needs the extra ``plots``.
        overwrite: Replace a directory that this wrote before.
        progress: As in ``average_checkpoints``; the stage is ``compare``, in bytes.
        command: What to record as the command; tokens are blanked out.

    Raises:
        UsageError: If there are fewer than two checkpoints.
        CkptavgError: As ``average_checkpoints`` does.
    """
    if output is not None:
        check_evidence_destination(Path(output), overwrite=overwrite, kind="trajectory")
        if plot:
            from ckptavg.plots import require_matplotlib

            require_matplotlib("--no-plot")
    with opened_in_order(
        sources,
        selection=selection,
        state_key=state_key,
        strip_prefixes=strip_prefixes,
        keep_prefix=keep_prefix,
        n_threads=n_threads,
        cache=cache,
    ) as opened:
        if len(opened.checkpoints) == 1:
            label = opened.checkpoints[0].label
            raise UsageError(f"{label}: is one checkpoint, expected at least two to compare")
        compared = compare(
            opened,
            device=device,
            memory_budget_bytes=memory_budget_bytes,
            n_threads=n_threads,
            progress=progress,
        )
    result = compared.result()
    if output is None:
        return result
    files = _files(result, command=command, plot=plot)
    publish_evidence(Path(output), files, overwrite=overwrite)
    return replace(result, output=Path(output), files=tuple(files))


@dataclass(frozen=True, kw_only=True)
class Compared:
    """The inner products of checkpoints, and how they were come by."""

    plan: AveragePlan
    table: GramTable
    device: str
    seconds: float

    @property
    def labels(self) -> list[str]:
        """What those that were compared are called, oldest first."""
        return [self.plan.labels[index] for index in self.table.members]

    @cached_property
    def geometry(self) -> Geometry:
        """Of all weights."""
        return self._of(range(len(self.table.groups)))

    @property
    def matrices(self) -> Geometry | None:
        """Of weights with two dimensions or more; None if there are none."""
        numbers = [at for at, group in enumerate(self.table.groups) if group.is_matrix]
        matrices = self._of(numbers)
        return matrices if matrices.products.any() else None

    def _of(self, groups: Sequence[int]) -> Geometry:
        return Geometry(self._products[list(groups)].sum(axis=0))

    @cached_property
    def _products(self) -> Matrix:
        """What the table makes of its sums, which are complete."""
        return self.table.products

    @cached_property
    def times(self) -> list[float]:
        """When the checkpoints were saved: steps or epochs where all tell them, else numbers."""
        members = self.table.members
        for times in (self.plan.steps, self.plan.epochs):
            known = [time for index in members if (time := times[index]) is not None]
            if len(set(known)) == len(members):
                return [float(time) for time in known]
        return [float(number) for number in range(len(members))]

    @cached_property
    def verdict(self) -> Verdict:
        """What they are to each other."""
        return judge(self.geometry, self.matrices, self.labels, self.times)

    def result(self) -> TrajectoryResult:
        """Return all of it as values."""
        plan, geometry, verdict = self.plan, self.geometry, self.verdict
        labels, distances = self.labels, geometry.distances
        indices = self.table.members
        n_points = geometry.n_points
        coordinates = geometry.coordinates(min(MOST_COMPONENTS, n_points - 1))
        nearest = (distances + np.diag(np.full(n_points, np.inf))).min(axis=1)
        cosines, taken_back = geometry.step_cosines(), geometry.taken_back()
        return TrajectoryResult(
            kind=verdict.kind,
            summary=verdict.sentences,
            checkpoints=tuple(
                TrajectoryPoint(
                    source=labels[at],
                    step=plan.steps[indices[at]],
                    epoch=plan.epochs[indices[at]],
                    norm=float(geometry.norms[at]),
                    deviation=float(geometry.deviations[at]),
                    step_length=float(distances[at - 1, at]) if at else None,
                    nearest=float(nearest[at]),
                    coordinates=tuple(map(float, coordinates[at])),
                )
                for at in range(n_points)
            ),
            n_elements=int(self.table.n_elements.sum()),
            mean_norm=geometry.mean_norm,
            norm_ratio=geometry.norm_ratio,
            spread=geometry.spread,
            effective_count=geometry.effective_count(self.times),
            taken_back=None if taken_back is None else taken_back[0],
            taken_back_lag=None if taken_back is None else taken_back[1],
            drift_share=geometry.drift_share(self.times),
            step_cosine=float(cosines.mean()) if len(cosines) else None,
            explained=tuple(map(float, geometry.explained)),
            runs=tuple(tuple(labels[at] for at in run) for run in verdict.runs),
            outliers=tuple(labels[at] for at in verdict.outliers),
            duplicates=tuple((labels[one], labels[other]) for one, other in verdict.duplicates),
            gram=_rows(geometry.gram),
            distances=_rows(distances),
            cosines=_rows(geometry.cosines),
            layers=tuple(self._layers()),
            device=self.device,
            seconds=self.seconds,
            read_nbytes=_read_nbytes(plan),
            peak_host_bytes=peak_host_bytes(),
            peak_device_bytes=None if self.device == "cpu" else peak_device_bytes(self.device),
            notes=plan.notes,
        )

    def _layers(self) -> list[LayerDrift]:
        total = float(np.trace(self.geometry.gram))
        members: dict[str, list[int]] = {}
        for number, group in enumerate(self.table.groups):
            members.setdefault(group.name, []).append(number)
        layers = []
        for name, numbers in members.items():
            layer = self._of(numbers)
            taken_back = layer.taken_back()
            layers.append(
                LayerDrift(
                    name=name,
                    n_elements=int(self.table.n_elements[numbers].sum()),
                    norm=layer.mean_norm,
                    spread=layer.spread,
                    moved=float(layer.distances[0, -1]),
                    drift_share=layer.drift_share(self.times),
                    taken_back=None if taken_back is None else taken_back[0],
                    variance_share=float(np.trace(layer.gram)) / total if total else 0.0,
                    gram=_rows(layer.gram),
                )
            )
        return layers


def compare(
    opened: Opened,
    *,
    device: str,
    memory_budget_bytes: int,
    n_threads: int | None,
    progress: Progress | None,
) -> Compared:
    """Compute the inner products of checkpoints that are open.

    Raises:
        CkptavgError: As ``average_checkpoints`` does.
    """
    with telling_what_was_fetched(opened.hub):
        checkpoints, widening_notes = widen_dtypes(opened.checkpoints)
        plan = plan_comparison(checkpoints, notes=[*opened.notes, *widening_notes])
    chosen = choose_device(device, read_nbytes=_read_nbytes(plan), runs_model=False)
    workspace = workspace_for(
        plan,
        chosen,
        opened.hub,
        memory_budget_bytes=memory_budget_bytes,
        n_threads=n_threads,
        local_size=1,
    )
    table = gram_table(plan)
    report = stage_of(progress, "compare", _read_nbytes(plan))
    started = time.perf_counter()
    average(
        Job(
            plan=plan,
            checkpoints=checkpoints,
            sinks=(),
            blocks=_compared_blocks(plan),
            finished=lambda block, differing: None,
            progress=report,
            gram=table,
        ),
        workspace,
    )
    for checkpoint in checkpoints:
        checkpoint.check_unchanged()
        checkpoint.verify()
    if table is None:
        raise AssertionError("a comparison has a table")
    return Compared(plan=plan, table=table, device=chosen, seconds=time.perf_counter() - started)


def compared_along(
    table: GramTable | None, plan: AveragePlan, device: str, seconds: float
) -> Compared | None:
    """Return what was compared while an average was made; None if nothing was."""
    if table is None or not table.n_elements.any():
        return None
    return Compared(plan=plan, table=table, device=device, seconds=seconds)


def trajectory_notes(compared: Compared | None, before: Sequence[int]) -> list[str]:
    """Return what a comparison along an average says.

    Args:
        compared: From ``compared_along``.
        before: Blocks that an interrupted run had averaged: they are not read again.
    """
    if compared is None:
        return []
    verdict, plan = compared.verdict, compared.plan
    notes = [f"trajectory ({verdict.kind}): {sentence}" for sentence in verdict.sentences]
    left_out = sum(plan.blocks[block].numel for block in before)
    if left_out:
        notes.append(
            f"trajectory: of the weights that were left to read; {left_out} values were averaged "
            "before the interruption"
        )
    derived = len(plan.with_action(Action.DERIVE))
    if derived:
        notes.append(
            f"trajectory: without {derived} tensors that are computed in groups; 'ckptavg "
            "trajectory' compares what they are stored by"
        )
    return notes


def _compared_blocks(plan: AveragePlan) -> list[int]:
    return [block.block for block in plan.blocks if block.action is Action.AVERAGE]


def _read_nbytes(plan: AveragePlan) -> int:
    return plan.read_nbytes_of(_compared_blocks(plan))


def _rows(matrix: np.ndarray[Any, Any]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(map(float, row)) for row in matrix)


def _files(result: TrajectoryResult, *, command: str | None, plot: bool) -> dict[str, bytes]:
    """Return name and content of the files that hold a result."""
    details = asdict(result)
    for name in ("summary", "notes", "output", "files", "seconds", "device"):
        details.pop(name)
    details.pop("peak_host_bytes")
    details.pop("peak_device_bytes")
    content = evidence(
        "trajectory",
        f"{len(result.checkpoints)} checkpoints compared",
        result.summary,
        result.notes,
        {"verdict": details.pop("kind"), **details},
        command=command,
    )
    n_components = len(result.checkpoints[0].coordinates)
    header = [
        "source", "step", "epoch", "norm", "deviation", "step_length", "nearest",
        *(f"pc{number}" for number in range(1, n_components + 1)),
        *(f"distance {point.source}" for point in result.checkpoints),
    ]  # fmt: skip
    table: list[Sequence[object]] = [header]
    for point, distances in zip(result.checkpoints, result.distances, strict=True):
        values: Mapping[str, object] = asdict(point)
        table.append(
            [
                *("" if values[name] is None else values[name] for name in header[:7]),
                *point.coordinates,
                *distances,
            ]
        )
    files = data_files("trajectory", content, table)
    if plot:
        from ckptavg.plots import trajectory_pictures

        files |= trajectory_pictures(result)
    return files
