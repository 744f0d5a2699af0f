"""Pictures of what was measured; the only package that knows matplotlib (extra ``plots``)."""

from ckptavg.plots.ensembles import ensemble_plot
from ckptavg.plots.landscapes import path_pictures, plane_pictures, width_pictures
from ckptavg.plots.searches import soup_plot, sweep_plot, tune_plot
from ckptavg.plots.style import require_matplotlib
from ckptavg.plots.trajectories import trajectory_pictures

__all__ = [
    "ensemble_plot",
    "path_pictures",
    "plane_pictures",
    "require_matplotlib",
    "soup_plot",
    "sweep_plot",
    "trajectory_pictures",
    "tune_plot",
    "width_pictures",
]
