"""Models of timm, torchvision and transformers by name, built from code and config alone.

No weights are downloaded, and no code that lies beside a checkpoint is run.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptavg.errors import ModelError

if TYPE_CHECKING:  # importing torch takes longer than averaging most models
    from torch import nn

LIBRARIES = ("timm", "torchvision", "transformers")


@dataclass(frozen=True)
class ModelFromConfig:
    """A model of a library, by name.

    Attributes:
        library: One of ``LIBRARIES``.
        name: What the library calls it: ``resnet50``; a class for transformers, such as
            ``AutoModelForImageClassification``.
        arguments: For the function or class that builds it, such as ``num_classes``; transformers
            take ``config``, the directory of a ``config.json``, by default that of the checkpoint.

    Raises:
        ModelError: If the library is none of them.
    """

    library: str
    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.library not in LIBRARIES:
            raise ModelError(f"'{self.library}' is not one of {', '.join(LIBRARIES)}")

    def build(self, directory: str | None) -> nn.Module:
        """Build the model with random weights.

        Args:
            directory: The model directory of a checkpoint, where there is one.

        Raises:
            ModelError: If the library is not installed, or there is no config.
            Exception: Whatever the library raises.
        """
        for key in ("pretrained", "weights", "weights_backbone"):
            if self.arguments.get(key):
                raise ModelError(
                    f"{self.library}:{self.name}: no weights are downloaded; leave out '{key}'"
                )
        if ":" in self.name:
            raise ModelError(f"{self.library}:{self.name}: nothing is fetched from the Hub")
        try:
            library = importlib.import_module(self.library)
        except ImportError as error:
            raise ModelError(
                f"{self.library}:{self.name}: {self.library} cannot be imported ({error}); "
                f"pip install {self.library}"
            ) from error
        arguments = dict(self.arguments)
        model: nn.Module
        if self.library == "timm":
            model = library.create_model(self.name, **{"pretrained": False, **arguments})
        elif self.library == "torchvision":
            builder = library.models.get_model_builder(self.name)
            parameters = inspect.signature(builder).parameters
            no_weights = {key: None for key in ("weights", "weights_backbone") if key in parameters}
            model = builder(**{**no_weights, **arguments})
        else:
            model = self._build_transformers(library, arguments, directory)
        return model

    def _build_transformers(
        self, library: Any, arguments: dict[str, Any], directory: str | None
    ) -> nn.Module:
        source = arguments.pop("config", directory)
        if source is None:
            raise ModelError(
                f"transformers:{self.name}: a single file has no config.json beside it; say where "
                "one is (--model-arg config=DIR)"
            )
        if not Path(source).is_dir():
            raise ModelError(f"transformers:{self.name}: {source} is no directory")
        import torch

        config, unknown = library.AutoConfig.from_pretrained(
            source, local_files_only=True, trust_remote_code=False,
            return_unused_kwargs=True, **arguments,
        )  # fmt: skip
        if unknown:
            raise ModelError(f"transformers:{self.name}: its config has no '{next(iter(unknown))}'")
        if getattr(config, "dtype", None) is not None and "dtype" not in arguments:
            config.dtype = torch.float32  # statistics of the weights, not of rounded ones
        kind = getattr(library, self.name)
        model: nn.Module = (
            kind.from_config(config, trust_remote_code=False)
            if hasattr(kind, "from_config")
            else kind(config)
        )
        return model


def model_from(name: str, **arguments: Any) -> ModelFromConfig:
    """Name a model as the command line does: ``timm:resnet50``, ``torchvision:resnet18``, ...

    Raises:
        ModelError: If it is not of that form.
    """
    library, colon, model_name = name.partition(":")
    if not colon or not model_name:
        raise ModelError(f"'{name}' is not of the form timm:resnet50")
    return ModelFromConfig(library, model_name, arguments)
