"""What to average: ``uniform:last=5``, ``ema:decay=0.9`` and all others, typed or in Python.

``kinds`` is the one list of schemes, from which parsing, messages and explanations come; ``scheme``
the value that is typed; ``windows`` which checkpoints it looks at; the others are formulas.
"""

from ckptavg.schemes.kinds import SchemeKind, list_schemes
from ckptavg.schemes.scheme import (
    Scheme,
    coefficient_rows,
    output_names,
    parse_coefficients,
    parse_scheme,
    parse_schemes,
    shortened,
)
from ckptavg.schemes.windows import Positions

__all__ = [
    "Positions",
    "Scheme",
    "SchemeKind",
    "coefficient_rows",
    "list_schemes",
    "output_names",
    "parse_coefficients",
    "parse_scheme",
    "parse_schemes",
    "shortened",
]
