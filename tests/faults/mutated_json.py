"""Changes of JSON values, and ways to write them that JSON allows or does not."""

import json
from collections.abc import Iterable
from copy import deepcopy
from random import Random
from typing import Any, NamedTuple

from faults.mutated_bytes import EDGES, n_changes, nudged


class Raw(NamedTuple):
    """Text that is written as it is."""

    text: str


class Pairs:
    """An object: a list of [key, value], whose keys may occur more than once."""

    def __init__(self, pairs: Iterable[tuple[Any, Any]] = ()) -> None:
        self.items: list[list[Any]] = [[key, value] for key, value in pairs]


_NUMBERS = tuple(Raw(str(sign * edge)) for edge in (0, 1, *EDGES) for sign in (1, -1))
_STRANGE_NUMBERS = tuple(
    map(
        Raw,
        (
            "-0", "0.0", "-0.0", "1.0", "4.0", "1e0", "1E0", "1e+0", "2e1", "10e-1", "1e400",
            "-1e400", "0.5", "01", "+1", "1.", ".5", "1e", "0x1", "1_0", "NaN", "Infinity",
            "-Infinity", "9" * 40, "9" * 5000, "1" + "0" * 19, "\u0661",
        ),
    )
)  # fmt: skip
_STRANGE_TEXTS = tuple(
    map(
        Raw,
        (
            '"\\ud800"', '"\\udc00\\ud800"', '"\\ud83d\\ude00"', '"\\u0000"', '"\\u0041"', '"\t"',
            '"\\x41"', '"\\/"', '"a\\', '"a', "'a'", '"\x7f"', '"\u2028"', '"\u202e"', '"\\u00"',
            '"\\uD83D\\u0041"', '"\ufeff"', '"' + "n" * 300 + '"',
        ),
    )
)  # fmt: skip
_STRANGE_VALUES: tuple[Any, ...] = (
    None, True, False, "", "F32", "F64", "U8", "BOOL", "pt", [], [[]], [0], [0, 0], [1, 2, 3],
    [None], ["0", "4"], [1] * 65, [1] * 64, [0, 2**62, 2**62], [2**62, 2**62, 0],
    Raw("{}"), Raw("nul"), Raw("True"), Raw("[1,]"), Raw("[,]"), Raw("{,}"), Raw("/**/1"),
    Raw("[" * 100 + "]" * 100), Raw("[" * 130 + "]" * 130), Raw("[" * 3000 + "]" * 3000),
    Raw('{"a":' * 200 + "1" + "}" * 200), Raw("[" * 300), Raw(""),
)  # fmt: skip
_KEYS = (
    "", "dtype", "shape", "data_offsets", "__metadata__", "name", "w", "weight_map", "metadata",
    "step", "global_step", "log_history", "saved_offsets", "eval_loss", "\u00e9", "a\nb", "\x1b[2J",
    Raw('"\\u0064type"'), Raw('"sh\\u0061pe"'), Raw('"\\ud800"'), Raw('"\\u0000"'), Raw("1"),
)  # fmt: skip
_SPACES = ("", " ", "\n", "\t", "\r\n", "  ")
_NO_SPACES = ("\x0b", "\x0c", "\xa0", "\0", "\ufeff", "//\n", "\u2003")


def parsed(text: str | bytes) -> Any:
    """Return a JSON value whose objects are ``Pairs``."""
    return json.loads(text, object_pairs_hook=Pairs)


def rendered(rng: Random, value: Any) -> bytes:
    """Return a value as JSON text, mostly as it is usually written."""
    space: tuple[str, ...] = _SPACES if rng.random() < 0.2 else ("",)
    if rng.random() < 0.03:
        space = (*_SPACES, *_NO_SPACES)
    text = "".join(_pieces(rng, value, space))
    if rng.random() < 0.1:
        text = rng.choice(
            (f" {text}", f"{text} ", f"{text}\n", f"{text}\0", f"\ufeff{text}", f"{text}{text}",
             f"{text}   ", f"\n{text}", f"{text},", f"{text}x")
        )  # fmt: skip
    return text.encode("utf-8", "surrogatepass")


def _pieces(rng: Random, value: Any, space: tuple[str, ...]) -> Iterable[str]:
    def gap() -> str:
        return rng.choice(space) if len(space) > 1 else ""

    if type(value) is Raw:
        yield value.text
    elif type(value) is Pairs:
        yield "{"
        for number, (key, inner) in enumerate(value.items):
            yield "," + gap() if number else gap()
            yield from _pieces(rng, key, space)
            yield gap() + ":" + gap()
            yield from _pieces(rng, inner, space)
        yield gap() + "}"
    elif type(value) is list:
        yield "["
        for number, inner in enumerate(value):
            yield "," + gap() if number else gap()
            yield from _pieces(rng, inner, space)
        yield gap() + "]"
    elif type(value) is str:
        text = json.dumps(value, ensure_ascii=rng.random() < 0.5)
        yield _escaped(rng, text) if rng.random() < 0.03 else text
    else:
        yield json.dumps(value)


def _escaped(rng: Random, text: str) -> str:
    """Write one character of a quoted text as an escape, which changes nothing for JSON."""
    plain = [at for at in range(1, len(text) - 1) if text[at].isalnum() and text[at - 1] != "\\"]
    if not plain or "\\" in text:
        return text
    at = rng.choice(plain)
    return f"{text[:at]}\\u{ord(text[at]):04x}{text[at + 1 :]}"


def mutate(rng: Random, value: Pairs) -> None:
    """Change something in a JSON object, in place, or several things."""
    for _ in range(n_changes(rng)):
        containers = list(_containers(value))
        container = rng.choice(containers)
        if type(container) is Pairs:
            _mutate_object(rng, container, containers)
        else:
            _mutate_list(rng, container)


def _containers(value: Any) -> Iterable[Any]:
    """Yield every object and list."""
    if type(value) is Pairs:
        yield value
        for _, inner in value.items:
            yield from _containers(inner)
    elif type(value) is list:
        yield value
        for inner in value:
            yield from _containers(inner)


def _mutate_object(rng: Random, target: Pairs, containers: list[Any]) -> None:
    items = target.items
    action = rng.randrange(9)
    if not items or action == 0:
        items.insert(rng.randint(0, len(items)), [rng.choice(_KEYS), strange(rng)])
        return
    at = rng.randrange(len(items))
    if action == 1:
        del items[at]
    elif action == 2:
        items.insert(rng.randint(0, len(items)), list(items[at]))
    elif action == 3:
        other = rng.choice([one for one in containers if type(one) is Pairs])
        is_plain = type(items[at][1]) not in (Pairs, list)  # those could come to lie in themselves
        value = items[at][1] if is_plain else strange(rng)
        other.items.append([rng.choice((items[at][0], rng.choice(_KEYS))), value])
    elif action == 4:
        rng.shuffle(items)
    elif action == 5:
        items[at][0] = rng.choice(_KEYS)
    elif action == 6:
        place = rng.choice(items)
        items[at][1], place[1] = place[1], items[at][1]
    elif action == 7 and type(items[at][1]) is Pairs:
        items[at][1] = [inner for _, inner in items[at][1].items]
    else:
        items[at][1] = changed(rng, items[at][1])


def _mutate_list(rng: Random, target: list[Any]) -> None:
    action = rng.randrange(6)
    at = rng.randrange(len(target)) if target else 0
    if action == 0 or not target:
        target.insert(at, rng.choice((0, 1, 1, 2, strange(rng))))
    elif action == 1:
        del target[at]
    elif action == 2:
        target.insert(at, target[at])
    elif action == 3:
        rng.shuffle(target)
    else:
        target[at] = changed(rng, target[at])


def changed(rng: Random, value: Any) -> Any:
    """Return another value in place of one."""
    if type(value) is int and rng.random() < 0.6:
        return nudged(rng, value)
    if type(value) is str and rng.random() < 0.3:
        return rng.choice((value.lower(), value + " ", value[:-1], f"../{value}", f"{value}\0"))
    return strange(rng)


def strange(rng: Random) -> Any:
    """Return a value that is seldom the right one."""
    kinds = (_NUMBERS, _STRANGE_NUMBERS, _STRANGE_TEXTS, _STRANGE_VALUES)
    return deepcopy(rng.choice(rng.choice(kinds)))
