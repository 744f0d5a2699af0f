"""Greedy soup: checkpoints are added, best first, as long as the mean does not get worse."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Unpack

from ckptavg._version import __version__
from ckptavg.average.work import Timings
from ckptavg.average_options import AverageOptions, Request
from ckptavg.blocks import Differing
from ckptavg.errors import UsageError, told_storage_errors
from ckptavg.evaluation_log import judge_text
from ckptavg.live_model import check_repeatable
from ckptavg.metrics import Judge, Mode
from ckptavg.output import OutputDirectory
from ckptavg.prepare import Prepared
from ckptavg.processes import Processes, check_alone
from ckptavg.provenance import weight_file_metadata
from ckptavg.results import BnPass, SoupResult
from ckptavg.schemes import Scheme
from ckptavg.scratch import Scratch
from ckptavg.search.checks import check_search
from ckptavg.search.evidence import soup_files
from ckptavg.search.kitchen import Kitchen, copy_taken, plan_of
from ckptavg.search.pot import Pot
from ckptavg.side_files import find_side_files, inherited_front_matter
from ckptavg.sources import Source
from ckptavg.steps import (
    Averaged,
    Clock,
    average_together,
    complete_all,
    enter_together,
    evaluate_by_command,
    finish,
    outcome_notes,
    prepare_together,
    recompute_statistics,
    result_of,
)
from ckptavg.tensors import FLOAT64


@told_storage_errors()
def greedy_soup(
    sources: Source | Sequence[Source],
    output: str | Path,
    *,
    evaluation: BnPass,
    metric: str | None = None,
    mode: Mode | None = None,
    plot: bool = False,
    **options: Unpack[AverageOptions],
) -> SoupResult:
    """Average the checkpoints that help each other, by the user's metric.

    Every checkpoint is judged by itself. From the best on (of equals the newer one), each is added
    to the mean of those accepted before, and stays if the metric does not get worse (Wortsman et
    al. 2022, "Model soups", Recipe 1: greedy soup). Every mean, and every single one, gets a
    BatchNorm pass of its own where ``evaluation`` has batches. The result is never worse by the
    metric than the best single checkpoint; by another metric, or on other data, it may be.

    The weights of each checkpoint are read twice at most: to judge it, and to add it to a running
    sum, which lies beside the output (8 bytes a weight, twice); float64 ones of those accepted once
    more, since the order of summation shows in their bits. A soup that was interrupted, or failed,
    is continued by the same call, and nothing is judged again, if what judges can be imported by
    name.

    Args:
        sources: As in ``average_checkpoints``.
        output: The model directory to make, with ``soup.json`` and ``soup.csv`` in it.
        evaluation: The metric, the model, and data for the BatchNorm passes.
        metric: Name of the metric that decides; None where there is only one.
        mode: ``min`` or ``max``; None goes by the metric's name.
        plot: Add ``soup.png``, which needs the extra ``plots``.
        options: As in ``average_checkpoints``; sums are float64 always, and one process does all.

    Raises:
        UsageError: If nothing judges, the metric is not clear, there is but one checkpoint, or they
            have tensors that are averaged together (LoRA adapters, normed layers).
        ModelError: If the evaluation fails.
        CkptavgError: As ``average_checkpoints`` does.
    """
    started = time.perf_counter()
    output = Path(output)
    evaluation = check_soup(evaluation, distributed=options.get("distributed", False), plot=plot)
    request = Request.of((Scheme(),), options, metric=metric, mode=mode)
    processes, judge = Processes(), Judge(metric, mode)
    with ExitStack() as stack:
        prepared = prepare_together(
            processes, stack, sources, output, request.recipe,
            batchnorm=evaluation, **request.preparing,
        )  # fmt: skip
        refuse_soup(prepared, evaluation)
        if request.planned is not None:
            request.planned(prepared.plan)
        named = judge_text(evaluation)
        identity = named and repr((prepared.plan.fingerprint, named, metric, mode))
        scratch = stack.enter_context(Scratch(output, "soup", identity))
        pot = Pot(scratch.path, prepared, scratch.failed)
        stack.callback(pot.close)
        kitchen = Kitchen(prepared, evaluation, judge, scratch, request.progress, pot)
        averaging = time.perf_counter()
        kitchen.cook()
        final = _served(prepared, kitchen.accepted)
        directory = OutputDirectory(
            output,
            final.plan,
            metadata=[weight_file_metadata(final.plan, final.plan.outputs[0], __version__)],
            overwrite=request.overwrite,
            hash_along=False,
        )
        enter_together(processes, stack, directory)
        if any(dtype is FLOAT64 for dtype, _ in final.plan.arithmetic_dtypes):
            # the order of the sum shows in its bits: the one that the recipe has is made anew
            averaged = average_together(processes, final, directory, (), request.progress)
        else:
            averaged = _pour(final, directory, pot)
        average_seconds = time.perf_counter() - averaging
        outcomes = recompute_statistics(processes, final, directory, evaluation, request.progress)
        complete_all(final, directory)
        outcomes = evaluate_by_command(processes, evaluation, directory, outcomes)
        steps = kitchen.steps()
        outcomes = [
            None if one is None else replace(one, comparison=kitchen.comparison())
            for one in outcomes
        ]
        notes = list(dict.fromkeys([
            *final.plan.notes, *final.notes, *directory.notes, *scratch.notes,
            *kitchen.doubts(outcomes[0]),
            *outcome_notes(outcomes),
        ]))  # fmt: skip
        files = soup_files(judge, prepared.plan, steps, command=request.command, plot=plot)
        publishing = time.perf_counter()
        finish(final, directory, averaged, notes, outcomes, request.command, files)
        publish_seconds = time.perf_counter() - publishing
    result = result_of(
        processes, final, averaged, outcomes, output,
        before=(),
        clock=Clock(
            started=started, average_seconds=average_seconds, publish_seconds=publish_seconds
        ),
        notes=notes,
    )  # fmt: skip
    metric, mode = judge.settled
    return SoupResult(
        metric=metric,
        mode=mode,
        steps=steps,
        result=replace(result, read_nbytes=kitchen.read_nbytes),
        files=tuple(files),
    )


def check_soup(evaluation: BnPass | None, *, plot: bool, distributed: bool = False) -> BnPass:
    """Refuse what cannot become a soup; return the evaluation.

    Raises:
        UsageError: If nothing judges, or what is wanted cannot be had.
    """
    evaluation = check_search("a soup", evaluation, plot=plot)
    check_alone("a soup", distributed=distributed)
    return evaluation


def refuse_soup(prepared: Prepared, evaluation: BnPass) -> None:
    """Refuse checkpoints that cannot become a soup.

    Raises:
        UsageError: If so.
    """
    plan = prepared.plan
    if plan.recipe.accumulate == "float32":
        raise UsageError("a soup is summed in float64: leave accumulate out")
    if plan.n_checkpoints < 2:
        raise UsageError("a soup needs at least 2 checkpoints")
    if plan.derived.groups:
        group = plan.derived.groups[0]
        raise UsageError(
            f"'{group.module}' ({group.kind}) is averaged from several tensors together, which a "
            "running sum cannot do: use sweep"
        )
    if evaluation.batches is not None:
        check_repeatable(evaluation, 2 * plan.n_checkpoints)


def _served(prepared: Prepared, accepted: Sequence[int]) -> Prepared:
    """Return what is prepared for the mean of those that were accepted."""
    plan = plan_of(prepared, sorted(accepted))
    checkpoint = prepared.checkpoints[max(accepted)]
    files, _ = find_side_files(checkpoint, include_code=prepared.asked.include_code)
    return replace(
        prepared,
        plan=plan,
        side_files=[files],
        inherited_cards=[inherited_front_matter(checkpoint.folder)],
        workspace=replace(prepared.workspace, device="cpu"),  # sums are added there
    )


def _pour(final: Prepared, directory: OutputDirectory, pot: Pot) -> Averaged:
    """Write the soup, and see that nothing changed while it was made."""
    plan = final.plan
    pot.pour(directory.models[0], lambda block: directory.finish_block(block, set()))
    found: Differing = set()
    for block, differing in copy_taken(plan, final, directory.models).items():
        directory.finish_block(block, differing)
        found |= differing
    for checkpoint in final.checkpoints:
        checkpoint.check_unchanged()
    for index in plan.used_checkpoints:
        final.checkpoints[index].verify()
    names = {name for _, name in found}
    return Averaged(
        differing=[[tensor.name for tensor in plan.tensors if tensor.name in names]],
        adapters=[None],
        timings=Timings(),
    )
