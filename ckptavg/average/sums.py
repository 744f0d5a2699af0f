"""In which dtype values are summed, and what that promises; the same on every device."""

from ckptavg.tensors import FLOAT32, FLOAT64, DType


def accumulate_dtype(dtype: DType, accumulate: str) -> DType:
    """Return the dtype in which inputs of a dtype are summed.

    float32 sums of 16-bit values, divided once, are correctly rounded wherever the sum is exact;
    float32 inputs need float64 sums for that. float64 inputs are never summed in less.
    """
    if dtype is FLOAT64:
        return FLOAT64
    if accumulate == "auto":
        return FLOAT64 if dtype is FLOAT32 else FLOAT32
    return FLOAT64 if accumulate == "float64" else FLOAT32


def keeps_equal_by_rounding(dtype: DType, accumulate: DType) -> bool:
    """Tell whether the mean of equal values is that value without further care.

    It is where the sum has more bits than the values. Elsewhere the equal ones are put back.
    """
    return accumulate.bits > dtype.bits
