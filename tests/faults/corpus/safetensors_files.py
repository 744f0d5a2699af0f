"""safetensors files: each rule of the format broken by itself, and odd files that keep them all.

The rules are those of the format's description: 8 bytes of header length, little endian, at most
100,000,000; a JSON object that begins with ``{`` and names nothing twice; of each tensor dtype,
shape and data_offsets; data without holes or overlaps that ends with the file.
"""

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from hostile import entry, safetensors_bytes

from faults.case import Build, Case, alone

Stored = tuple[str, Sequence[int], bytes]  # dtype code, shape, data
Row = tuple[str, str, bytes, str]  # name, why, content, refusal

_NUMBERS = (3.0, 4.0, 5.0, 6.0)
_DATA = struct.pack("<4f", *_NUMBERS)
_ENTRY = '{"dtype":"F32","shape":[4],"data_offsets":[0,16]}'
_WHOLE = safetensors_bytes(f'{{"w":{_ENTRY}}}', _DATA)

NOT_JSON = "not valid JSON"
NO_BRACE = r"does not begin with '\{'|neither a safetensors file nor"


def floats(*values: float) -> Stored:
    """Return a float32 tensor of one dimension."""
    return "F32", [len(values)], struct.pack(f"<{len(values)}f", *values)


def numbers(code: str, kind: str, *values: float) -> Stored:
    """Return a tensor of one dimension; ``kind`` is what the struct module calls its elements."""
    return code, [len(values)], struct.pack(f"<{len(values)}{kind}", *values)


def weights(tensors: Mapping[str, Stored], metadata: Mapping[str, str] | None = None) -> bytes:
    """Return a whole safetensors file of these tensors, one after the other."""
    header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    data = b""
    for name, (code, shape, raw) in tensors.items():
        header[name] = entry(code, list(shape), len(data), len(data) + len(raw))
        data += raw
    return safetensors_bytes(header, data)


def cases() -> Sequence[Case]:
    """Return all cases of this module."""
    refused = [
        *_lengths(), *_json(), *_encodings(), *_duplicates(), *_entries(), *_dtypes(), *_shapes(),
        *_offsets(), *_overflows(), *_layouts(), *_metadata(), *_cuts(),
    ]  # fmt: skip
    return [
        *(
            Case(name=f"st/{name}", why=why, build=alone(content), refusal=refusal)
            for name, why, content, refusal in refused
        ),
        *_averaged(),
    ]


def _described(
    dtype: str = '"F32"', shape: str = "[4]", offsets: str = "[0,16]", more: str = ""
) -> bytes:
    """Return a file whose one entry has these values, as JSON text."""
    text = f'{{"w":{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}{more}}}}}'
    return safetensors_bytes(text, _DATA)


def _raw(header: str | bytes, data: bytes = _DATA) -> bytes:
    return safetensors_bytes(header, data)


# -- the length of the header


def _lengths() -> Iterator[Row]:
    size = len(_WHOLE) - 8 - len(_DATA)
    raw, too_many, cut = _WHOLE[8:], "at most 100000000", "truncated"
    for name, why, length, refusal in (
        ("zero", "A header has at least two bytes.", 0, NO_BRACE + f"|{NOT_JSON}|no header"),
        ("one_less", "The header is cut inside its JSON.", size - 1, NOT_JSON),
        ("one_more", "The first byte of the data is no JSON.", size + 1, NOT_JSON),
        ("past_the_end", "The header would end behind the file.", len(raw) + 1, cut),
        ("limit_past_the_end", "The header would end behind the file.", 100_000_000, cut),
        ("above_the_limit", "A header has at most 100,000,000 bytes.", 100_000_001, too_many),
        ("negative_as_32_bit", "A header has at most 100,000,000 bytes.", 2**32 - 1, too_many),
        ("sign_bit", "A header has at most 100,000,000 bytes.", 2**63, too_many),
        ("all_ones", "Adding 8 to the length would overflow 64 bits.", 2**64 - 1, too_many),
        ("wraps_to_zero", "Adding 8 to the length would overflow 64 bits.", 2**64 - 8, too_many),
        ("like_zip", "The length spells PK, but the file has no such header.", 0x04034B50, cut),
    ):
        yield f"length_{name}", why, length.to_bytes(8, "little") + raw, refusal
    yield (
        "length_big_endian", "The length is little endian.",
        size.to_bytes(8, "big") + raw, too_many,
    )  # fmt: skip
    yield (
        "length_of_four_bytes", "The length has 8 bytes.",
        size.to_bytes(4, "little") + raw, f"{NO_BRACE}|{too_many}",
    )  # fmt: skip
    yield "length_zero_alone", "A header has at least two bytes.", bytes(8), NO_BRACE
    yield "all_zeros", "Room that was reserved and never written.", bytes(4096), NO_BRACE


# -- JSON


def _json() -> Iterator[Row]:
    for name, why, text in (
        ("trailing_comma", "JSON has no trailing commas.", f'{{"w":{_ENTRY},}}'),
        ("no_comma", "JSON separates members by commas.", f'{{"w":{_ENTRY} "x":{_ENTRY}}}'),
        ("no_colon", "JSON separates names and values by colons.", f'{{"w" {_ENTRY}}}'),
        ("comment", "JSON has no comments.", f'{{/* */"w":{_ENTRY}}}'),
        ("single_quotes", "JSON has no single quotes.", f"{{'w':{_ENTRY}}}"),
        ("bare_name", "JSON quotes names.", f"{{w:{_ENTRY}}}"),
        ("number_as_name", "JSON names are strings.", f"{{1:{_ENTRY}}}"),
        ("raw_newline", "JSON strings hold no control characters.", f'{{"w\n":{_ENTRY}}}'),
        ("raw_tab", "JSON strings hold no control characters.", f'{{"w\t":{_ENTRY}}}'),
        ("raw_nul", "JSON strings hold no control characters.", f'{{"w\0":{_ENTRY}}}'),
        ("hex_escape", "JSON has no escape \\x.", f'{{"\\x77":{_ENTRY}}}'),
        ("short_escape", "JSON escapes have four digits.", f'{{"\\u77":{_ENTRY}}}'),
        ("open_object", "The object never ends.", f'{{"w":{_ENTRY}'),
        ("open_string", "The string never ends.", '{"w'),
        ("lone_brace", "The object never ends.", "{"),
        ("two_objects", "A header is one object.", f'{{"w":{_ENTRY}}}{{}}'),
        ("garbage_behind", "Only spaces may follow the object.", f'{{"w":{_ENTRY}}}x'),
        ("nul_padding", "A header is padded with spaces.", f'{{"w":{_ENTRY}}}\0\0\0'),
        ("form_feed_padding", "A form feed is no JSON space.", f'{{"w":{_ENTRY}}}\f'),
    ):
        yield name, why, _raw(text), NOT_JSON
    for name, text in (
        ("leading_zero", "[04]"), ("plus_sign", "[+4]"), ("hexadecimal", "[0x4]"),
        ("no_fraction", "[4.]"), ("underscore", "[1_0]"), ("python_true", "[True]"),
        ("hole_in_list", "[4,]"), ("full_width_digit", "[\uff14]"),
    ):  # fmt: skip
        yield name, "That is no JSON number or list.", _described(shape=text), NOT_JSON
    for name in ("NaN", "Infinity", "-Infinity"):
        why, refusal = "JSON has no such number.", f"{NOT_JSON}|{name}, which is not JSON"
        yield f"constant_{name}", why, _described(shape=f"[{name}]"), refusal
        yield f"entry_{name}", why, _raw(f'{{"w":{_ENTRY},"x":{name}}}'), refusal
    for name, opening, closing in (("lists", "[", "]"), ("objects", '{"a":', "}")):
        nested = opening * 50_000 + "1" + closing * 50_000
        why = "Nesting that deep overflows the stack of a recursive reader."
        yield f"deep_{name}", why, _raw(f'{{"w":{_ENTRY},"x":{nested}}}'), NOT_JSON
        yield (
            f"deep_{name}_as_shape", why, _described(shape=nested),
            f"{NOT_JSON}|list of sizes",
        )  # fmt: skip
    root = "The root of a header is an object that begins with the first byte."
    for name, text in (
        ("root_list", f"[{_ENTRY}]"), ("root_string", '"w"'), ("root_null", "null"),
        ("leading_space", f' {{"w":{_ENTRY}}}'), ("leading_newline", f'\n{{"w":{_ENTRY}}}'),
        ("byte_order_mark", f'\ufeff{{"w":{_ENTRY}}}'), ("leading_nul", f'\0{{"w":{_ENTRY}}}'),
    ):  # fmt: skip
        yield name, root, _raw(text), NO_BRACE


def _encodings() -> Iterator[Row]:
    why = "A header is UTF-8."
    for name, raw in (
        ("lone_byte", b"\xff"), ("latin_1", "é".encode("latin-1")), ("cut_sequence", b"\xe2\x82"),
        ("overlong_nul", b"\xc0\x80"), ("encoded_surrogate", b"\xed\xa0\x80"),
        ("beyond_unicode", b"\xf4\x90\x80\x80"),
    ):  # fmt: skip
        header = b'{"' + raw + b'":' + _ENTRY.encode() + b"}"
        yield f"encoding_{name}", why, _raw(header), NOT_JSON
    for name, codec in (("utf_16", "utf-16-le"), ("utf_32", "utf-32-le")):
        yield f"encoding_{name}", why, _raw(f'{{"w":{_ENTRY}}}'.encode(codec)), NOT_JSON
    half = "Half of a surrogate pair is no character."
    for name, text in (
        ("high_half", "\\ud800"), ("low_half", "\\udc00"), ("halves_swapped", "\\udc00\\ud800"),
        ("capital_half", "\\uDBFF"), ("half_before_text", "\\ud83dx"),
    ):  # fmt: skip
        yield f"surrogate_{name}", half, _raw(f'{{"{text}":{_ENTRY}}}'), NOT_JSON
    metadata = f'{{"__metadata__":{{"\\ud800":"x"}},"w":{_ENTRY}}}'
    yield "surrogate_in_metadata", half, _raw(metadata), NOT_JSON


def _duplicates() -> Iterator[Row]:
    other = '{"dtype":"F32","shape":[4],"data_offsets":[16,32]}'
    why = "Two readers would take different tensors: a header names nothing twice."
    for name, text, twice in (
        ("equal", f'{{"w":{_ENTRY},"w":{_ENTRY}}}', "w"),
        ("other_place", f'{{"w":{_ENTRY},"w":{other}}}', "w"),
        ("escaped", f'{{"w":{_ENTRY},"\\u0077":{_ENTRY}}}', "w"),
        ("escaped_slash", f'{{"a/b":{_ENTRY},"a\\/b":{_ENTRY}}}', "a/b"),
        ("escaped_pair", f'{{"\U0001f600":{_ENTRY},"\\ud83d\\ude00":{_ENTRY}}}', "\U0001f600"),
        ("hidden_by_wrong_entry", f'{{"w":0,"w":{_ENTRY}}}', "w"),
        ("metadata", f'{{"__metadata__":{{}},"w":{_ENTRY},"__metadata__":{{}}}}', "__metadata__"),
        (
            "metadata_escaped",
            f'{{"__metadata__":{{}},"w":{_ENTRY},"\\u005f_metadata__":{{}}}}',
            "__metadata__",
        ),
        ("in_metadata", f'{{"__metadata__":{{"step":"1","step":"2"}},"w":{_ENTRY}}}', "step"),
    ):
        data = _DATA * 2 if name == "other_place" else _DATA
        yield f"twice_{name}", why, _raw(text, data), f"'{twice}' twice"
    for field, value in (("dtype", '"I32"'), ("shape", "[2,2]"), ("data_offsets", "[0,16]")):
        content = _described(more=f',"{field}":{value}')
        yield f"twice_field_{field}", why, content, f"'{field}' twice"


# -- entries


def _entries() -> Iterator[Row]:
    fields, refusal = "An entry has dtype, shape and data_offsets, and nothing else.", "'w'.*fields"
    for name, text in (
        ("list", '["F32",[4],[0,16]]'), ("list_of_pairs", '[["dtype","F32"]]'), ("null", "null"),
        ("string", '"F32"'), ("number", "1"), ("true", "true"), ("empty", "{}"),
        ("no_dtype", '{"shape":[4],"data_offsets":[0,16]}'),
        ("no_shape", '{"dtype":"F32","data_offsets":[0,16]}'),
        ("no_offsets", '{"dtype":"F32","shape":[4]}'),
        ("capitals", '{"Dtype":"F32","Shape":[4],"Data_offsets":[0,16]}'),
        ("space_in_field", '{"dtype ":"F32","shape":[4],"data_offsets":[0,16]}'),
    ):  # fmt: skip
        yield f"entry_{name}", fields, _raw(f'{{"w":{text}}}'), refusal
    yield "entry_strides", fields, _described(more=',"strides":[1]'), refusal
    yield "entry_empty_field", fields, _described(more=',"":0'), refusal


def _dtypes() -> Iterator[Row]:
    for name, code in (
        ("unknown", "F33"), ("lower_case", "f32"), ("empty", ""), ("torch_name", "float32"),
        ("trailing_space", "F32 "), ("trailing_nul", "F32\\u0000"), ("escape", "F\\u001b[2J"),
        ("no_such_complex", "C128"), ("no_such_float8", "F8_E3M4"), ("numpy_name", "<f4"),
    ):  # fmt: skip
        why = "The format has no such dtype."
        yield f"dtype_{name}", why, _described(dtype=f'"{code}"'), "unknown dtype '"
    for name, text in (
        ("null", "null"), ("number", "32"), ("list", '["F32"]'), ("object", '{"F32":1}'),
        ("true", "true"),
    ):  # fmt: skip
        yield f"dtype_{name}", "A dtype is a string.", _described(dtype=text), "no string"
    bits = "Elements of 4 or 6 bits must fill whole bytes."
    for code, size, end in (("F4", 3, 1), ("F4", 3, 2), ("F6_E2M3", 3, 2), ("F6_E3M2", 1, 1)):
        content = safetensors_bytes({"w": entry(code, [size], 0, end)}, bytes(end))
        yield f"bits_{code}_of_{size}_in_{end}", bits, content, "ends inside a byte"
    for code, size, end in (("F4", 8, 8), ("F6_E2M3", 4, 4), ("F4", 2, 2)):
        content = safetensors_bytes({"w": entry(code, [size], 0, end)}, bytes(end))
        why = "Elements narrower than a byte are packed."
        yield f"bits_{code}_of_{size}_unpacked", why, content, r"needs \d bytes"
    for code, size, end in (
        ("F4", 8, 4), ("F6_E2M3", 4, 3), ("F6_E3M2", 4, 3), ("F8_E4M3", 4, 4), ("F8_E5M2", 4, 4),
        ("F8_E8M0", 4, 4), ("F8_E4M3FNUZ", 4, 4), ("F8_E5M2FNUZ", 4, 4),
    ):  # fmt: skip
        content = safetensors_bytes({"w": entry(code, [size], 0, end)}, bytes(end))
        why = "The mean of quantised codes is not the code of the mean."
        yield f"quantised_{code}", why, content, "'w'.*is quantised"


def _shapes() -> Iterator[Row]:
    why, refusal = "A shape is a list of non-negative integers.", "'w'.*list of sizes"
    for name, text in (
        ("fraction", "[4.0]"), ("exponent", "[4e0]"), ("true", "[true]"), ("string", '["4"]'),
        ("null_size", "[null]"), ("nested", "[[4]]"), ("negative", "[-4]"),
        ("negative_pair", "[-2,-2]"), ("minus_zero", "[-0]"), ("infinite", "[1e999]"),
        ("null", "null"), ("number", "4"), ("text", '"4"'), ("object", '{"0":4}'),
    ):  # fmt: skip
        yield f"shape_{name}", why, _described(shape=text), refusal
    needs = "Shape, dtype and data_offsets must agree."
    for name, shape, offsets in (
        ("too_large", "[5]", "[0,16]"), ("too_small", "[3]", "[0,16]"), ("scalar", "[]", "[0,16]"),
        ("scalar_empty", "[]", "[0,0]"), ("zero_with_data", "[0]", "[0,16]"),
        ("zero_among_sizes", "[4,0,4]", "[0,16]"),
    ):  # fmt: skip
        yield f"shape_{name}", needs, _described(shape=shape, offsets=offsets), r"needs \d+ bytes"
    ones = json.dumps([1] * 64 + [4])
    yield (
        "shape_65_dimensions",
        "A tensor of torch has at most 64.",
        _described(shape=ones),
        "65 dim",
    )


def _offsets() -> Iterator[Row]:
    why, refusal = "data_offsets are two integers, 0 <= begin <= end.", "'w'.*byte range"
    for name, text in (
        ("fraction", "[0.0,16]"), ("exponent", "[0,16e0]"), ("false", "[false,16]"),
        ("string", '["0","16"]'), ("null_end", "[0,null]"), ("negative", "[-16,0]"),
        ("negative_end", "[0,-16]"), ("minus_zero", "[-0,16]"), ("swapped", "[16,0]"),
        ("one", "[16]"), ("three", "[0,8,16]"), ("none", "[]"), ("nested", "[[0,16]]"),
        ("null", "null"), ("number", "16"), ("text", '"0,16"'), ("object", '{"0":0,"1":16}'),
    ):  # fmt: skip
        yield f"offsets_{name}", why, _described(offsets=text), refusal


def _overflows() -> Iterator[Row]:
    why = "The product of the sizes overflows 64 bits, and would wrap to what the offsets say."
    for name, dtype, shape, end in (
        ("wraps_to_zero", "F32", [2**32, 2**32], 0),
        ("wraps_to_sixteen", "U8", [2**62 + 4, 4], 16),
        ("bits_wrap_to_zero", "F64", [2**61], 0),
        ("bytes_wrap_to_zero", "F32", [2**62], 0),
        ("hidden_by_last_zero", "F32", [2**32, 2**32, 0], 0),
        ("hidden_by_first_zero", "F32", [0, 2**64], 0),
        ("hidden_between", "U8", [2**62, 0, 2**62], 0),
        ("beyond_signed", "U8", [2**63, 0], 0),
        ("beyond_unsigned", "U8", [2**64 + 16], 16),
        ("thousands_of_digits", "U8", [10**4000], 16),
    ):
        content = safetensors_bytes({"w": entry(dtype, shape, 0, end)}, bytes(end))
        yield f"overflow_{name}", why, content, "'w'.*impossible size"
    beyond = "data_offsets lie within the file."
    for name, begin, end in (
        ("end", 0, 2**64), ("wrapping_begin", 2**64 - 16, 2**64), ("signed", 2**63, 2**63 + 16),
    ):  # fmt: skip
        content = safetensors_bytes({"w": entry("F32", [4], begin, end)}, _DATA)
        yield f"overflow_offset_{name}", beyond, content, r"'w'.*(needs 16 bytes|hole before it)"
    digits = "9" * 5000
    yield (
        "overflow_offset_digits", beyond, _described(offsets=f"[0,{digits}]"),
        f"{NOT_JSON}|needs 16 bytes",
    )  # fmt: skip


# -- the layout of the data


def _layouts() -> Iterator[Row]:
    hole, overlap = "The data has no holes.", "No byte belongs to two tensors."
    for name, why, places, size, refusal in (
        ("hole_first", hole, {"w": (4, 4, 20)}, 20, "'w'.*hole.*byte 4, expected 0"),
        ("hole_between", hole, {"w": (4, 0, 16), "x": (1, 20, 24)}, 24, "'x'.*hole"),
        ("hole_before_empty", hole, {"w": (4, 0, 16), "e": (0, 20, 20)}, 20, "'e'.*hole"),
        ("overlap_same", overlap, {"w": (4, 0, 16), "x": (4, 0, 16)}, 16, "'[wx]'.*overlaps"),
        ("overlap_partial", overlap, {"w": (4, 0, 16), "x": (4, 12, 28)}, 28, "'x'.*overlaps"),
        ("overlap_inside", overlap, {"w": (4, 0, 16), "x": (1, 4, 8)}, 16, "'x'.*overlaps"),
        ("overlap_empty", overlap, {"w": (4, 0, 16), "e": (0, 8, 8)}, 16, "'e'.*overlaps"),
        ("past_the_end", "The data ends with the file.", {"w": (5, 0, 20)}, 16, "truncated"),
        ("second_past_the_end", "The data ends with the file.",
         {"w": (4, 0, 16), "x": (2, 16, 24)}, 20, "truncated"),
        ("swapped_cut", "The data ends with the file.",
         {"x": (4, 4, 20), "w": (1, 0, 4)}, 16, "truncated"),
    ):  # fmt: skip
        header = {key: entry("F32", [n], begin, end) for key, (n, begin, end) in places.items()}
        yield f"layout_{name}", why, safetensors_bytes(header, bytes(size)), refusal
    longer, behind = "longer than it should be", "Bytes behind the data could hide anything."
    yield "layout_one_byte_more", behind, _WHOLE + b"\0", longer
    yield "layout_zip_behind", behind, _WHOLE + b"PK\5\6" + bytes(18), longer
    yield "layout_file_twice", behind, _WHOLE + _WHOLE, longer
    yield "layout_data_without_tensors", behind, _raw("{}"), longer
    nothing = "There is nothing to average without a tensor."
    yield "layout_header_alone", nothing, _raw("{}", b""), "nothing to average"
    yield (
        "layout_metadata_alone", nothing, _raw('{"__metadata__":{"format":"pt"}}', b""),
        "nothing to average",
    )  # fmt: skip


def _metadata() -> Iterator[Row]:
    for name, text in (
        ("null", "null"), ("list", "[]"), ("string", '"pt"'), ("number", "1"), ("true", "true"),
        ("number_value", '{"step":1}'), ("null_value", '{"step":null}'),
        ("true_value", '{"step":true}'), ("list_value", '{"step":["1"]}'),
        ("nested", '{"a":{"b":"c"}}'), ("entry", _ENTRY),
    ):  # fmt: skip
        content = _raw(f'{{"__metadata__":{text},"w":{_ENTRY}}}')
        yield f"metadata_{name}", "Metadata maps strings to strings.", content, "map of strings"


def _cuts() -> Iterator[Row]:
    header_end = len(_WHOLE) - len(_DATA)
    why = "A copy was cut short, or is still under way."
    for name, size, refusal in (
        ("nothing", 0, r"empty \(0 bytes\)"),
        ("one_byte", 1, f"{NO_BRACE}|too short"),
        ("seven_bytes", 7, f"{NO_BRACE}|too short"),
        ("length_alone", 8, f"{NO_BRACE}|truncated"),
        ("first_brace", 9, "truncated"),
        ("half_header", 8 + (header_end - 8) // 2, "truncated"),
        ("last_brace_missing", header_end - 1, "truncated"),
        ("header_alone", header_end, "truncated"),
        ("one_byte_of_data", header_end + 1, "truncated"),
        ("half_element", header_end + 6, "truncated"),
        ("whole_elements", header_end + 8, "truncated"),
        ("last_byte_missing", len(_WHOLE) - 1, "truncated"),
    ):
        yield f"cut_{name}", why, _WHOLE[:size], refusal


# -- what must be averaged


def _averaged() -> Iterator[Case]:
    yield from _averaged_layouts()
    yield from _averaged_names()
    yield from _averaged_dtypes()


def pair(first: bytes, last: bytes, *options: str) -> Build:
    """Return what builds two checkpoints of these contents."""

    def build(directory: Path) -> Sequence[str]:
        (directory / "first.safetensors").write_bytes(first)
        (directory / "last.safetensors").write_bytes(last)
        return ["first.safetensors", "last.safetensors", *options]

    return build


def _one_header(header: str | bytes, names: Sequence[str] = ("w",), *, data: bytes = b"") -> Build:
    """Return what builds two files of one header: of 1, 2, 3, 4 and of 3, 4, 5, 6."""
    behind = data * (len(names) - 1)
    one, other = struct.pack("<4f", 1, 2, 3, 4), _DATA
    return pair(_raw(header, one + behind), _raw(header, other + behind))


def _averaged_layouts() -> Iterator[Case]:
    mean = {"w": (2.0, 3.0, 4.0, 5.0)}
    empty = '{"dtype":"F32","shape":[0,3],"data_offsets":'
    padded = f'{{"w":{_ENTRY}}}'
    dims = json.dumps([1] * 30 + [4] + [1] * 33)
    for name, why, header in (
        ("padding", "A header may end in spaces.", padded + " " * 9),
        ("long_padding", "A header may end in spaces.", padded + " " * 100_000),
        ("length_like_pickle", "The length 640 begins as a pickle does.", padded.ljust(0x280)),
        ("length_like_gzip", "The length 35615 begins as gzip does.", padded.ljust(0x8B1F)),
        ("length_like_zip", "The length 19280 spells PK.", padded.ljust(0x4B50)),
        ("unaligned", "Data need not be aligned.", padded.ljust(len(padded) | 7)),
        ("indented", "JSON may hold spaces.", json.dumps(json.loads(padded), indent="\t")),
        ("fields_in_any_order", "JSON objects have no order.",
         '{"w":{"data_offsets":[0,16],"shape":[4],"dtype":"F32"}}'),
        ("escaped_name", "JSON may escape any character.",
         f'{{"\\u0077":{_ENTRY}}}'.replace("dtype", "\\u0064type").replace("F32", "F\\u00332")),
        ("metadata_last", "Metadata may stand anywhere.",
         f'{{"w":{_ENTRY},"__metadata__":{{"format":"pt"}}}}'),
        ("metadata_of_anything", "Metadata values are any strings.",
         f'{{"__metadata__":{{"":"","a\\u0000b":"\\u001b[2J","{{":"\\ud83d\\ude00"}},"w":{_ENTRY}}}'),
        ("empty_behind", "A tensor without elements is a tensor.",
         f'{{"w":{_ENTRY},"empty":{empty}[16,16]}}}}'),
        ("empty_in_front", "A tensor without elements takes no room.",
         f'{{"w":{_ENTRY},"empty":{empty}[0,0]}}}}'),
        ("two_empty", "Tensors without elements may share a place.",
         f'{{"e":{empty}[16,16]}},"w":{_ENTRY},"empty":{empty}[16,16]}}}}'),
        ("dimensions_64", "A tensor may have 64 dimensions.",
         f'{{"w":{{"dtype":"F32","shape":{dims},"data_offsets":[0,16]}}}}'),
    ):  # fmt: skip
        values = mean | ({"empty": ()} if '"empty"' in header else {})
        build = _one_header(header)
        yield Case(name=f"st/ok_{name}", why=why, build=build, refusal=None, values=values)
    yield Case(
        name="st/ok_scalar",
        why="A tensor without dimensions has one element.",
        build=pair(
            weights({"w": floats(1, 2), "s": ("F32", [], struct.pack("<f", 1))}),
            weights({"w": floats(3, 4), "s": ("F32", [], struct.pack("<f", 4))}),
        ),
        refusal=None,
        values={"w": (2, 3), "s": (2.5,)},
    )
    swapped = '{"w":{"dtype":"F32","shape":[2],"data_offsets":[1,9]},'
    swapped += '"u":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    yield Case(
        name="st/ok_order_of_data",
        why="The header need not be in the order of the data, nor the data aligned.",
        build=pair(
            _raw(swapped, b"\7" + struct.pack("<2f", 1, 2)),
            _raw(swapped, b"\7" + struct.pack("<2f", 3, 4)),
        ),
        refusal=None,
        values={"w": (2, 3), "u": (7,)},
    )


def _averaged_names() -> Iterator[Case]:
    for name, tensor in (
        ("quotes", "a\"b'c"), ("backslash", "a\\b\\u0041"), ("newline", "a\nb\r\nc"),
        ("escape_sequence", "\x1b[31mred\x1b[0m"), ("nul", "a\0b"), ("empty", ""),
        ("space", " "), ("right_to_left", "a\u202eb"), ("line_separator", "a\u2028b"),
        ("emoji", "\U0001f600.weight"), ("noncharacter", "\uffff"), ("path", "../../etc/passwd"),
        ("like_metadata", "__metadata__ "), ("like_field", "data_offsets"),
        ("long", "layer." * 333 + "w"), ("digits", "0"), ("json", '{"w":1}'),
    ):  # fmt: skip
        yield Case(
            name=f"st/ok_name_{name}",
            why="A tensor's name is any string, and is kept as it is.",
            build=pair(weights({tensor: floats(1, 2)}), weights({tensor: floats(3, 4)})),
            refusal=None,
            values={tensor: (2, 3)},
        )
    composed, decomposed = "\u00e9", "e\u0301"
    yield Case(
        name="st/ok_name_normal_forms",
        why="Names that look alike are different names.",
        build=pair(
            weights({composed: floats(1), decomposed: floats(10), "E": floats(0), "e": floats(5)}),
            weights({composed: floats(3), decomposed: floats(20), "E": floats(1), "e": floats(6)}),
        ),
        refusal=None,
        values={composed: (2,), decomposed: (15,), "E": (0.5,), "e": (5.5,)},
    )


def _averaged_dtypes() -> Iterator[Case]:
    bfloat = {1.0: b"\x80\x3f", 2.0: b"\x00\x40", 3.0: b"\x40\x40"}
    for name, why, one, other, options, values in (
        ("f64", "Averages keep their dtype.",
         numbers("F64", "d", 1, 2**53), numbers("F64", "d", 2, 2**53 + 4), (),
         (1.5, 2**53 + 2)),
        ("f16", "Averages keep their dtype.",
         numbers("F16", "e", 1, -2), numbers("F16", "e", 2, -3), (), (1.5, -2.5)),
        ("bf16", "bfloat16 is the upper half of float32.",
         ("BF16", [2], bfloat[1.0] + bfloat[2.0]), ("BF16", [2], bfloat[2.0] + bfloat[3.0]),
         ("--dtype", "float32"), (1.5, 2.5)),
        ("subnormal_f32", "The smallest values are not lost.",
         floats(2**-149, -(2**-149)), floats(3 * 2**-149, -(2**-149)), (),
         (2 * 2**-149, -(2**-149))),
        ("subnormal_f64", "The smallest values are not lost.",
         numbers("F64", "d", 5e-324), numbers("F64", "d", 5e-324), (), (5e-324,)),
        ("subnormal_f16", "The smallest values are not lost.",
         numbers("F16", "e", 2**-24), numbers("F16", "e", 3 * 2**-24), (), (2 * 2**-24,)),
        ("minus_zero", "The mean of -0 and -0 is -0.",
         floats(-0.0, 0.0), floats(-0.0, 0.0), (), (-0.0, 0.0)),
        ("mixed_zeros", "The mean of -0 and 0 is 0.",
         floats(-0.0, 0.0), floats(0.0, -0.0), (), (0.0, 0.0)),
        ("cancelling", "Values that cancel leave nothing.",
         floats(1, -1e30), floats(-1, 1e30), (), (0.0, 0.0)),
    ):  # fmt: skip
        yield Case(
            name=f"st/ok_dtype_{name}",
            why=why,
            build=pair(weights({"w": one}), weights({"w": other}), *options),
            refusal=None,
            values={"w": values},
        )
    whole = {
        "u8": numbers("U8", "B", 0, 255), "i8": numbers("I8", "b", -128, 127),
        "u16": numbers("U16", "H", 65535), "i16": numbers("I16", "h", -32768),
        "u32": numbers("U32", "I", 2**32 - 1), "i32": numbers("I32", "i", -(2**31)),
        "u64": numbers("U64", "Q", 2**64 - 1), "i64": numbers("I64", "q", 2**53 + 1),
        "bool": ("BOOL", [2], b"\0\1"),
    }  # fmt: skip
    yield Case(
        name="st/ok_dtype_integers",
        why="Integers are copied, not sent through floating point.",
        build=pair(weights({"w": floats(1), **whole}), weights({"w": floats(3), **whole})),
        refusal=None,
        values={
            "w": (2,), "u8": (0, 255), "i32": (-(2**31),), "i64": (2**53 + 1,), "bool": (0, 1),
        },
    )  # fmt: skip
    yield Case(
        name="st/ok_dtype_complex",
        why="Complex numbers are averaged as such, beside real ones.",
        build=pair(
            weights({"w": floats(1), "c": ("C64", [1], struct.pack("<2f", 1, 2))}),
            weights({"w": floats(3), "c": ("C64", [1], struct.pack("<2f", 3, 4))}),
        ),
        refusal=None,
        values={"w": (2,)},
    )
