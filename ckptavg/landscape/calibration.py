"""How good probabilities are: accuracy, likelihood, and whether they mean what they say."""

import torch
from torch import Tensor

from ckptavg.ensemble_results import ReliabilityBin, Scores

N_BINS = 15  # Guo et al. 2017

# what is summed in each bin
_COUNT, _CONFIDENCE, _RIGHT = range(3)


class ProbabilityScores:
    """Sums over the predictions of one model, or of several together, batch by batch.

    Sums are float64 and stay where the probabilities are until they are asked for.
    """

    def __init__(self, device: torch.device) -> None:
        """Begin with nothing."""
        self._bins = torch.zeros(N_BINS, 3, dtype=torch.float64, device=device)
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        inner = torch.arange(1, N_BINS, dtype=torch.float64, device=device) / N_BINS
        self._edges = inner
        self._numbers = torch.arange(N_BINS, device=device)

    def add(self, probabilities: Tensor, loss: Tensor, labels: Tensor) -> Tensor:
        """Count predictions.

        Args:
            probabilities: (n, C), float64.
            loss: Negative log-likelihood of each label, (n), float64.
            labels: (n), int64.

        Returns:
            The most probable class of each, (n), int64.
        """
        confidence, guesses = probabilities.max(dim=1)
        bins = torch.bucketize(confidence, self._edges)  # bin m holds ((m - 1) / M, m / M]
        is_in = (bins == self._numbers[:, None]).to(torch.float64)  # (bins, n)
        right = (guesses == labels).to(torch.float64)
        self._bins += is_in @ torch.stack([torch.ones_like(right), confidence, right], dim=1)
        self._loss += loss.sum()
        return guesses

    def scores(self) -> Scores:
        """Return what was found; waits for a GPU.

        The calibration error is that of Guo et al. 2017, equation 3: the sum over bins of
        |B| / n |acc(B) - conf(B)|.
        """
        bins = self._bins.cpu()
        n_labels = float(bins[:, _COUNT].sum())
        n_right = float(bins[:, _RIGHT].sum())
        gaps = (bins[:, _RIGHT] - bins[:, _CONFIDENCE]).abs()
        return Scores(
            accuracy=100 * n_right / n_labels,
            error=100 * (n_labels - n_right) / n_labels,
            nll=float(self._loss) / n_labels,
            ece=100 * float(gaps.sum()) / n_labels,
        )

    def reliability(self) -> tuple[ReliabilityBin, ...]:
        """Return accuracy and confidence by bin; waits for a GPU."""
        return tuple(
            ReliabilityBin(
                low=number / N_BINS,
                high=(number + 1) / N_BINS,
                count=int(count),
                confidence=100 * confidence / count if count else None,
                accuracy=100 * right / count if count else None,
            )
            for number, (count, confidence, right) in enumerate(self._bins.tolist())
        )
