"""Messages are one printable line of bounded length, whatever names they hold."""

import pytest

from ckptavg import CkptavgError
from ckptavg.errors import printable


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain, ünïcode 模型 …", "plain, ünïcode 模型 …"),
        ("two\nlines\ttab\x1b[31m", "two\\nlines\\ttab\\x1b[31m"),
        ("\u202egnp.exe \u2066", "\\u202egnp.exe \\u2066"),
        ("lone \udcff surrogate", "lone \\udcff surrogate"),
        ("nul \x00, del \x7f, \U000e0001", "nul \\x00, del \\x7f, \\U000e0001"),
    ],
)
def test_what_cannot_be_printed_is_escaped(text: str, expected: str) -> None:
    assert printable(text) == expected
    assert str(CkptavgError(text)) == expected


@pytest.mark.parametrize("character", ["a", "\x1b", "\U000e0001"])
def test_long_messages_keep_their_beginning_and_end(character: str) -> None:
    message = str(CkptavgError(f"model.pt: {character * 10**6}; pass --overwrite"))
    assert len(message) <= 2000
    assert message.startswith("model.pt: ")
    assert message.endswith("; pass --overwrite")
