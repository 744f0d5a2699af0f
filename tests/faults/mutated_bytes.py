"""Changes of bytes that know nothing of what the bytes mean."""

from collections.abc import Callable, Sequence
from random import Random

_POWERS = (7, 8, 15, 16, 31, 32, 53, 63, 64)
EDGES: tuple[int, ...] = tuple(
    sorted({2**power + more for power in _POWERS for more in (-1, 0, 1)})
)
_BYTES = (0, 1, 2, 9, 10, 32, 34, 44, 45, 46, 48, 49, 57, 58, 91, 92, 93, 123, 125, 127, 128, 255)
_WIDTHS = (1, 2, 4, 8)
_MAX_INSERTED = 16

Change = Callable[[Random, bytearray, Sequence[bytes]], None]


def mutated(
    rng: Random, raw: bytes, others: Sequence[bytes], *, focus: tuple[int, int] | None = None
) -> bytes:
    """Return bytes after a few random changes.

    Args:
        rng: Decides everything.
        raw: The bytes to begin with.
        others: What parts are taken from.
        focus: A range in which most changes happen; they may happen anywhere if None.
    """
    start, stop = (0, len(raw)) if focus is None or rng.random() < 0.2 else focus
    content = bytearray(raw[start:stop])
    for _ in range(n_changes(rng)):
        rng.choice(_CHANGES)(rng, content, others)
    return raw[:start] + bytes(content) + raw[stop:]


def n_changes(rng: Random) -> int:
    """Return how often something is changed: once most of the time."""
    return rng.choice((1, 1, 1, 1, 2, 2, 3, 4))


def nudged(rng: Random, number: int) -> int:
    """Return an integer near another one, or one at which integers of some width end."""
    if rng.random() < 0.4:
        return rng.choice(EDGES)
    return rng.choice((*(number + more for more in (-8, -4, -2, -1, 1, 2, 4, 8)), 0, 2 * number))


def _range(rng: Random, content: bytearray) -> tuple[int, int]:
    start = rng.randrange(len(content) + 1)
    longest = rng.choice((1, 4, 16, len(content)))
    return start, min(len(content), start + rng.randint(1, max(longest, 1)))


def _at(rng: Random, content: bytearray) -> int:
    if not content:
        content.append(0)
    return rng.randrange(len(content))


def _flip_bit(rng: Random, content: bytearray, _: Sequence[bytes]) -> None:
    content[_at(rng, content)] ^= 1 << rng.randrange(8)


def _set_byte(rng: Random, content: bytearray, _: Sequence[bytes]) -> None:
    at = _at(rng, content)
    content[at] = rng.choice(_BYTES) if rng.random() < 0.5 else rng.randrange(256)


def _nudge_byte(rng: Random, content: bytearray, _: Sequence[bytes]) -> None:
    at = _at(rng, content)
    content[at] = (content[at] + rng.choice((-1, 1))) % 256


def _change_integer(rng: Random, content: bytearray, _: Sequence[bytes]) -> None:
    width = rng.choice(_WIDTHS)
    at = _at(rng, content)
    number = nudged(rng, int.from_bytes(content[at : at + width], "little"))
    content[at : at + width] = (number % 256**width).to_bytes(width, "little")


def _change_digit(rng: Random, content: bytearray, _: Sequence[bytes]) -> None:
    digits = [at for at, byte in enumerate(content) if 48 <= byte <= 57]
    if digits:
        content[rng.choice(digits)] = rng.randrange(48, 58)


def _insert(rng: Random, content: bytearray, _: Sequence[bytes]) -> None:
    at = rng.randrange(len(content) + 1)
    content[at:at] = rng.choice(
        (rng.randbytes(rng.randint(1, _MAX_INSERTED)), bytes(rng.randint(1, 64)))
    )


def _delete(rng: Random, content: bytearray, _: Sequence[bytes]) -> None:
    start, stop = _range(rng, content)
    del content[start:stop]


def _duplicate(rng: Random, content: bytearray, _: Sequence[bytes]) -> None:
    start, stop = _range(rng, content)
    at = rng.choice((stop, rng.randrange(len(content) + 1)))
    content[at:at] = content[start:stop]


def _swap(rng: Random, content: bytearray, _: Sequence[bytes]) -> None:
    start, stop = _range(rng, content)
    later, end = sorted((rng.randint(stop, len(content)), rng.randint(stop, len(content))))
    content[start:end] = content[later:end] + content[stop:later] + content[start:stop]


def _truncate(rng: Random, content: bytearray, _: Sequence[bytes]) -> None:
    at = rng.randrange(len(content) + 1)
    if rng.random() < 0.8:
        del content[at:]
    else:
        del content[:at]


def _splice(rng: Random, content: bytearray, others: Sequence[bytes]) -> None:
    other = bytearray(rng.choice(others))
    start, stop = _range(rng, content)
    first, last = _range(rng, other)
    content[start:stop] = other[first:last]


_CHANGES: Sequence[Change] = (
    _flip_bit,
    _set_byte,
    _set_byte,
    _nudge_byte,
    _change_integer,
    _change_digit,
    _insert,
    _delete,
    _duplicate,
    _swap,
    _truncate,
    _splice,
)
