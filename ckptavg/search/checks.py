"""What every search asks for before it begins."""

from ckptavg.errors import UsageError
from ckptavg.results import BnPass


def check_search(what: str, evaluation: BnPass | None, *, plot: bool) -> BnPass:
    """Refuse what no search can do; return the evaluation.

    Args:
        what: What the search is called, such as ``a sweep``.
        evaluation: Who judges.
        plot: Whether a picture is wanted.

    Raises:
        UsageError: If nothing judges, or what is wanted cannot be had.
    """
    if evaluation is None or evaluation.evaluate is None:
        raise UsageError(f"{what} needs a metric: evaluate (--eval or --eval-command)")
    if evaluation.compare:
        raise UsageError(f"{what} makes a comparison of its own: leave compare out")
    if plot:
        from ckptavg.plots import require_matplotlib

        require_matplotlib()
    return evaluation
