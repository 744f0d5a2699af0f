"""Checkpoints that are sound one by one, but not together, or not with where they shall go."""

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from hostile import Member, legacy_bytes, mapping, tensor, torch_bytes, zip_bytes

from faults.case import Case, good_safetensors
from faults.corpus.safetensors_files import Stored, floats, numbers, weights
from faults.corpus.shard_sets import INDEX, Content, fifo, folder, index_bytes, laid_out, link

Values = Mapping[str, Sequence[float]]
Tensors = Mapping[str, Stored]

_INF, _NAN = float("inf"), float("nan")
_ONE = good_safetensors(1, 2, 3, 4)
_TWO = good_safetensors(3, 4, 5, 6)
_MEAN: Values = {"w": (2.0, 3.0, 4.0, 5.0)}
_FILES = ("first.safetensors", "last.safetensors")
_MODEL = "model.safetensors"
_NON_FINITE = r"'w'.*checkpoint {} of 2.* {} non-finite"


def cases() -> Sequence[Case]:
    """Return all cases of this module."""
    return [
        *_names(), *_prefixes(), *_shapes_and_dtypes(), *_non_finite(), *_extremes(),
        *_integers(), *_quantised(), *_ties(), *_same_twice(), *_orders(), *_formats(),
        *_adapters(), *_side_files(), *_options(), *_outputs_at_inputs(), *_outputs_that_exist(),
        *_odd_outputs(), *_sources(),
    ]  # fmt: skip


def _two(
    name: str,
    why: str,
    first: Tensors | bytes,
    last: Tensors | bytes,
    *options: str,
    refusal: str | None = None,
    culprit: str | None = None,
    exit_code: int = 1,
    values: Values | None = None,
) -> Case:
    """Return a case of two safetensors files."""
    contents = [one if isinstance(one, bytes) else weights(one) for one in (first, last)]
    return Case(
        name=f"set/{name}",
        why=why,
        build=laid_out(dict(zip(_FILES, contents, strict=True)), *_FILES, *options),
        refusal=refusal,
        culprit=_FILES[1] if culprit is None and refusal else culprit,
        exit_code=exit_code,
        values=values,
    )


# -- names, shapes, dtypes


def _names() -> Iterator[Case]:
    why = "What one checkpoint lacks has no mean."
    base = {"w": floats(1, 2)}
    more = {**base, "b": floats(3)}
    many = {f"layer{number}": floats(number) for number in range(9)}
    both = r"'{}' is in {}.safetensors, not in {}.safetensors"
    for name, first, last, refusal in (
        ("missing_in_first", base, more, both.format("b", "last", "first")),
        ("missing_in_last", more, base, both.format("b", "first", "last")),
        ("other_capitals", {"W": floats(1, 2)}, base, both.format("[wW]", "last", "first")),
        ("trailing_space", {"w ": floats(1, 2)}, base, both.format("w ?", "last", "first")),
        ("nothing_shared", {"x": floats(1)}, {"y": floats(1)}, both.format("y", "last", "first")),
        ("other_normal_form", {"\u00e9": floats(1)}, {"e\u0301": floats(1)}, "checkpoints differ"),
        ("missing_empty", base, {**base, "e": ("F32", [0], b"")}, "'e' is in last"),
        ("missing_many", base, {**base, **many}, r"'layer0' is in last.*and 4 more"),
    ):  # fmt: skip
        yield _two(f"key_{name}", why, first, last, refusal=refusal)


def _prefixes() -> Iterator[Case]:
    module = {"module.w": floats(1, 2), "module.b": floats(3)}
    plain = {"w": floats(3, 4), "b": floats(5)}
    compiled = {f"_orig_mod.{name}": stored for name, stored in plain.items()}
    doubled = {f"module._orig_mod.{name}": stored for name, stored in plain.items()}
    mean: Values = {"w": (2, 3), "b": (4,)}
    why, all_have = "A wrapper's prefix is no part of a name.", "All names have the prefix."
    strip = ("--strip-prefix", "module.")
    for name, first, last, prefix in (
        ("module_in_first", module, plain, "module."), ("module_in_last", plain, module, "module."),
        ("compiled_in_last", plain, compiled, "_orig_mod."),
        ("model_in_last", plain, {f"model.{key}": one for key, one in plain.items()}, "model."),
    ):  # fmt: skip
        yield _two(f"prefix_{name}", why, first, last, refusal=rf"differ.*--strip-prefix {prefix}")
    yield _two(
        "prefix_module_and_compiled", why, module, compiled, refusal="the checkpoints differ"
    )
    yield _two(
        "prefix_collision", "Two tensors cannot have one name.", {**module, **plain},
        {**module, **plain}, *strip, refusal="two tensor names become one", culprit=_FILES[0],
    )  # fmt: skip
    yield _two(
        "prefix_nowhere", "A prefix that no name has is a mistake.", plain, plain,
        "--strip-prefix", "modul.", refusal="begins with 'modul.'", culprit="--strip-prefix",
    )  # fmt: skip
    yield _two("ok_prefix_stripped", why, module, plain, *strip, values=mean)
    yield _two(
        "ok_prefix_two_stripped", why, module, compiled, *strip, "--strip-prefix", "_orig_mod.",
        values=mean,
    )  # fmt: skip
    yield _two("ok_prefix_in_all", all_have, module, module, values={"w": (1, 2), "b": (3,)})
    yield _two("ok_prefix_two_in_all", all_have, doubled, doubled, values={"w": (3, 4), "b": (5,)})
    yield _two(
        "ok_prefix_not_in_all_names", "A name of its own may begin like a wrapper's.",
        {"module.w": floats(1), "b": floats(2)}, {"module.w": floats(3), "b": floats(4)},
        values={"module.w": (2,), "b": (3,)},
    )  # fmt: skip


def _shapes_and_dtypes() -> Iterator[Case]:
    same = "Values that are no counterparts have no mean."
    four = struct.pack("<4f", 1, 2, 3, 4)
    shape = r"'w' has shape \[{}\] in first.safetensors, \[{}\] in last.safetensors"
    for name, one, other in (
        ("flat", [4], [2, 2]), ("transposed", [1, 4], [4, 1]), ("one_more_dimension", [4], [1, 4]),
        ("scalar", [1], []), ("broadcast", [4], [1]), ("empty", [4], [0]),
        ("empty_otherwise", [0, 3], [3, 0]),
    ):  # fmt: skip
        first, last = (
            ("F32", sizes, four[: 0 if 0 in sizes else 16 if 4 in sizes or 2 in sizes else 4])
            for sizes in (one, other)
        )
        told = shape.format(*(", ".join(map(str, sizes)) for sizes in (one, other)))
        more = {"b": floats(1)}
        yield _two(f"shape_{name}", same, {"w": first, **more}, {"w": last, **more}, refusal=told)
    half = numbers("F16", "e", 1, 2)
    bfloat: Stored = ("BF16", [2], b"\x80\x3f\x00\x40")
    both, asked = "'w' is {} in first.safetensors, {} in last.safetensors", ".*--dtype"
    for name, one_dtype, other_dtype, told in (
        ("half_and_single", half, floats(3, 4), both.format("float16", "float32") + asked),
        ("bfloat_and_half", bfloat, half, both.format("bfloat16", "float16") + asked),
        ("double_and_single", numbers("F64", "d", 1, 2), floats(3, 4),
         both.format("float64", "float32") + asked),
        ("integer_and_float", numbers("I32", "i", 1, 2), floats(3, 4),
         both.format("int32", "float32")),
        ("complex_and_float", ("C64", [2], bytes(16)), floats(3, 4),
         both.format("complex64", "float32")),
        ("bool_and_byte", ("BOOL", [2], b"\0\1"), numbers("U8", "B", 0, 1),
         both.format("bool", "uint8")),
        ("signed_and_unsigned", numbers("I8", "b", 1, 2), numbers("U8", "B", 1, 2),
         both.format("int8", "uint8")),
    ):  # fmt: skip
        yield _two(
            f"dtype_{name}", "Which dtype the mean should have is not known.",
            {"w": one_dtype, "b": floats(1)}, {"w": other_dtype, "b": floats(1)}, refusal=told,
        )  # fmt: skip
    yield _two(
        "ok_dtype_asked_for", "Every float16 is a float32.", {"w": half}, {"w": floats(3, 4)},
        "--dtype", "float32", values={"w": (2, 3)},
    )  # fmt: skip


# -- values


def _non_finite() -> Iterator[Case]:
    why = "One value that is not finite spoils the mean, and perhaps the training that made it."
    good = floats(1, 2, 3)
    for name, bad, count in (
        ("nan", floats(1, _NAN, 3), 1), ("inf", floats(_INF, 2, 3), 1),
        ("minus_inf", floats(1, 2, -_INF), 1), ("all", floats(_NAN, _INF, -_INF), 3),
        ("nan_f16", numbers("F16", "e", 1, _NAN, 3), 1),
        ("nan_f64", numbers("F64", "d", 1, _NAN, _NAN), 2),
        ("nan_bf16", ("BF16", [3], b"\x80\x3f\xc0\x7f\x80\x3f"), 1),
        ("signalling_nan", ("F32", [3], bytes(4) + b"\1\0\x80\x7f" + bytes(4)), 1),
        ("nan_complex", ("C64", [3], struct.pack("<6f", 1, _NAN, 1, 1, 1, 1)), 1),
    ):  # fmt: skip
        whole = good if bad[0] == "F32" else (bad[0], bad[1], bytes(len(bad[2])))
        yield _two(
            f"nonfinite_{name}", why, {"w": whole}, {"w": bad},
            refusal=_NON_FINITE.format(2, count),
        )  # fmt: skip
    yield _two(
        "nonfinite_in_first", why, {"w": floats(_NAN, 2)}, {"w": floats(1, 2)},
        refusal=_NON_FINITE.format(1, 1), culprit=_FILES[0],
    )  # fmt: skip
    yield _two(
        "nonfinite_nan_in_both", why, {"w": floats(_NAN, 2)}, {"w": floats(_NAN, 2)},
        refusal=_NON_FINITE.format("[12]", 1), culprit="",
    )  # fmt: skip
    yield _two(
        "nonfinite_opposite", "inf and -inf have no mean.", {"w": floats(_INF, 2)},
        {"w": floats(-_INF, 2)}, refusal=_NON_FINITE.format("[12]", 1), culprit="",
    )  # fmt: skip
    allow = ("--allow-nonfinite",)
    for name, why, one, other, options, values in (
        ("mask", "A mask of -inf is the same in all.", floats(-_INF, 1), floats(-_INF, 3), (),
         (-_INF, 2)),
        ("inf_mask", "A mask of inf is the same in all.", floats(_INF, 1), floats(_INF, 3), (),
         (_INF, 2)),
        ("mask_f16", "A mask of -inf is the same in all.", numbers("F16", "e", -_INF, 1),
         numbers("F16", "e", -_INF, 3), (), (-_INF, 2)),
        ("mask_f64", "A mask of -inf is the same in all.", numbers("F64", "d", -_INF, 1),
         numbers("F64", "d", -_INF, 3), (), (-_INF, 2)),
        ("nan_allowed", "IEEE 754 says what comes of it.", floats(_NAN, 1), floats(2, 3), allow,
         (_NAN, 2)),
        ("inf_allowed", "IEEE 754 says what comes of it.", floats(_INF, 1), floats(2, 3), allow,
         (_INF, 2)),
        ("opposite_allowed", "inf and -inf have no mean.", floats(_INF, 1), floats(-_INF, 3),
         allow, (_NAN, 2)),
    ):  # fmt: skip
        yield _two(
            f"ok_nonfinite_{name}", why, {"w": one}, {"w": other}, *options, values={"w": values}
        )


def _extremes() -> Iterator[Case]:
    single, double = 3.4028234663852886e38, 1.7976931348623157e308
    why = "The sum overflows the dtype, the mean does not."
    for name, one, other, values in (
        ("f16", numbers("F16", "e", 65504, -65504), numbers("F16", "e", 65504, -65504),
         (65504, -65504)),
        ("f32", floats(single, -single), floats(single, -single), (single, -single)),
        ("f64", numbers("F64", "d", double, -double), numbers("F64", "d", double, -double),
         (double, -double)),
        ("f32_apart", floats(2.0**127, 1), floats(1.5 * 2.0**127, 3), (1.25 * 2.0**127, 2)),
    ):  # fmt: skip
        yield _two(f"ok_sum_{name}", why, {"w": one}, {"w": other}, values={"w": values})
    yield _two(
        "overflow_of_asked_dtype", "The mean does not fit the dtype that was asked for.",
        {"w": floats(1e30)}, {"w": floats(1e30)}, "--dtype", "float16",
        refusal="'w'.*overflow float16", culprit="'w'",
    )  # fmt: skip
    yield _two(
        "overflow_of_coefficients", "Coefficients beyond 1 lead out of the range.",
        {"w": floats(-3e38)}, {"w": floats(3e38)}, "--coefficients=-1,2",
        refusal="'w'.*overflow float32", culprit="'w'",
    )  # fmt: skip
    hundred = {f"{number:03}.safetensors": good_safetensors(0.1, 1e-8) for number in range(100)}
    tenth, small = struct.unpack("<2f", struct.pack("<2f", 0.1, 1e-8))
    yield Case(
        name="set/ok_hundred_equal",
        why="The mean of equal checkpoints is that checkpoint, bit for bit.",
        build=laid_out(hundred, *hundred),
        refusal=None,
        values={"w": (tenth, small)},
    )


def _integers() -> Iterator[Case]:
    nothing = "There is nothing to average without floating point."
    count = numbers("I64", "q", 7)
    for name, stored in (
        ("integers", count), ("bytes", numbers("U8", "B", 1, 2)), ("bools", ("BOOL", [1], b"\1")),
        ("no_elements", ("I64", [0], b"")),
    ):  # fmt: skip
        for last in ({"n": stored}, {"n": stored, "m": count}):
            yield _two(
                f"nothing_{name}_{len(last)}", nothing, last, last, refusal="nothing to average",
                culprit=_FILES[0],
            )  # fmt: skip
    steps = numbers("I64", "q", 2**53 + 1), numbers("I64", "q", 2**62 + 1)
    why = "Integers count something: the last checkpoint's count is the one that is true."
    first, last = ({"w": floats(1), "n": one} for one in steps)
    yield _two("ok_integers_differ", why, first, last, values={"w": (1,), "n": (2**62 + 1,)})
    yield _two(
        "ok_integers_of_first", why, first, last, "--buffers", "first", values={"n": (2**53 + 1,)}
    )
    yield _two(
        "integers_refused", "The user asked for it.", first, last, "--buffers", "refuse",
        refusal="'n' of int64 differs",
    )  # fmt: skip
    yield _two(
        "ok_bools_differ", why, {"w": floats(1), "m": ("BOOL", [2], b"\0\1")},
        {"w": floats(1), "m": ("BOOL", [2], b"\1\0")}, values={"m": (1, 0)},
    )  # fmt: skip
    yield _two(
        "ok_empty_floats_alone", "Tensors without elements are copied.",
        {"w": ("F32", [0], b"")}, {"w": ("F32", [0], b"")}, values={"w": ()},
    )  # fmt: skip


def _quantised() -> Iterator[Case]:
    why = "Integer codes stand for values by a scale that differs from checkpoint to checkpoint."
    codes, scale = numbers("I8", "b", 1, 2), floats(0.5)
    packed = numbers("I32", "i", 1, 2)
    for name, tensors in (
        ("int8_weight", {"fc.weight": codes, "fc.weight_scale": scale}),
        ("gptq", {"fc.qweight": packed, "fc.qzeros": packed, "fc.scales": scale}),
        ("bitsandbytes_8_bit", {"fc.weight": codes, "fc.SCB": scale}),
        ("bitsandbytes_4_bit", {"fc.weight": numbers("U8", "B", 1, 2), "fc.weight.absmax": scale,
                                "fc.weight.quant_map": scale}),
        ("quantisation_state", {"b": scale, "fc.weight.quant_state.bitsandbytes__nf4": codes}),
        ("packed", {"fc.weight_packed": packed, "fc.weight_scale": scale}),
        ("hqq", {"fc.W_q": numbers("U8", "B", 1), "fc.scale": scale}),
        ("fp8", {"fc.weight": ("F8_E4M3", [2], b"\x38\x40"), "fc.weight_scale_inv": scale}),
        ("fp4", {"fc.weight": ("F4", [4], b"\x12\x34"), "fc.weight_scale": scale}),
    ):  # fmt: skip
        yield _two(
            f"quantised_{name}", why, tensors, tensors, refusal=r"'fc\.\S+'.*is quantised",
            culprit=_FILES[0],
        )  # fmt: skip
    yield _two(
        "quantised_in_one", why, {"fc.weight": floats(1, 2)}, {"fc.weight": codes, "s": scale},
        refusal=r"'fc\.weight' of int8 is quantised",
    )  # fmt: skip


# -- ties, copies, orders


def _ties() -> Iterator[Case]:
    why = "Names that are tied in one checkpoint only are not one parameter."
    tied = weights({"a": floats(5)}, {"b": "a"})
    yield _two(
        "tied_in_last_only", why, {"a": floats(1), "b": floats(9)}, tied,
        refusal="'b' is stored apart in first.safetensors",
    )  # fmt: skip
    yield _two(
        "tied_to_nothing", "Metadata that names no tensor ties nothing.",
        {"a": floats(1), "b": floats(9)}, weights({"a": floats(5)}, {"b": "gone"}),
        refusal="'b' is in first.safetensors, not in last",
    )  # fmt: skip
    yield _two(
        "ok_tied_in_both", "A tied name is stored once.", weights({"a": floats(1)}, {"b": "a"}),
        tied, values={"a": (3,)},
    )  # fmt: skip
    yield _two(
        "ok_tied_to_itself", "A tensor that is tied to itself is a tensor.",
        weights({"a": floats(1)}, {"a": "a"}), weights({"a": floats(5)}, {"a": "a"}),
        values={"a": (3,)},
    )  # fmt: skip
    yield _two(
        "ok_tied_in_circle", "Metadata that ties stored tensors to each other changes nothing.",
        weights({"a": floats(1), "b": floats(2)}, {"a": "b", "b": "a"}),
        weights({"a": floats(5), "b": floats(4)}, {"a": "b", "b": "a"}),
        values={"a": (3,), "b": (3,)},
    )  # fmt: skip


def _same_twice() -> Iterator[Case]:
    why = "A checkpoint that is named twice counts twice; that is said, not refused."
    name = "one.safetensors"

    def hard_link(path: Path) -> None:
        path.hardlink_to(path.parent / name)

    one: Values = {"w": (1, 2, 3, 4)}
    for kind, second, made in (
        ("name", name, None), ("dot_name", f"./{name}", None), ("link", "two", link(name)),
        ("hard_link", "two", hard_link), ("copy", "two", _ONE),
    ):  # fmt: skip
        files: dict[str, Content] = {name: _ONE}
        files |= {} if made is None else {"two": made}
        build = laid_out(files, name, second)
        yield Case(name=f"set/ok_same_{kind}", why=why, build=build, refusal=None, values=one)
    yield Case(
        name="set/ok_same_directory",
        why=why,
        build=laid_out({f"d/{_MODEL}": _ONE}, "d", f"d/{_MODEL}"),
        refusal=None,
        values=one,
    )


def _orders() -> Iterator[Case]:
    why = "Integers are those of the last checkpoint, and names tell which one that is."
    early, late = (
        weights({"w": floats(value), "n": numbers("I64", "q", count)})
        for value, count in ((1, 10), (3, 20))
    )
    for name, first, last, count in (
        ("steps_as_typed", "step_9.safetensors", "step_10.safetensors", 20),
        ("steps_reversed", "step_10.safetensors", "step_9.safetensors", 10),
        ("steps_padded", "step-0010.safetensors", "step-9.safetensors", 10),
        ("step_and_epoch", "step_10.safetensors", "epoch_9.safetensors", 20),
        ("step_and_no_number", "step_10.safetensors", "final.safetensors", 20),
        ("same_step", "a-step_9.safetensors", "b-step_9.safetensors", 20),
        ("several_forms", "checkpoint-10.safetensors", "iter_9.safetensors", 10),
        ("beyond_64_bits", f"step_{10**30}.safetensors", "step_9.safetensors", 20),
        ("bare_numbers", "10.safetensors", "9.safetensors", 10),
    ):
        yield Case(
            name=f"set/ok_order_{name}",
            why=why,
            build=laid_out({first: early, last: late}, first, last),
            refusal=None,
            values={"w": (2,), "n": (count,)},
        )
    yield Case(
        name="set/ok_order_coefficients",
        why="Coefficients belong to the checkpoints as typed.",
        build=laid_out(
            {"step_2.safetensors": late, "step_1.safetensors": early},
            "step_2.safetensors", "step_1.safetensors", "--coefficients=0.75,0.25",
        ),
        refusal=None,
        values={"w": (2.5,), "n": (20,)},
    )  # fmt: skip


# -- formats


def _npy(kind: str, values: bytes, shape: Sequence[int]) -> bytes:
    header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {tuple(shape)}, }}".encode()
    header = header.ljust(117) + b"\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + values


def _formats() -> Iterator[Case]:
    why = "The same tensors are the same, whatever file they lie in."
    raw = struct.pack("<4f", 3, 4, 5, 6)
    root, storages = mapping({"w": tensor()}), {"0": raw}
    npz = zip_bytes([Member(name="w.npy", content=_npy("<f4", raw, [4]))])
    shard = "model-00001-of-00001.safetensors"
    for name, files, last in (
        ("torch", {"b.pt": torch_bytes(root, storages)}, "b.pt"),
        ("legacy_torch", {"b.pt": legacy_bytes(root, [("0", 4, raw)])}, "b.pt"),
        ("numpy", {"b.npz": npz}, "b.npz"),
        ("directory", {f"b/{_MODEL}": _TWO}, "b"),
        ("torch_directory", {"b/pytorch_model.bin": torch_bytes(root, storages)}, "b"),
        ("shards", {f"b/{shard}": _TWO, f"b/{INDEX}": index_bytes({"w": shard})}, "b"),
        ("other_suffix", {"b.bin": _TWO}, "b.bin"),
        ("no_suffix", {"b": _TWO}, "b"),
        ("torch_called_safetensors", {"b.safetensors": torch_bytes(root, storages)},
         "b.safetensors"),
    ):  # fmt: skip
        yield Case(
            name=f"set/ok_format_{name}",
            why=why,
            build=laid_out({"a.safetensors": _ONE, **files}, "a.safetensors", last),
            refusal=None,
            values=_MEAN,
        )
    yield Case(
        name="set/ok_formats_four",
        why=why,
        build=laid_out(
            {"a": _ONE, "b": torch_bytes(root, storages), "c": npz, "d": _ONE}, "a", "b", "c", "d"
        ),
        refusal=None,
        values=_MEAN,
    )
    double = zip_bytes([Member(name="w.npy", content=_npy("<f8", raw * 2, [4]))])
    yield Case(
        name="set/format_other_dtype",
        why="numpy writes float64 where nobody says otherwise.",
        build=laid_out({"a.safetensors": _ONE, "b.npz": double}, "a.safetensors", "b.npz"),
        refusal="'w' is float32 in a.safetensors, float64 in b.npz",
    )
    yield Case(
        name="set/format_reserved_name",
        why="safetensors reserves the name __metadata__.",
        build=laid_out(
            {
                key: torch_bytes(mapping({"__metadata__": tensor(), "w": tensor()}))
                for key in ("a.pt", "b.pt")
            },
            "a.pt",
            "b.pt",
        ),
        refusal="'__metadata__'.*safetensors reserves",
        culprit="a.pt",
    )
    yield _two(
        "state_key_for_safetensors", "A safetensors file has no entries to choose from.", _ONE,
        _TWO, "--state-key", "ema", refusal="--state-key is for torch files", culprit=_FILES[0],
    )  # fmt: skip


def _adapters() -> Iterator[Case]:
    factors = {
        f"base_model.model.q.lora_{name}.weight": ("F32", shape, struct.pack("<2f", 1, 2))
        for name, shape in (("A", [1, 2]), ("B", [2, 1]))
    }
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 2, "base_model_name_or_path": "base"}

    def adapter(directory: str, tensors: Tensors, **told: object) -> dict[str, Content]:
        return {
            f"{directory}/adapter_model.safetensors": weights(tensors),
            f"{directory}/adapter_config.json": json.dumps({**config, **told}).encode(),
        }

    magnitude = {**factors, "base_model.model.q.lora_magnitude_vector": floats(1, 2)}
    half = dict(list(factors.items())[:1])
    wide = {name: ("F32", [2, 2], bytes(16)) for name in factors}
    for name, why, last, refusal in (
        ("and_model", "An adapter is a difference, a model is not.", {f"b/{_MODEL}": _ONE},
         "a is an adapter, b is not"),
        ("other_base", "Differences from different models do not add up.",
         adapter("b", factors, base_model_name_or_path="other"), "'base_model_name_or_path'"),
        ("other_type", "Adapters of two kinds have no mean.",
         adapter("b", factors, peft_type="IA3"), "'peft_type' is 'LORA' in a, 'IA3' in b"),
        ("dora", "DoRA is not linear in its factors.", adapter("b", magnitude, use_dora=True),
         "DoRA"),
        ("one_factor", "Half of a product is nothing.", adapter("b", half),
         "lora_B.weight' is in a, not in b"),
        ("rank_lie", "The config says another rank than the factors have.", adapter("b", wide),
         "has rank 2"),
        ("rank_zero", "The scale divides by the rank.", adapter("b", factors, r=0),
         "'r' is no rank"),
        ("rank_text", "A rank is a number.", adapter("b", factors, r="1"), "'r' is no rank"),
        ("alpha_nan", "JSON has no such number.", adapter("b", factors, lora_alpha=float("nan")),
         "alpha|not valid JSON"),
        ("pattern_bomb", "A pattern may take for ever to match.",
         adapter("b", factors, rank_pattern={"(a*)*b" * 20: 2}), "rank_pattern"),
        ("no_weights", "The weights are not there.", {"b/adapter_config.json": b"{}"},
         "neither adapter_model.safetensors nor"),
        ("config_list", "A config is one JSON object.",
         adapter("b", factors) | {"b/adapter_config.json": b"[]"}, "not a JSON object"),
    ):  # fmt: skip
        yield Case(
            name=f"set/adapter_{name}",
            why=why,
            build=laid_out({**adapter("a", factors), **last}, "a", "b"),
            refusal=refusal,
            culprit="b",
        )
    yield _two(
        "ok_lora_factors", "Factors in a plain file are averaged as they stand, with a warning.",
        factors, factors, values=dict.fromkeys(factors, (1, 2)),
    )  # fmt: skip
    yield _two(
        "adapter_rank_of_none", "Only adapters have ranks.", _ONE, _TWO, "--adapter-rank", "2",
        refusal="--adapter-rank is for adapters", culprit=_FILES[0], exit_code=2,
    )  # fmt: skip


def _side_files() -> Iterator[Case]:
    deep = b'{"a":' * 700 + b"1" + b"}" * 700
    for name, file, option in (
        ("config", "config.json", ("--dtype", "bfloat16")), ("provenance", "ckptavg.json", ()),
    ):  # fmt: skip
        yield Case(
            name=f"set/{name}_deep",
            why="Nesting that deep overflows the stack of what writes it again.",
            build=laid_out(
                {"a": _ONE, f"b/{_MODEL}": _TWO, f"b/{file}": deep}, "a", "b", *option
            ),
            refusal="not valid JSON|nested",
            culprit=f"b/{file}",
        )  # fmt: skip
    for name, made, refusal in (
        ("fifo", fifo, "not a regular file"), ("device", link("/dev/zero"), "not a regular file"),
        ("dangling_link", link("gone"), "cannot be opened"), ("directory", folder, "directory"),
    ):  # fmt: skip
        yield Case(
            name=f"set/config_{name}",
            why="A config that is there and cannot be read is not passed over.",
            build=laid_out({"a": _ONE, f"b/{_MODEL}": _TWO, "b/config.json": made}, "a", "b"),
            refusal=refusal,
            culprit="b/config.json",
        )
    odd = {
        "trainer_state.json": b'{"global_step":1e400,"log_history":[null,{"step":[]},7]}',
        "ckptavg.json": rb'{"n_sources":"\u001b[2J","checkpoints":5,"output":[]}',
        "config.json": rb'{"tie_word_embeddings":"yes","dtype":[],"x":"\ud800"}',
        "README.md": b"---\n\xff\x1b[2J: &a [*a]\n---\n",
    }
    yield Case(
        name="set/ok_side_files_odd",
        why="What is not needed for an average may be odd.",
        build=laid_out(
            {"a": _ONE, f"b/{_MODEL}": _TWO, **{f"b/{key}": raw for key, raw in odd.items()}},
            "a", "b",
        ),
        refusal=None,
        values=_MEAN,
    )  # fmt: skip


# -- options


def _options() -> Iterator[Case]:
    for name, why, options, refusal, culprit in (
        ("last_and_first", "They exclude each other.", ("--last", "1", "--first", "1"),
         "exclude each other", "--first"),
        ("coefficients_and_scheme", "Coefficients are a scheme.",
         ("--coefficients", "0.5,0.5", "--scheme", "uniform"), "scheme of their own",
         "coefficients"),
        ("three_coefficients", "There are two checkpoints.", ("--coefficients", "0.5,0.25,0.25"),
         "3 coefficients for 2", "coefficients"),
        ("minima_and_constant", "They exclude each other.", ("--at-lr-minima", "--constant-lr"),
         "exclude each other", "--constant-lr"),
        ("best_of_nothing", "What is best goes by a metric.", ("--best", "1"), "--metric",
         "--best"),
        ("metric_of_nothing", "A metric that is not used is a mistake.", ("--metric", "loss"),
         "is for --best", "--metric"),
        ("log_of_nothing", "A log that is not used is a mistake.", ("--log", "x.csv"), "is for",
         "--log"),
        ("split_torch", "A torch file is never split.",
         ("--output-format", "torch", "--max-shard-size", "1MB"), "never split",
         "--max-shard-size"),
        ("same_scheme_twice", "Two outputs cannot have one name.",
         ("--scheme", "uniform", "--scheme", "uniform"), "two outputs would be called",
         "'uniform'"),
        ("label_of_parent", "A label is the name of a directory inside the output.",
         ("--scheme", "../x=uniform", "--scheme", "uniform"), "cannot name an output", "'../x'"),
    ):  # fmt: skip
        yield _two(
            f"option_{name}", why, _ONE, _TWO, *options, refusal=refusal, culprit=culprit,
            exit_code=2,
        )  # fmt: skip
    for name, why, options, refusal, culprit in (
        ("too_many_wanted", "Nothing is averaged over fewer than asked for.", ("--last", "3"),
         "are only 2", "--last 3"),
        ("no_step_known", "Nothing tells the steps.", ("--steps", "1:9"), "training step",
         _FILES[0]),
        ("no_match", "The pattern matches nothing.", ("--match", "x*"), "none of 2", "x*"),
        ("memory_too_small", "The work does not fit.", ("--memory", "1KiB"),
         "budget of 1024 bytes is too small", "--memory"),
    ):  # fmt: skip
        yield _two(f"option_{name}", why, _ONE, _TWO, *options, refusal=refusal, culprit=culprit)


# -- outputs


def _outputs_at_inputs() -> Iterator[Case]:
    why = "An output may not take the place of what it is made from."
    is_in, holds = r"^ckptavg: error: out: (is|lies inside) the input", "holds the input"
    first: dict[str, Content] = {"a.safetensors": _ONE}
    model: dict[str, Content] = {f"out/{_MODEL}": _TWO}
    inside: dict[str, Content] = {f"out/b/{_MODEL}": _TWO}
    here: dict[str, Content] = {_MODEL: _TWO}
    elsewhere: dict[str, Content] = {f"d/{_MODEL}": _TWO}
    for name, files, source, refusal in (
        ("is_input", model, "out", is_in),
        ("is_input_by_dots", model, "./x/../out/.", is_in),
        ("is_input_by_link", {**model, "in": link("out")}, "in", is_in),
        ("is_link_to_input", {**elsewhere, "out": link("d")}, "d", is_in),
        ("is_link_chain_to_input", {**elsewhere, "x": link("d"), "out": link("x")}, "d", is_in),
        ("is_input_file", {"out": _TWO}, "out", holds),
        ("is_link_to_input_file", {"b.safetensors": _TWO, "out": link("b.safetensors")},
         "b.safetensors", holds),
        ("is_linked_input_file", {"out": _TWO, "b.safetensors": link("out")}, "b.safetensors",
         holds),
        ("inside_input", here, ".", is_in),
        ("inside_input_by_link", {**here, "in": link(".")}, "in", is_in),
        ("holds_input", inside, "out/b", holds),
        ("holds_input_file", model, f"out/{_MODEL}", holds),
        ("holds_input_by_dots", inside, "./out/../out/b", holds),
        ("holds_input_by_link", {**inside, "in": link("out/b")}, "in", holds),
        ("holds_linked_shard", {"out/x": _TWO, f"d/{_MODEL}": link("../out/x")}, "d", holds),
        ("holds_link_of_input", {"b.safetensors": _TWO, f"out/{_MODEL}": link("../b.safetensors")},
         f"out/{_MODEL}", holds),
    ):  # fmt: skip
        present: dict[str, Content] = {**files, **({"x": folder} if "/x/" in source else {})}
        for option in ((), ("--overwrite",)):
            yield Case(
                name=f"set/output_{name}{'_overwrite' if option else ''}",
                why=why,
                build=laid_out({**first, **present}, "a.safetensors", source, *option),
                refusal=refusal,
                culprit="out",
                exit_code=2,
            )


def _outputs_that_exist() -> Iterator[Case]:
    sources = {"a.safetensors": _ONE, "b.safetensors": _TWO}
    why, replaces = "What is there is not replaced unasked.", "Only a model may be replaced."
    is_there, is_none = "out: already exists", "out: is not a directory"
    made: dict[str, tuple[dict[str, Content], str]] = {
        "file": ({"out": b"precious"}, is_none),
        "empty_file": ({"out": b""}, is_none),
        "fifo": ({"out": fifo}, is_none),
        "dangling_link": ({"out": link("gone")}, is_none),
        "looping_link": ({"out": link("out")}, is_none),
        "link_to_file": ({"out": link("note.txt"), "note.txt": b"precious"}, is_none),
        "device": ({"out": link("/dev/null")}, is_none),
        "foreign_directory": ({"out/thesis.tex": b"precious"}, "out: also holds 'thesis.tex'"),
        "foreign_beside_model": (
            {f"out/{_MODEL}": _ONE, "out/.git/config": b""}, "out: also holds '.git'",
        ),
        "directory_in_model": ({f"out/{_MODEL}": _ONE, "out/d/x": b""}, "out: also holds 'd'"),
        "link_to_foreign": ({"d/thesis": b"x", "out": link("d")}, "out: also holds 'thesis'"),
        "lying_provenance": (
            {"out/thesis.tex": b"x", "out/ckptavg.json": b'{"output":{"side_files":[1,null,""]}}'},
            "out: also holds 'thesis.tex'",
        ),
        "damaged_provenance": (
            {"out/thesis.tex": b"x", "out/ckptavg.json": b'{"output":'},
            "out.*(also holds 'thesis.tex'|ckptavg.json: is not valid JSON)",
        ),
    }  # fmt: skip
    for name, (files, refusal) in made.items():
        for option, told, reason in (((), is_there, why), (("--overwrite",), refusal, replaces)):
            yield Case(
                name=f"set/exists_{name}{'_overwrite' if option else ''}",
                why=reason,
                build=laid_out({**sources, **files}, *sources, *option),
                refusal=told,
                culprit="out",
            )
    there: dict[str, dict[str, Content]] = {
        "empty_directory": {"out": folder},
        "model": {f"out/{_MODEL}": _ONE, "out/config.json": b"{}"},
        "shards": {f"out/{INDEX}": index_bytes({"w": "x"}), "out/ckptavg.json": b"{}"},
        "link_to_model": {f"d/{_MODEL}": _ONE, "out": link("d")},
    }
    for name, files in there.items():
        yield Case(
            name=f"set/exists_{name}",
            why=why,
            build=laid_out({**sources, **files}, *sources),
            refusal=is_there,
            culprit="out",
        )
        yield Case(
            name=f"set/ok_exists_{name}_overwrite",
            why="A model is replaced where that is asked for.",
            build=laid_out({**sources, **files}, *sources, "--overwrite"),
            refusal=None,
            values=_MEAN,
        )


def _odd_outputs() -> Iterator[Case]:
    """Yield cases that name the output themselves, by ``-o`` as the last option."""
    sources: dict[str, Content] = {"a.safetensors": _ONE, "b.safetensors": _TWO}
    no_room = "cannot be written|symbolic link|not a directory"
    rows: Sequence[tuple[str, str, Mapping[str, Content], str, str, str]] = (
        ("parent_is_file", "A file holds no directories.", {"x": b""}, "x/out", "x is not a dir",
         "x/out"),
        ("grandparent_is_file", "A file holds no directories.", {"x": b""}, "x/y/out",
         "x is not a dir", "x/y/out"),
        ("parent_is_fifo", "A FIFO holds no directories.", {"x": fifo}, "x/out", "x is not a dir",
         "x/out"),
        ("parent_is_loop", "A link that leads to itself leads nowhere.", {"x": link("x")}, "x/out",
         no_room, "x/out"),
        ("parent_leads_nowhere", "A link that leads nowhere holds no directories.",
         {"x": link("gone")}, "x/out", no_room, "x/out"),
        ("name_too_long", "No file system takes such a name.", {}, "x" * 300, "too long", "xxx"),
        ("name_leaves_no_room", "What is being written has a longer name.", {}, "x" * 240,
         "too long", "x" * 240),
        ("escape_exists", "A name may not move the cursor.", {"\x1b[2J\n": folder}, "\x1b[2J\n",
         "already exists", r"\x1b[2J\n"),
        ("trailing_slash_exists", "What is there is not replaced unasked.", {"x": folder}, "x/",
         "already exists", "x"),
    )  # fmt: skip
    for name, why, files, output, refusal, told in rows:
        yield Case(
            name=f"set/output_{name}",
            why=why,
            build=laid_out({**sources, **files}, *sources, "-o", output),
            refusal=refusal,
            culprit=told,
        )
    yield Case(
        name="set/output_nul",
        why="No file system takes such a name.",
        build=laid_out(sources, *sources, "-o", "x\0y"),
        refusal="NUL byte",
        culprit="",
        exit_code=2,
    )
    for name, output in (("here", "."), ("root", "/"), ("above", ".."), ("empty", "")):
        yield Case(
            name=f"set/output_{name}",
            why="An output may not hold what it is made from.",
            build=laid_out(sources, *sources, "-o", output),
            refusal="holds the input",
            culprit="a.safetensors",
            exit_code=2,
        )
    for name, output in (
        ("newline", "out\nput"), ("escape", "\x1b[31mout"), ("space", " "), ("glob", "out[1]*"),
        ("braces", "{1..3}"), ("bytes", "out\udcff"), ("tilde", "~"), ("dash", "./-o"),
        ("new_parents", "x/y/out"), ("dots", "x/../out"), ("right_to_left", "a\u202eb"),
        ("partial", "out.partial-0123456789abcdef"), ("long", "o" * 200),
        ("dot_name", "..."), ("trailing_slash", "out/"),
    ):  # fmt: skip
        yield Case(
            name=f"set/ok_output_{name}",
            why="Any name that a file system takes is a name.",
            build=laid_out({**sources, "x": folder} if name == "dots" else sources, *sources,
                           "-o", output),
            refusal=None,
            values=_MEAN,
        )  # fmt: skip


# -- sources


def _sources() -> Iterator[Case]:
    good: dict[str, Content] = {"a.safetensors": _ONE}
    for name, why, files, source, refusal in (
        ("missing", "It is not there.", {}, "b.safetensors", "no such file"),
        ("empty_name", "It is not there.", {}, "", "no such file|no checkpoint"),
        ("nul", "No file can have that name.", {}, "b\0.safetensors", "no such file|opened"),
        ("dangling_link", "It leads nowhere.", {"b": link("gone")}, "b", "leads nowhere"),
        ("looping_link", "It leads nowhere.", {"b": link("b")}, "b", "leads nowhere|opened"),
        ("fifo", "A checkpoint is a regular file.", {"b": fifo}, "b", "not a regular file"),
        ("device", "A checkpoint is a regular file.", {}, "/dev/zero", "not a regular file"),
        ("link_to_device", "A checkpoint is a regular file.", {"b": link("/dev/zero")}, "b",
         "not a regular file"),
        ("empty_directory", "It holds no weights.", {"b": folder}, "b", "no weights"),
        ("file_as_directory", "A file holds no files.", {"b": _TWO}, "b/c", "no such file|opened"),
        ("slash_behind_file", "A file is no directory.", {"b": _TWO}, "b/", "no such file|opened"),
        ("no_match", "The pattern matches nothing.", {}, "b*.safetensors", "matches nothing"),
        ("range_too_long", "Nobody has so many checkpoints.", {}, "step{1..99999999999}",
         "more than 10000 "),
        ("ranges_too_many", "Nobody has so many checkpoints.", {}, "{1..999}{1..999}{1..999}",
         "more than 10000 "),
        ("range_of_step_0", "A range with step 0 never ends.", {}, "s{1..9..0}", "step 0"),
        ("too_long", "No file system takes such a name.", {}, "b" * 300,
         "no such file|file name too long"),
    ):  # fmt: skip
        yield Case(
            name=f"set/source_{name}",
            why=why,
            build=laid_out({**good, **files}, "a.safetensors", source),
            refusal=refusal,
            culprit=source.replace("\0", "\\x00"),
        )
