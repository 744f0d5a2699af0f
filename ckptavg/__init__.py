"""ckptavg: turn the checkpoints a training run left behind into one better model.

Streams saved checkpoints, averages them tensor by tensor in bounded memory on CPU or GPU,
recomputes BatchNorm statistics over data, and writes a complete safetensors model directory.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ckptavg._version import __version__

if TYPE_CHECKING:
    from ckptavg.batchnorm import BnConvergence, BnLayerReport, BnReport, recompute_bn_stats
    from ckptavg.checkpoint import Checkpoint, open_checkpoint
    from ckptavg.comparing import trajectory
    from ckptavg.derived import AdapterReport
    from ckptavg.ensemble_results import EnsembleResult
    from ckptavg.errors import (
        AfterPublishError,
        BatchNormError,
        CheckpointError,
        CkptavgError,
        HubError,
        IncompatibleCheckpointsError,
        IncompleteCheckpointError,
        MemoryBudgetError,
        ModelError,
        OutputError,
        ProcessEndedError,
        ProcessError,
        ReportError,
        SourceError,
        StorageError,
        UsageError,
        VerificationError,
    )
    from ckptavg.eval_command import EvalCommand
    from ckptavg.geometry import LayerDrift, TrajectoryPoint, TrajectoryResult
    from ckptavg.labelled import LabelledEvaluation, Loader
    from ckptavg.landscape.ensemble import ensemble
    from ckptavg.landscape.path import path
    from ckptavg.landscape.plane import plane
    from ckptavg.landscape.width import width
    from ckptavg.landscape_results import Mark, PathResult, PlaneResult, Ray, Segment, WidthResult
    from ckptavg.model_zoo import ModelFromConfig, model_from
    from ckptavg.pipeline import (
        average_checkpoints,
        hub_revisions,
        inspect_checkpoint,
        inspect_run,
        push_model,
        recompute_bn,
    )
    from ckptavg.plan import AveragePlan, plan_average
    from ckptavg.recipe import Recipe
    from ckptavg.report import ReportResult, write_report
    from ckptavg.rerun import ReproducedFile, TensorDifference
    from ckptavg.results import (
        AverageResult,
        BnPass,
        CheckpointInfo,
        ComparisonRow,
        OutputResult,
        RunCheckpoint,
        RunInfo,
        SoupResult,
        SoupStep,
        StageTimes,
        SweepResult,
        SweepRow,
        Trial,
        TuneResult,
    )
    from ckptavg.schemes import Scheme, SchemeKind, list_schemes, parse_scheme, parse_schemes
    from ckptavg.search.soup import greedy_soup
    from ckptavg.search.sweep import sweep
    from ckptavg.search.tune import tune
    from ckptavg.selection import Selection
    from ckptavg.tensors import HubRevision, PushResult
    from ckptavg.verify import VerifiedFile, VerifiedSource, VerifyResult, verify_output

# where each public name lives; imported when it is first used (PEP 562)
_HOME = {
    "AdapterReport": "derived",
    "AfterPublishError": "errors",
    "AveragePlan": "plan",
    "AverageResult": "results",
    "BatchNormError": "errors",
    "BnConvergence": "batchnorm",
    "BnLayerReport": "batchnorm",
    "BnPass": "results",
    "BnReport": "batchnorm",
    "Checkpoint": "checkpoint",
    "CheckpointError": "errors",
    "CheckpointInfo": "results",
    "CkptavgError": "errors",
    "ComparisonRow": "results",
    "EnsembleResult": "ensemble_results",
    "EvalCommand": "eval_command",
    "HubError": "errors",
    "HubRevision": "tensors",
    "IncompatibleCheckpointsError": "errors",
    "IncompleteCheckpointError": "errors",
    "LabelledEvaluation": "labelled",
    "LayerDrift": "geometry",
    "Loader": "labelled",
    "Mark": "landscape_results",
    "MemoryBudgetError": "errors",
    "ModelError": "errors",
    "ModelFromConfig": "model_zoo",
    "OutputError": "errors",
    "OutputResult": "results",
    "PathResult": "landscape_results",
    "PlaneResult": "landscape_results",
    "ProcessEndedError": "errors",
    "ProcessError": "errors",
    "PushResult": "tensors",
    "Ray": "landscape_results",
    "Recipe": "recipe",
    "ReportError": "errors",
    "ReportResult": "report",
    "ReproducedFile": "rerun",
    "RunCheckpoint": "results",
    "RunInfo": "results",
    "Scheme": "schemes",
    "SchemeKind": "schemes",
    "Segment": "landscape_results",
    "Selection": "selection",
    "SoupResult": "results",
    "SoupStep": "results",
    "SourceError": "errors",
    "StageTimes": "results",
    "StorageError": "errors",
    "SweepResult": "results",
    "SweepRow": "results",
    "TensorDifference": "rerun",
    "TrajectoryPoint": "geometry",
    "TrajectoryResult": "geometry",
    "Trial": "results",
    "TuneResult": "results",
    "UsageError": "errors",
    "VerificationError": "errors",
    "VerifiedFile": "verify",
    "VerifiedSource": "verify",
    "VerifyResult": "verify",
    "WidthResult": "landscape_results",
    "average_checkpoints": "pipeline",
    "ensemble": "landscape.ensemble",
    "greedy_soup": "search.soup",
    "hub_revisions": "pipeline",
    "inspect_checkpoint": "pipeline",
    "inspect_run": "pipeline",
    "list_schemes": "schemes",
    "model_from": "model_zoo",
    "open_checkpoint": "checkpoint",
    "parse_scheme": "schemes",
    "parse_schemes": "schemes",
    "path": "landscape.path",
    "plan_average": "plan",
    "plane": "landscape.plane",
    "push_model": "pipeline",
    "recompute_bn": "pipeline",
    "recompute_bn_stats": "batchnorm",
    "sweep": "search.sweep",
    "trajectory": "comparing",
    "tune": "search.tune",
    "verify_output": "verify",
    "width": "landscape.width",
    "write_report": "report",
}

__all__ = [
    "AdapterReport",
    "AfterPublishError",
    "AveragePlan",
    "AverageResult",
    "BatchNormError",
    "BnConvergence",
    "BnLayerReport",
    "BnPass",
    "BnReport",
    "Checkpoint",
    "CheckpointError",
    "CheckpointInfo",
    "CkptavgError",
    "ComparisonRow",
    "EnsembleResult",
    "EvalCommand",
    "HubError",
    "HubRevision",
    "IncompatibleCheckpointsError",
    "IncompleteCheckpointError",
    "LabelledEvaluation",
    "LayerDrift",
    "Loader",
    "Mark",
    "MemoryBudgetError",
    "ModelError",
    "ModelFromConfig",
    "OutputError",
    "OutputResult",
    "PathResult",
    "PlaneResult",
    "ProcessEndedError",
    "ProcessError",
    "PushResult",
    "Ray",
    "Recipe",
    "ReportError",
    "ReportResult",
    "ReproducedFile",
    "RunCheckpoint",
    "RunInfo",
    "Scheme",
    "SchemeKind",
    "Segment",
    "Selection",
    "SoupResult",
    "SoupStep",
    "SourceError",
    "StageTimes",
    "StorageError",
    "SweepResult",
    "SweepRow",
    "TensorDifference",
    "TrajectoryPoint",
    "TrajectoryResult",
    "Trial",
    "TuneResult",
    "UsageError",
    "VerificationError",
    "VerifiedFile",
    "VerifiedSource",
    "VerifyResult",
    "WidthResult",
    "__version__",
    "average_checkpoints",
    "ensemble",
    "greedy_soup",
    "hub_revisions",
    "inspect_checkpoint",
    "inspect_run",
    "list_schemes",
    "model_from",
    "open_checkpoint",
    "parse_scheme",
    "parse_schemes",
    "path",
    "plan_average",
    "plane",
    "push_model",
    "recompute_bn",
    "recompute_bn_stats",
    "sweep",
    "trajectory",
    "tune",
    "verify_output",
    "width",
    "write_report",
]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'ckptavg' has no attribute '{name}'")
    return getattr(import_module(f"ckptavg.{home}"), name)


def __dir__() -> list[str]:
    return __all__
