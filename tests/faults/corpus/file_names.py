"""Names of files and tensors that would move the cursor, hide text, or mean something elsewhere.

Each name is tried as that of a damaged file, whose error must show it escaped; of a good file,
which must be averaged; of a tensor, and of a file beside the weights. A name that could mean
something else (a pattern, an option, a home directory) means the file, where that is there.
"""

import json
from collections.abc import Iterator, Mapping, Sequence

from faults.case import Case, good_safetensors
from faults.corpus.safetensors_files import floats, numbers, weights
from faults.corpus.shard_sets import INDEX, Content, index_bytes, laid_out, link

_ONE, _TWO = good_safetensors(1, 2, 3, 4), good_safetensors(3, 4, 5, 6)
_CUT = _TWO[:-1]
_MEAN = {"w": (2.0, 3.0, 4.0, 5.0)}
_GOOD, _MODEL = "good.safetensors", "model.safetensors"

# name -> what an error shows of it: itself if None
_ODD: Mapping[str, tuple[str, str | None]] = {
    "escape": ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
    "title": ("\x1b]0;title\x07x", r"\x1b]0;title\x07x"),
    "newline": ("a\nckptavg: error: b", r"a\nckptavg: error: b"),
    "carriage_return": ("secret\rpublic", r"secret\rpublic"),
    "tab": ("a\tb", r"a\tb"),
    "bell": ("a\x07b", r"a\x07b"),
    "backspace": ("a\x08b", r"a\x08b"),
    "delete": ("a\x7fb", r"a\x7fb"),
    "form_feed": ("a\x0cb\x0b", r"a\x0cb\x0b"),
    "c1_control": ("a\x9b2Jb", r"a\x9b2Jb"),
    "next_line": ("a\x85b", r"a\x85b"),
    "right_to_left": ("a\u202etsnetefas", r"a\u202etsnetefas"),
    "isolate": ("a\u2066b\u2069", r"a\u2066b\u2069"),
    "line_separator": ("a\u2028b", r"a\u2028b"),
    "paragraph_separator": ("a\u2029b", r"a\u2029b"),
    "zero_width_space": ("a\u200bb", r"a\u200bb"),
    "zero_width_joiner": ("a\u200db", r"a\u200db"),
    "byte_order_mark": ("\ufeffa", r"\ufeffa"),
    "soft_hyphen": ("a\u00adb", r"a\xadb"),
    "no_break_space": ("a\u00a0b", r"a\xa0b"),
    "tag_characters": ("a\U000e0041", r"a\U000e0041"),
    "private_use": ("a\ue000b", r"a\ue000b"),
    "noncharacter": ("a\uffffb", r"a\uffffb"),
    "lone_byte": ("a\udcffb", r"a\udcffb"),
    "latin_1": ("caf\udce9", r"caf\udce9"),
    "cut_utf_8": ("a\udce2\udc82", r"a\udce2\udc82"),
    "leading_dash": ("./-x", None),
    "like_option": ("./--overwrite", None),
    "like_output": ("./-oout2", None),
    "brackets": ("a[1]", None),
    "bracket_range": ("[!a-z]", None),
    "star": ("a*", None),
    "two_stars": ("**", None),
    "question_mark": ("a?", None),
    "braces": ("a{1,2}", None),
    "range": ("step{1..3}", None),
    "open_brace": ("a{1..", None),
    "space": ("a b  c", None),
    "space_alone": (" ", None),
    "tilde": ("~", None),
    "tilde_user": ("~root", None),
    "at": ("a@main", None),
    "at_in_directory": ("./org/name@main", None),
    "percent": ("%2e%2e%s%n", None),
    "format": ("{0}{name}", None),
    "dollar": ("$HOME`id`$(id)", None),
    "quotes": ("a'b\"c", None),
    "backslash": (r"a\nb\x1b", None),
    "hash": ("#a;b&c|d>e", None),
    "colon": ("C:a", None),
    "equals": ("a=b", None),
    "like_scheme": ("./hf:a", None),
    "dots": ("...", None),
    "hidden": (".a", None),
    "emoji": ("\U0001f600", None),
    "letters": ("\u6a21\u578b-\u03b1\u0431", None),
    "combining": ("e\u0301\u0301", None),
    "long": ("x" * 243, None),
    "long_and_wide": ("\u6a21" * 81, None),
}

_AS_DIRECTORIES = (
    "escape", "newline", "right_to_left", "lone_byte", "leading_dash", "like_option", "brackets",
    "star", "braces", "range", "space_alone", "tilde", "at_in_directory", "dots", "hidden",
)  # fmt: skip
# no JSON string holds half a character
_OF_TENSORS = {
    key: (name, shown)
    for key, (name, shown) in _ODD.items()
    if not any("\ud800" <= character <= "\udfff" for character in name)
}


def cases() -> Sequence[Case]:
    """Return all cases of this module."""
    return [*_damaged(), *_averaged(), *_literal(), *_tensors(), *_side_files(), *_others()]


def _filename(name: str) -> str:
    return f"{name}.safetensors"


def _damaged() -> Iterator[Case]:
    why = "What an error shows of a name is printable, and still tells which file it is."
    for key, (name, escaped) in _ODD.items():
        shown = name if escaped is None else escaped
        file = _filename(name)
        yield Case(
            name=f"name/cut_{key}",
            why=why,
            build=laid_out({_GOOD: _ONE, file: _CUT}, _GOOD, file),
            refusal="has 85 bytes.*truncated",
            culprit=f"{shown}.safetensors",
        )
        if key not in _AS_DIRECTORIES:
            continue
        directory: dict[str, Content] = {f"{name}/{_MODEL}": _CUT}
        yield Case(
            name=f"name/cut_in_{key}",
            why=why,
            build=laid_out({_GOOD: _ONE, **directory}, _GOOD, name),
            refusal="has 85 bytes.*truncated",
            culprit=f"{shown}/{_MODEL}",
        )


def _averaged() -> Iterator[Case]:
    why = "A file is a file, whatever it is called."
    for key, (name, _) in _ODD.items():
        file = _filename(name)
        yield Case(
            name=f"name/ok_{key}",
            why=why,
            build=laid_out({_GOOD: _ONE, file: _TWO}, _GOOD, file),
            refusal=None,
            values=_MEAN,
        )
        if key not in _AS_DIRECTORIES:
            continue
        yield Case(
            name=f"name/ok_in_{key}",
            why=why,
            build=laid_out({_GOOD: _ONE, f"{name}/{_MODEL}": _TWO}, _GOOD, name),
            refusal=None,
            values=_MEAN,
        )


def _literal() -> Iterator[Case]:
    """Yield names that are patterns, beside a file that the pattern would match."""
    why = "A name that is there is never a pattern."
    for key, name, other in (
        ("brackets", "a[1]", "a1"), ("star", "a*", "ab"), ("question_mark", "a?", "ab"),
        ("negation", "[!b]", "a"), ("braces", "a{1,2}", "a1"), ("range", "a{1..2}", "a1"),
    ):  # fmt: skip
        files = {_GOOD: _ONE, _filename(name): _TWO, _filename(other): _CUT}
        yield Case(
            name=f"name/ok_literal_{key}",
            why=why,
            build=laid_out(files, _GOOD, _filename(name)),
            refusal=None,
            values=_MEAN,
        )
        if "{" in name:
            continue
        yield Case(
            name=f"name/ok_pattern_{key}",
            why="A name that is not there is a pattern, and what it matches is averaged.",
            build=laid_out({_GOOD: _ONE, _filename(other): _TWO}, _GOOD, _filename(name)),
            refusal=None,
            values=_MEAN,
        )
    yield Case(
        name="name/ok_literal_output",
        why="An output's name is never a pattern.",
        build=laid_out({"a1/x": b"", _GOOD: _ONE, "b": _TWO}, _GOOD, "b", "-o", "a[1]"),
        refusal=None,
        values=_MEAN,
    )


# -- tensors


def _tensors() -> Iterator[Case]:
    for key, (name, escaped) in _OF_TENSORS.items():
        shown = name if escaped is None else escaped
        first, last = weights({name: floats(1, 2)}), weights({name: floats(1, 2, 3)})
        yield Case(
            name=f"name/tensor_{key}",
            why="What an error shows of a tensor's name is printable.",
            build=laid_out({_GOOD: first, "b": last}, _GOOD, "b"),
            refusal=r"shape \[3\] in b, \[2\] in good|shape \[2\] in good.*\[3\] in b",
            culprit=f"'{shown}'",
        )
    names = [name for name, _ in _OF_TENSORS.values()]
    first, last = (
        weights({name: floats(place, plus) for place, name in enumerate(names)}) for plus in (1, 3)
    )
    yield Case(
        name="name/ok_tensors",
        why="A tensor's name is stored as it is.",
        build=laid_out({_GOOD: first, "b": last}, _GOOD, "b"),
        refusal=None,
        values={name: (place, 2) for place, name in enumerate(names)},
    )
    noisy = "x\x1b[2J\n" * 5000
    yield Case(
        name="name/tensor_30000_escapes",
        why="A name of a megabyte must not flood the terminal.",
        build=laid_out(
            {_GOOD: weights({noisy: floats(1)}), "b": weights({noisy: floats(1, 2)})}, _GOOD, "b"
        ),
        refusal=r"^.{0,2200}$",
        culprit=r"x\x1b[2J\n",
    )
    for key, dtype in (("escape", "F32\x1b[2J"), ("newline", "F\n32"), ("long", "F" * 100_000)):
        header = json.dumps({"w": {"dtype": dtype, "shape": [], "data_offsets": [0, 0]}})
        raw = len(header).to_bytes(8, "little") + header.encode()
        yield Case(
            name=f"name/dtype_{key}",
            why="A dtype is text from a file, too.",
            build=laid_out({_GOOD: _ONE, "b": raw}, _GOOD, "b"),
            refusal=r"^(?=.{0,2200}$).*'w' has the unknown dtype 'F",
        )


# -- what lies beside the weights


def _side_files() -> Iterator[Case]:
    names = {name.rpartition("/")[2] for name, _ in _ODD.values()}
    beside = {f"b/{name}": b"x" for name in names}
    yield Case(
        name="name/ok_side_files",
        why="What lies beside the weights is copied, whatever it is called.",
        build=laid_out({_GOOD: _ONE, f"b/{_MODEL}": _TWO, **beside}, _GOOD, "b"),
        refusal=None,
        values=_MEAN,
    )
    code = {_GOOD: _ONE, f"b/{_MODEL}": _TWO, "b/a\x1b[2J\n\u202e.py": b"raise SystemExit(9)\n"}
    for key, option in (("copied", ()), ("left_out", ("--no-code",))):
        yield Case(
            name=f"name/ok_code_{key}",
            why="Code is never run, and its name is printed escaped.",
            build=laid_out(code, _GOOD, "b", *option),
            refusal=None,
            values=_MEAN,
        )


def _others() -> Iterator[Case]:
    shard, escaped = "\x1b[2J\n.safetensors", r"\x1b[2J\n.safetensors"
    index = index_bytes({"w": shard})
    yield Case(
        name="name/shard_escape",
        why="A shard's name comes from a file.",
        build=laid_out({_GOOD: _ONE, f"b/{INDEX}": index, f"b/{shard}": _CUT}, _GOOD, "b"),
        refusal="has 85 bytes.*truncated",
        culprit=f"b/{escaped}",
    )
    yield Case(
        name="name/ok_shard_escape",
        why="A plain file name may hold any character.",
        build=laid_out({_GOOD: _ONE, f"b/{INDEX}": index, f"b/{shard}": _TWO}, _GOOD, "b"),
        refusal=None,
        values=_MEAN,
    )
    yield Case(
        name="name/missing_escape",
        why="What was typed may have been copied from anywhere.",
        build=laid_out({_GOOD: _ONE, "\x1b\nb": _TWO}, _GOOD, "\x1b\na"),
        refusal="no such file or directory",
        culprit=r"\x1b\na",
    )
    yield Case(
        name="name/missing_byte",
        why="What was typed may be no Unicode.",
        build=laid_out({_GOOD: _ONE}, _GOOD, "a\udcff"),
        refusal="no such file or directory",
        culprit=r"a\udcff",
    )
    yield Case(
        name="name/dangling_escape",
        why="Where a link leads may be written by anybody.",
        build=laid_out({_GOOD: _ONE, "b": link("\x1b[2J\n")}, _GOOD, "b"),
        refusal="leads nowhere",
    )
    yield Case(
        name="name/several_kinds_escape",
        why="Names from a directory listing come from anywhere.",
        build=laid_out({_GOOD: _ONE, "b/\x1b[2J1.pt": _TWO, "b/\n1.ckpt": _TWO}, _GOOD, "b"),
        refusal=r"\\x1b\[2J1\.pt.*\\n1\.ckpt|\\n1\.ckpt.*\\x1b\[2J1\.pt",
        culprit="b",
    )
    yield Case(
        name="name/key_differences_escape",
        why="All names in a list of differences are escaped.",
        build=laid_out(
            {
                _GOOD: weights({f"a\x1b{number}": floats(1) for number in range(9)}),
                "b": weights({f"b\n{number}": floats(1) for number in range(9)}),
            },
            _GOOD,
            "b",
        ),
        refusal=r"'b\\n0' is in b.*and 13 more",
    )
    yield Case(
        name="name/ok_integers_escape",
        why="The names of what differs are printed escaped.",
        build=laid_out(
            {
                _GOOD: weights({"w": floats(1), "n\x1b[2J\n": numbers("I64", "q", 1)}),
                "b": weights({"w": floats(3), "n\x1b[2J\n": numbers("I64", "q", 2)}),
            },
            _GOOD,
            "b",
        ),
        refusal=None,
        values={"w": (2,), "n\x1b[2J\n": (2,)},
    )
    yield Case(
        name="name/non_finite_escape",
        why="The names of what is refused are printed escaped.",
        build=laid_out(
            {_GOOD: weights({"a\nb": floats(1)}), "b": weights({"a\nb": floats(float("nan"))})},
            _GOOD,
            "b",
        ),
        refusal=r"'a\\nb' in checkpoint 2 of 2 has 1 non-finite",
    )
    yield Case(
        name="name/ok_run_directory_escape",
        why="A run's checkpoints may have any names.",
        build=laid_out(
            {"r\x1b[2J/step-1\n.safetensors": _ONE, "r\x1b[2J/step-2\n.safetensors": _TWO},
            "r\x1b[2J",
        ),
        refusal=None,
        values=_MEAN,
    )
