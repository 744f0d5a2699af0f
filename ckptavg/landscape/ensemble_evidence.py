"""What an ensemble and its weight average say: in words, and as files."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from ckptavg.ensemble_results import EnsembleResult, LoaderComparison
from ckptavg.evidence_files import data_files, evidence

_HEADER = (
    "loader", "what", "n", "checkpoint", "accuracy_percent", "error_percent", "nll_nats",
    "ece_percent", "agreement_percent", "probability_distance", "weight_distance",
)  # fmt: skip


def ensemble_files(result: EnsembleResult, *, command: str | None, plot: bool) -> dict[str, bytes]:
    """Return name and content of the files that hold a comparison.

    Args:
        result: What was found.
        command: What made it.
        plot: Whether there are pictures, which need the extra ``plots``.
    """
    content = evidence(
        "ensemble",
        f"Ensemble of {len(result.members)} checkpoints against their weight average",
        result.summary,
        result.notes,
        _details(result),
        command=command,
    )
    files = data_files("ensemble", content, [_HEADER, *_rows(result)])
    if plot:
        from ckptavg.plots import ensemble_plot

        files |= ensemble_plot(result)
    return files


def summary_of(found: LoaderComparison) -> list[str]:
    """Return what was found on one loader, one sentence each."""
    n_members, ensemble, average = len(found.members), found.ensembles[-1], found.averages[-1]
    single = found.mean_member
    near, far = found.distances[-1], sum(found.neighbour_distances) / (n_members - 1)
    sentences = [
        f"the average agrees with the ensemble of {n_members} on {found.agreements[-1]:.1f} % of "
        f"the {found.n_labels} labels of {found.name}; its NLL is {average.nll:.4g} nats, that of "
        f"the ensemble {ensemble.nll:.4g}",
        f"on {found.name} the average is right for {average.accuracy:.2f} %, the ensemble for "
        f"{ensemble.accuracy:.2f} %, a checkpoint by itself for {single.accuracy:.2f} % (the mean "
        "of all)",
        f"on {found.name} the probabilities of ensemble and average are {near:.3g} apart, those of "
        f"neighbouring checkpoints {far:.3g}"
        + (f": {far / near:.2g} times as far" if 0 < near < far else ""),
    ]
    if ensemble.ece != average.ece:
        better, worse = sorted((("average", average.ece), ("ensemble", ensemble.ece)), key=_second)
        sentences.append(
            f"on {found.name} the {better[0]} is better calibrated: its calibration error is "
            f"{better[1]:.2f} %, that of the {worse[0]} {worse[1]:.2f} %"
        )
    return sentences


def _second(pair: tuple[str, float]) -> float:
    return pair[1]


def _details(result: EnsembleResult) -> Mapping[str, Any]:
    """Return all numbers, in the form that JSON keeps."""
    told = asdict(result)
    for name in ("output", "summary", "notes", "files", "seconds"):
        del told[name]
    return told


def _rows(result: EnsembleResult) -> Iterator[list[object]]:
    """Yield one row for each loader, what predicted, and the number of members.

    The agreement of an average is that with the ensemble of as many, and the distance likewise;
    the agreement of a member is that with the average of all, its distance that to the member
    before.
    """
    for found in result.loaders:
        for at, scores in enumerate(found.members):
            member = result.members[at]
            yield [
                found.name, "member", at + 1, member.source, *_numbers(scores),
                found.member_agreements[at],
                found.neighbour_distances[at - 1] if at else "",
                member.weight_distance,
            ]  # fmt: skip
        for at, scores in enumerate(found.ensembles):
            yield [found.name, "ensemble", at + 1, "", *_numbers(scores), "", "", ""]
        for at, scores in enumerate(found.averages):
            yield [
                found.name, "average", at + 1, "", *_numbers(scores),
                found.agreements[at], found.distances[at], "",
            ]  # fmt: skip


def _numbers(scores: Any) -> list[float]:
    return [scores.accuracy, scores.error, scores.nll, scores.ece]
