"""What the user wants computed: schemes, dtypes, and what becomes of integer buffers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from ckptavg.errors import UsageError
from ckptavg.schemes import Scheme

Accumulate = Literal["auto", "float32", "float64"]
OutputDType = Literal["same", "float64", "float32", "bfloat16", "float16"]
Buffers = Literal["last", "first", "refuse"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What to compute from checkpoints in a given order.

    Attributes:
        schemes: One an output, but for those that make several.
        accumulate: dtype of the sums. ``auto`` is float64 for float32 and float64 inputs, float32
            for 16-bit ones.
        dtype: dtype of averaged tensors in the output; ``same`` keeps the inputs'.
        buffers: Which checkpoint of an average gives integer and bool tensors that differ between
            its checkpoints; ``refuse`` makes that an error. Equal ones are copied.
        allow_nonfinite: Keep infinities and NaN as IEEE 754 arithmetic gives them.
        adapter_rank: Rank of averaged LoRA adapters; None is the exact mean of their products,
            whose rank is the sum of theirs.
        adapter_factors: Average the parameters of adapters as they are instead, and measure how
            far the product of mean factors is from the mean product.

    Raises:
        UsageError: If a value is not among those named here.
    """

    schemes: tuple[Scheme, ...] = (Scheme(),)
    accumulate: Accumulate = "auto"
    dtype: OutputDType = "same"
    buffers: Buffers = "last"
    allow_nonfinite: bool = False
    adapter_rank: int | None = None
    adapter_factors: bool = False

    def reordered(self, order: Sequence[int]) -> "Recipe":
        """Return the recipe for checkpoints in another order: new[i] was old[order[i]].

        Raises:
            UsageError: If a scheme has values for more checkpoints, or for fewer.
        """
        return replace(self, schemes=tuple(scheme.reordered(order) for scheme in self.schemes))

    def __post_init__(self) -> None:
        if not self.schemes:
            raise UsageError("no scheme says what to average")
        for name, value, allowed in (
            ("accumulate", self.accumulate, get_args(Accumulate)),
            ("dtype", self.dtype, get_args(OutputDType)),
            ("buffers", self.buffers, get_args(Buffers)),
        ):
            if value not in allowed:
                raise UsageError(f"{name}: '{value}' is not one of {', '.join(allowed)}")
        if self.adapter_rank is not None and self.adapter_factors:
            raise UsageError("adapter_rank is for products, adapter_factors for factors: pass one")
        if self.adapter_rank is not None and (
            type(self.adapter_rank) is not int or self.adapter_rank < 1
        ):
            raise UsageError(f"adapter_rank is {self.adapter_rank}, expected at least 1")
