"""numpy files: the zip archive of ``np.savez``, and the header of every array in it."""

import io
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from hostile import Member, zip64_extra, zip_bytes

from faults.case import Case
from faults.corpus.torch_files import EVIL_PICKLE, Row, both, deflated, refused

DATA = struct.pack("<4f", 0, 1, 2, 3)
U32 = 0xFFFFFFFF


def cases() -> Sequence[Case]:
    """Return the cases of this module."""
    return [
        *refused("npz-header", _headers(), "bad.npz"),
        *refused("npz-array", _kinds(), "bad.npz"),
        *refused("npz-zip", _archives(), "bad.npz"),
        *refused("npy", _single(), "bad.npy"),
        *_good(),
    ]


def npy(
    header: str | None = None,
    data: bytes = DATA,
    *,
    version: int = 1,
    stated: int | None = None,
    **fields: str,
) -> bytes:
    """Return one array.

    Args:
        header: The whole header; None makes one of four float32 numbers.
        data: What follows it.
        version: Of the format.
        stated: The length that the file states of its header; None for the true one.
        fields: Source text that replaces values of the header: ``descr``, ``order``, ``shape``.
    """
    told = {"descr": "'<f4'", "order": "False", "shape": "(4,)"} | fields
    if header is None:
        header = "{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}".format(**told)
    raw = header.encode("utf-8") + b"\n"
    length = struct.pack("<H" if version == 1 else "<I", len(raw) if stated is None else stated)
    return b"\x93NUMPY" + bytes([version, 0]) + length + raw + data


def npz(content: bytes, name: str = "w.npy") -> bytes:
    """Return an archive of one array."""
    return zip_bytes([Member(name=name, content=content)])


def saved(save: Callable[..., None], **arrays: object) -> bytes:
    """Return what numpy writes."""
    buffer = io.BytesIO()
    save(buffer, **arrays)
    return buffer.getvalue()


def _headers() -> list[Row]:
    none, damaged, long = r"'w\.npy' has no header", r"'w\.npy' has a damaged header", r"too long"
    literals = {
        "expression": "__import__('os').mkdir('canary')",
        "expression-as-a-value": npy_header("shape", "(open('canary', 'w'), 4)"),
        "comprehension": npy_header("shape", "tuple(4 for _ in [1])"),
        "arithmetic": npy_header("shape", "(2+2,)"),
        "formatted-string": npy_header("descr", "f'{open(\"canary\", \"w\")}'"),
        "list": "['<f4', False, (4,)]",
        "empty": "",
        "empty-dict": "{}",
        "two-keys": "{'descr': '<f4', 'shape': (4,)}",
        "four-keys": "{'descr': '<f4', 'fortran_order': False, 'shape': (4,), 'x': 1}",
        "keys-of-bytes": "{b'descr': '<f4', b'fortran_order': False, b'shape': (4,)}",
        "unhashable-key": "{[]: 1}",
        "two-statements": "{}; {}",
        "cut": "{'descr': '<f4', 'fortran_order': False, 'shape': (4,",
        "thousands-of-brackets": "(" * 4000,
        "thousands-of-signs": "-" * 4000 + "1",
        "nested-lists": "[" * 95 + "]" * 95,
        "digits": npy_header("shape", f"({'9' * 3900},)"),
        "NUL": "\0",
    }  # fmt: skip
    shapes = {
        "number": "4", "list": "[4]", "set": "{4}", "none": "None", "negative": "(-4,)",
        "negative-twice": "(-2, -2)", "float": "(4.0,)", "truth-value": "(True,)",
        "string": "('4',)", "2**63": f"({2**63},)", "65-dimensions": f"({'1,' * 65})",
    }  # fmt: skip
    lies = {"(5,)": 20, "(3,)": 12, "()": 4, "(2, 3)": 24, f"({2**62},)": 2**64, "(0,)": 0}
    lies[f"({2**32}, {2**32})"] = 2**66
    return [
        ("missing", "An array begins with a magic string.", npz(DATA), none),
        ("nothing", "An array begins with a magic string.", npz(b""), none),
        ("magic-alone", "A header follows the magic string.", npz(b"\x93NUMPY\x01"), none),
        ("version-0", "There are versions 1, 2 and 3.", npz(npy(version=0)), none),
        ("version-4", "There are versions 1, 2 and 3.", npz(npy(version=4)), none),
        ("longer-than-the-file", "The header lies inside the array.",
         npz(npy(stated=60_000)), long),
        ("of-4-GB", "The header lies inside the array.",
         npz(npy(version=2, stated=U32)), long),
        ("of-100-kB", "numpy refuses to parse a header of more than 10,000 bytes.",
         npz(npy("{}".ljust(100_000), version=2)), long),
        ("shorter-than-it-is", "The rest of the header would be numbers.", npz(npy(stated=20)),
         damaged),
        ("not-utf-8", "A header is text.",
         npz(npy(version=3).replace(b"descr", b"d\xffscr")), damaged),
        *(
            (what, "The header is a literal dict of descr, fortran_order and shape.",
             npz(npy(header)), damaged)
            for what, header in literals.items()
        ),
        *(
            (f"shape-{what}", "A shape is a tuple of at most 64 whole numbers from 0 on.",
             npz(npy(shape=shape)), damaged)
            for what, shape in shapes.items()
        ),
        *(
            (f"order-{order}", "fortran_order is True or False.", npz(npy(order=order)), damaged)
            for order in ("1", "None", "'C'")
        ),
        *(
            (f"shape-of-{nbytes}-bytes", "Shape and dtype say how many bytes follow.",
             npz(npy(shape=shape)), rf"'w\.npy' has 16 bytes, expected {nbytes}\b")
            for shape, nbytes in lies.items()
        ),
    ]  # fmt: skip


def npy_header(field: str, source: str) -> str:
    """Return a header with one value replaced by source text."""
    values = {"descr": "'<f4'", "fortran_order": "False", "shape": "(4,)"} | {field: source}
    return "{" + ", ".join(f"'{key}': {value}" for key, value in values.items()) + "}"


def _kinds() -> list[Row]:
    dtypes = (
        ("objects", "'|O'", EVIL_PICKLE, r"Python objects"),
        ("objects-of-another-order", "'<O8'", EVIL_PICKLE, r"Python objects"),
        ("big-endian", "'>f4'", DATA, r"big-endian"),
        ("big-endian-integers", "'>i8'", DATA, r"big-endian"),
        ("fields", "[('a', '<f4'), ('b', '<i4')]", DATA, r"several fields"),
        ("one-field", "[('a', '<f4')]", DATA, r"several fields"),
        ("subarray", "('<f4', (2,))", DATA, r"several fields|damaged header"),
        ("none", "None", DATA, r"several fields|damaged header"),
        ("number", "4", DATA, r"several fields|damaged header"),
        ("empty", "''", DATA, r"dtype ''"),
        ("void", "'|V4'", DATA, r"dtype '\|V4'"),
        ("dates", "'<M8[s]'", DATA, r"dtype '<M8\[s\]'"),
        ("durations", "'<m8[ns]'", DATA, r"dtype '<m8\[ns\]'"),
        ("long-doubles", "'<f16'", DATA, r"dtype '<f16'"),
        ("float3", "'<f3'", DATA, r"dtype '<f3'"),
        ("no-byte-order", "'f4'", DATA, r"dtype 'f4'"),
        ("names-of-fields", "'<f4,<i4'", DATA, r"dtype '<f4,<i4'"),
        ("moves-the-cursor", r"'<\x1b[2J'", DATA, r"(dtype '<\\x1b\[2J'|damaged header)"),
    )
    return [
        (what, "Only plain numbers, little end first, are averaged.",
         npz(npy(data=data, descr=descr)), rf"'w\.npy' .*{refusal}")
        for what, descr, data, refusal in dtypes
    ]  # fmt: skip


def _archives() -> list[Row]:
    member = Member(name="w.npy", content=npy())
    whole = zip_bytes([member])
    beside = r"beside numpy arrays"
    changed: Sequence[tuple[str, str, Member, str]] = (
        ("encrypted", "Encrypted bytes are other numbers.",
         replace(member, flags=1), r"'w\.npy'.*encrypted"),
        ("another-local-name", "The local header contradicts the directory.",
         replace(member, local_name=b"v.npy"), r"'w\.npy'.*another name"),
        ("gigabytes", "No file of 300 bytes holds 2 GiB.",
         replace(member, size=2**31), r"'w\.npy' lies outside"),
        ("exabytes", "No file of 300 bytes holds 2**64 bytes.",
         replace(member, size=U32, extra=zip64_extra(2**64 - 1, 2**64 - 1)), r"lies outside"),
        ("bytes-behind-it", "What lies behind the last member belongs to none.",
         replace(member, descriptor=b"smuggled"), r"'w\.npy' does not end where"),
        ("another-checksum", "The CRC-32 shows that the array changed.",
         replace(member, crc=1), r"CRC"),
    )  # fmt: skip
    return [
        *(
            (f"cut-{what}", "A file that ends early has lost its directory.",
             whole[:end], r"truncated")
            for what, end in (("by-one-byte", -1), ("in-the-directory", -50), ("in-half", 100))
        ),
        *((one, why, zip_bytes([content]), refusal) for one, why, content, refusal in changed),
        ("deflated", "np.savez_compressed deflates; that is not read.",
         zip_bytes([deflated(member)]), r"'w\.npy'.*compressed"),
        ("savez-compressed", "np.savez_compressed deflates; that is not read.",
         saved(np.savez_compressed, w=np.zeros(1000, np.float32)), r"'w\.npy'.*compressed"),
        ("name-twice", "Which of two arrays of one name counts depends on the reader.",
         zip_bytes([member, member]), r"'w\.npy' twice"),
        ("array-and-code", "np.savez writes arrays alone.",
         zip_bytes([member, Member(name="w.py", content=b"open('canary', 'w')")]), beside),
        ("array-and-pickle", "np.savez writes arrays alone.",
         zip_bytes([member, Member(name="w.pkl", content=EVIL_PICKLE)]), beside),
        ("array-without-suffix", "np.savez gives every array the suffix .npy.",
         zip_bytes([member, replace(member, name="v")]), beside),
        ("no-array-first", "An archive that begins otherwise is not numpy's.",
         zip_bytes([Member(name="readme.txt"), member]), r"no data\.pkl|numpy"),
        ("name-not-utf-8", "A name that is no text is no tensor's.",
         zip_bytes([replace(member, name=b"\xff.npy")]), r"not UTF-8"),
        ("bytes-after-the-end", "Nothing may follow the end record.",
         zip_bytes([member], after=b"x"), r"bytes after the end"),
        ("two-archives", "The offsets of the second archive are wrong.",
         whole + whole, r"not where its end record says"),
    ]  # fmt: skip


def _single() -> list[Row]:
    why = "A single array has no name, so nothing tells which tensor it is."
    return [
        (what, why, content, r"single numpy array")
        for what, content in (
            ("alone", npy()),
            ("alone-of-objects", npy(data=EVIL_PICKLE, descr="'|O'")),
        )
    ]


# -- what must be averaged: the numbers 0 to 7 in one file and 2 to 9 in the other


def _good() -> list[Case]:
    mean = [float(at) for at in range(1, 9)]
    columns = [1.0, 3, 5, 7, 2, 4, 6, 8]

    def with_savez(shape: Sequence[int], order: str, **more: object) -> Callable[..., bytes]:
        return lambda numbers: saved(
            np.savez,
            w=np.array(numbers, np.float32).reshape(tuple(shape), order=order),  # type: ignore[call-overload]
            **more,
        )

    def by_hand(version: int, order: str = "False") -> Callable[..., bytes]:
        return lambda numbers: npz(
            npy(data=struct.pack("<8f", *numbers), version=version, shape="(8,)", order=order)
        )

    made: Mapping[str, tuple[Callable[..., bytes], Mapping[str, Sequence[float]]]] = {
        "rows": (with_savez((2, 4), "C"), {"w": mean}),
        "columns": (with_savez((2, 4), "F"), {"w": columns}),
        "columns-of-three-axes": (with_savez((2, 2, 2), "F"), {"w": [1, 5, 3, 7, 2, 6, 4, 8]}),
        "version-2": (by_hand(2), {"w": mean}),
        "version-3": (by_hand(3), {"w": mean}),
        "vector-of-either-order": (by_hand(1, "True"), {"w": mean}),
        "beside-texts": (with_savez((8,), "C", note=np.array("x")), {"w": mean}),
        "beside-emptiness": (
            with_savez((8,), "C", none=np.empty((0, 3), np.float32), s=np.float32(3)),
            {"w": mean, "none": [], "s": [3]},
        ),
        "integers": (
            with_savez((8,), "C", n=np.array([2**53 + 1])),
            {"w": mean, "n": [2**53 + 1]},
        ),
        "name-that-climbs-out": (
            lambda numbers: npz(
                npy(data=struct.pack("<8f", *numbers), shape="(8,)"), "../../canary.npy"
            ),
            {"../../canary": mean},
        ),
    }
    return [
        Case(
            name=f"npz-good/{one}",
            why="An array is numbers in rows or columns behind a literal header.",
            build=both(make, suffix=".npz"),
            refusal=None,
            values=values,
        )
        for one, (make, values) in made.items()
    ]
