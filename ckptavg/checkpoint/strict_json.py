"""JSON from files that anyone may have written: an object, each name once, within bounds.

Python's parser takes more than JSON (NaN, halves of characters, names given twice) and any amount
of it; what it would make is bounded beforehand, by counting the characters that make it.
"""

import json
from collections.abc import Callable
from typing import Any

from ckptavg.checkpoint.limits import MAX_JSON_NESTING, JsonBounds, no_garbage_collection
from ckptavg.errors import CheckpointError, IncompleteCheckpointError

Pairs = list[tuple[str, Any]]


class TooLargeError(CheckpointError):
    """A JSON text is larger than what is read."""


def parse_object(
    raw: bytes,
    label: str,
    bounds: JsonBounds,
    *,
    what: str = "",
    is_strict: bool = True,
    made_of: Callable[[Pairs], Any] | None = None,
) -> dict[str, Any]:
    """Return the JSON object that a text is.

    Args:
        raw: The text, in UTF-8.
        label: The file it comes from, which messages begin with.
        bounds: How much it may hold.
        what: Which part of it, such as ``its header``, where it is not the whole; it cannot be
            cut short then.
        is_strict: Whether to refuse names given twice, NaN and halves of characters, which Python
            itself writes: what says where tensors lie must have one meaning only.
        made_of: Returns what takes the place of an inner object with these names and values;
            None of it is an object as any other.

    Raises:
        TooLargeError: If it holds more than a model needs.
        IncompleteCheckpointError: If it ends early.
        CheckpointError: If it is anything else.
    """

    def refuse(why: str, kind: type[CheckpointError] = CheckpointError) -> CheckpointError:
        return kind(f"{label}: {what} {why}" if what else f"{label}: {why}")

    def unique(pairs: Pairs) -> Any:
        made = made_of(pairs) if made_of is not None else None
        if made is not None:
            return made
        mapping = dict(pairs)
        if is_strict and len(mapping) != len(pairs):
            seen: set[str] = set()
            twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]  # set.add returns None on purpose
            raise refuse(f"names '{twice}' twice")
        return mapping

    def constant(text: str) -> float:
        if not is_strict:
            return float(text)
        raise refuse(f"holds {text}, which is not JSON")

    for character, most in zip("{[:,", bounds, strict=True):
        if (count := raw.count(character.encode())) > most:
            raise refuse(f"has {count} '{character}', at most {most} are read", TooLargeError)
    try:
        text = raw.decode("utf-8")
        with no_garbage_collection():
            value = json.loads(
                text, object_pairs_hook=unique, parse_constant=constant, parse_int=_integer
            )
        if is_strict and "\\ud" in text.lower():  # half of a surrogate pair is no character
            json.dumps(value, ensure_ascii=False, default=str).encode("utf-8")
    except (ValueError, RecursionError) as error:  # also UnicodeDecodeError, JSONDecodeError
        is_cut = not what and not raw.rstrip().endswith(b"}")
        kind = IncompleteCheckpointError if is_cut else CheckpointError
        raise refuse(
            "is not valid JSON" + (": the file is damaged" if what else ""), kind
        ) from error
    if type(value) is not dict:
        raise refuse("is not a JSON object")
    if _is_deeper(value, MAX_JSON_NESTING):
        raise refuse(f"is nested more than {MAX_JSON_NESTING} deep")
    return value


def _integer(text: str) -> int | float:
    return -0.0 if text == "-0" else int(text)  # what it is to other readers


def _is_deeper(value: Any, most: int) -> bool:
    """Tell whether containers are nested deeper than that; none holds itself."""
    level = [value]
    for _ in range(most):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if type(outer) is dict else outer)
            if type(inner) in (dict, list)
        ]
        if not level:
            return False
    return True
