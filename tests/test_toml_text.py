"""What is written as TOML is read as what it was."""

import datetime
import random
import tomllib
from typing import Any

import pytest

from ckptavg.errors import UsageError
from ckptavg.toml_text import toml_text

TEXTS = (
    "", "plain", 'a "quoted" word', "back\\slash\\", "C:\\new\\table", "'single'", '"""', "tab\t",
    "line\nbreak\r\n", "\x00\x01\x1f\x7f\b\f", "ünïcödé 模型 🦆", "\u2028\u202e", "# no comment",
    "[x]", "\x80\x9f", "\ufeff",
)  # fmt: skip


def value(generator: random.Random, depth: int = 0) -> Any:
    """Return any value that a recipe may hold."""
    kind = generator.randrange(4 if depth > 2 else 6)
    if kind == 0:
        return "".join(generator.choices([*"abc \"'\\\n\t=#[]{}é模", "\x07", "🦆"], k=5))
    if kind == 1:
        return generator.choice([0, -1, 2**70, generator.randrange(-(10**9), 10**9)])
    if kind == 2:
        return generator.choice([0.0, -0.0, 1e300, 5e-324, 1e16, generator.uniform(-1, 1)])
    if kind == 3:
        return generator.random() < 0.5
    if kind == 4:
        return [value(generator, depth + 1) for _ in range(generator.randrange(9))]
    return {
        generator.choice(TEXTS): value(generator, depth + 1) for _ in range(generator.randrange(4))
    }


def test_any_recipe_is_read_as_it_was_written() -> None:
    for seed in range(400):
        generator = random.Random(seed)
        written = {
            generator.choice(TEXTS) + str(number): value(generator)
            for number in range(generator.randrange(8))
        }
        assert repr_of(tomllib.loads(toml_text(written))) == repr_of(written)


def repr_of(content: dict[str, Any]) -> str:
    """Return what tells -0.0 from 0.0, and 1 from 1.0; tables come after values."""
    return repr(sorted(content.items(), key=lambda item: (isinstance(item[1], dict), item[0])))


@pytest.mark.parametrize("text", TEXTS)
def test_every_text_is_kept_as_value_and_as_key(text: str) -> None:
    content = {"section": {text: text, "list": [text, "x" * 200]}}
    assert tomllib.loads(toml_text(content)) == content


def test_infinity_and_nan_are_written_as_toml_has_them() -> None:
    told = tomllib.loads(toml_text({"up": float("inf"), "down": float("-inf"), "no": float("nan")}))
    assert (told["up"], told["down"]) == (float("inf"), float("-inf"))
    assert told["no"] != told["no"]


def test_a_recipe_looks_as_one_would_write_it() -> None:
    content = {
        "model": {"model-args": {"width": 64, "name": "a b"}},
        "command": "average",
        "averaging": {"schemes": ["uniform:last=5", "uniform"], "keep-prefix": True},
        "sources": [f"runs/exp7/checkpoint-{step}" for step in (500, 1000, 1500, 2000)],
    }
    assert toml_text(content) == (
        'command = "average"\n'
        "sources = [\n"
        '    "runs/exp7/checkpoint-500",\n'
        '    "runs/exp7/checkpoint-1000",\n'
        '    "runs/exp7/checkpoint-1500",\n'
        '    "runs/exp7/checkpoint-2000",\n'
        "]\n"
        "\n"
        "[model]\n"
        'model-args = { width = 64, name = "a b" }\n'
        "\n"
        "[averaging]\n"
        'schemes = ["uniform:last=5", "uniform"]\n'
        "keep-prefix = true\n"
    )


@pytest.mark.parametrize("wrong", [None, datetime.date(2024, 1, 1), b"bytes", {1, 2}, object])
def test_other_types_are_refused(wrong: object) -> None:
    with pytest.raises(UsageError, match="cannot be written into a recipe"):
        toml_text({"key": wrong})


def test_a_file_name_that_is_not_utf8_is_refused() -> None:
    with pytest.raises(UsageError, match="cannot be written into a recipe, which is UTF-8"):
        toml_text({"sources": ["run-\udcff.pt"]})
