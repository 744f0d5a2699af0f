"""Pictures of what was measured; the only package that knows matplotlib (extra ``plots``)."""

from ckptavg.plots.searches import soup_plot, sweep_plot, tune_plot
from ckptavg.plots.style import require_matplotlib

__all__ = ["require_matplotlib", "soup_plot", "sweep_plot", "tune_plot"]
