"""What ``adapter_config.json`` says of an adapter, read strictly: the file may be anybody's."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

from ckptavg.checkpoint import ADAPTER_CONFIG_NAME, Checkpoint
from ckptavg.checkpoint.folder import read_json
from ckptavg.errors import CheckpointError

LORA = "LORA"
_BASE_PREFIX = "base_model.model."  # what PEFT puts before every name in a file
_MAX_RANK = 2**24
_MAX_ALPHA = 1e12
_MAX_PATTERNS = 10_000
_MAX_PATTERN_CHARACTERS = 1000
_MAX_MATCHING_STEPS = 10**8
# what may match in several ways: numbers of times, alternatives, repeated groups
_QUANTIFIER = re.compile(r"[*+{]")
_REPEATED_GROUP = re.compile(r"\)[*+{]")


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """The part of an adapter's config that matters for averaging.

    Attributes:
        label: What messages call the checkpoint.
        peft_type: ``LORA``, ``IA3``, ...; in capitals.
        rank, alpha: Those of all modules that no pattern names.
        use_rslora: Whether the scale is alpha / sqrt(rank) rather than alpha / rank.
        rank_pattern, alpha_pattern: Pattern for module names -> rank or alpha, in the order in
            which they are tried.
        content: The whole JSON object.
    """

    label: str
    peft_type: str
    rank: int
    alpha: int | float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, int | float]
    content: Mapping[str, Any]

    def rank_of(self, module: str) -> int:
        """Return the rank of a module; see ``pattern_key`` for its name."""
        key = pattern_key(self.rank_pattern, module)
        return self.rank if key is None else self.rank_pattern[key]

    def alpha_of(self, module: str) -> int | float:
        """Return the alpha of a module."""
        key = pattern_key(self.alpha_pattern, module)
        return self.alpha if key is None else self.alpha_pattern[key]

    def scale_of(self, module: str) -> float:
        """Return what the product B A is multiplied with.

        alpha / r (Hu et al. 2021, section 4.1), or alpha / sqrt(r) for rsLoRA (Kalajdzievski
        2023).
        """
        return scale(self.rank_of(module), self.alpha_of(module), use_rslora=self.use_rslora)


def scale(rank: int, alpha: int | float, *, use_rslora: bool) -> float:
    """Return alpha / r or alpha / sqrt(r), as PEFT computes it."""
    return alpha / math.sqrt(rank) if use_rslora else alpha / rank


def alpha_at_rank(alpha: int | float, old: int, new: int, *, use_rslora: bool) -> Fraction:
    """Return the alpha that gives at rank ``new`` the scale that ``alpha`` gives at rank ``old``.

    It is exact, but for square roots that are not rational.
    """
    ratio = Fraction(new, old)
    if use_rslora:
        roots = math.isqrt(ratio.numerator), math.isqrt(ratio.denominator)
        is_square = roots[0] ** 2 == ratio.numerator and roots[1] ** 2 == ratio.denominator
        ratio = Fraction(*roots) if is_square else Fraction(math.sqrt(ratio))
    return Fraction(alpha) * ratio


def pattern_key(patterns: Mapping[str, Any], module: str) -> str | None:
    r"""Return the first pattern that a module's name ends with, by PEFT's own rule.

    ``(.*\.)?(PATTERN)$`` must match the whole name in the base model (peft.utils.other,
    ``get_pattern_key``).
    """
    return _first_match(tuple(patterns), module)


@lru_cache(_MAX_PATTERNS)
def _first_match(patterns: tuple[str, ...], module: str) -> str | None:
    """Remember what was found: all checkpoints of a run have the same patterns."""
    return next((key for key in patterns if _compiled(key).match(module)), None)


@lru_cache(_MAX_PATTERNS)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")


def module_key(module: str) -> str:
    """Return the name that PEFT matches patterns against, of a module as files name it."""
    # layers that wrap another, as MultiheadAttention does its output projection, share its entry
    return module.removeprefix(_BASE_PREFIX).partition(".base_layer.")[0]


def read_adapter_config(checkpoint: Checkpoint) -> AdapterConfig:
    """Read and check the config of an adapter.

    Raises:
        CheckpointError: If it is not there, or not what PEFT writes.
    """
    label = f"{checkpoint.label}/{ADAPTER_CONFIG_NAME}"
    content = None if checkpoint.folder is None else read_json(
        checkpoint.folder, ADAPTER_CONFIG_NAME
    )  # fmt: skip
    if content is None:
        raise CheckpointError(f"{label}: is missing")
    peft_type = content.get("peft_type")
    if type(peft_type) is not str:
        raise CheckpointError(f"{label}: has no peft_type")
    is_lora = peft_type.upper() == LORA  # others use these keys for other things
    reader = _Reader(label, content if is_lora else {})
    longest = max(map(len, checkpoint.tensors), default=0)
    config = AdapterConfig(
        label=checkpoint.label,
        peft_type=peft_type.upper(),
        rank=reader.rank("r", content.get("r", 8) if is_lora else 8),
        alpha=reader.alpha("lora_alpha", content.get("lora_alpha", 8) if is_lora else 8),
        use_rslora=reader.flag("use_rslora"),
        rank_pattern=reader.patterns("rank_pattern", reader.rank, longest),
        alpha_pattern=reader.patterns("alpha_pattern", reader.alpha, longest),
        content=content,
    )
    reader.flag("use_dora")
    reader.flag("lora_bias")
    return config


class _Reader:
    """Takes values out of a JSON object, or says what is wrong with them."""

    def __init__(self, label: str, content: Mapping[str, Any]) -> None:
        self._label = label
        self._content = content

    def rank(self, key: str, value: Any) -> int:
        if type(value) is not int or not 1 <= value <= _MAX_RANK:
            raise self._refused(key, f"is no rank from 1 to {_MAX_RANK}")
        return value

    def alpha(self, key: str, value: Any) -> int | float:
        # compared as it is: a large integer has no float
        if type(value) not in (int, float) or not -_MAX_ALPHA <= value <= _MAX_ALPHA:
            raise self._refused(key, f"is no number up to {_MAX_ALPHA:g}")
        return value  # type: ignore[no-any-return]  # its type is checked

    def flag(self, key: str) -> bool:
        value = self._content.get(key)
        if value is not None and type(value) is not bool:
            raise self._refused(key, "is neither true nor false")
        return bool(value)

    def patterns(self, key: str, parse: Any, longest: int) -> dict[str, Any]:
        found = self._content.get(key)
        if found is None:
            return {}
        if type(found) is not dict or len(found) > _MAX_PATTERNS:
            raise self._refused(key, f"is not an object of at most {_MAX_PATTERNS} patterns")
        for pattern in found:
            if not is_tame(pattern, longest):
                raise self._refused(key, f"holds '{pattern[:100]}', too intricate a pattern")
            try:
                _compiled(pattern)
            except (re.error, OverflowError, RecursionError) as error:
                raise self._refused(key, f"holds '{pattern}', which is no pattern") from error
        return {pattern: parse(key, value) for pattern, value in found.items()}

    def _refused(self, key: str, what: str) -> CheckpointError:
        return CheckpointError(f"{self._label}: '{key}' {what}")


def is_tame(pattern: str, longest: int) -> bool:
    """Tell whether matching a pattern takes a bounded number of steps; regexes can take for ever.

    Args:
        pattern: A regular expression of unknown origin.
        longest: Characters of the longest name that it is matched against.
    """
    if len(pattern) > _MAX_PATTERN_CHARACTERS or _REPEATED_GROUP.search(pattern):
        return False
    if not _QUANTIFIER.search(pattern) and not set("|?(").intersection(pattern):
        return True  # a plain name
    n_quantifiers = len(_QUANTIFIER.findall(pattern)) + 1  # that which PEFT puts before it
    n_groups = pattern.count("(") + 1
    alternatives = ((pattern.count("|") + n_groups) / n_groups) ** n_groups
    steps = math.log(longest + 1) * n_quantifiers + math.log(alternatives)
    return steps + math.log(2) * pattern.count("?") <= math.log(_MAX_MATCHING_STEPS)
