"""Where checkpoints lie in the space of weights: Gram matrices, and what follows from them."""

from ckptavg.geometry.geometry import Geometry
from ckptavg.geometry.results import LayerDrift, TrajectoryPoint, TrajectoryResult
from ckptavg.geometry.table import GramTable, LayerGroup, Matrix
from ckptavg.geometry.verdict import Verdict, judge

__all__ = [
    "Geometry",
    "GramTable",
    "LayerDrift",
    "LayerGroup",
    "Matrix",
    "TrajectoryPoint",
    "TrajectoryResult",
    "Verdict",
    "judge",
]
