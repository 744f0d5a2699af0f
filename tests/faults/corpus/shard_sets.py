"""Directories of shards: what an index may not say, and shards that are not what it says.

``bad/`` is always the second checkpoint; its sound form is ``a`` in a first shard, ``b`` in a
second one, and an index that says so.
"""

import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hostile import mapping, safetensors_bytes, tensor, torch_bytes

from faults.case import Build, Case
from faults.corpus.safetensors_files import Stored, floats, weights

Content = bytes | Callable[[Path], object]  # of a file, or what makes something else of that name

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_TORCH_INDEX = "pytorch_model.bin.index.json"
_A, _B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
_MAP = {"a": _A, "b": _B}
_GOOD = weights({"a": floats(1, 2), "b": floats(3, 4)})
_SHARD_A, _SHARD_B = weights({"a": floats(3, 4)}), weights({"b": floats(5, 8)})
_BOTH = weights({"a": floats(3, 4), "b": floats(5, 8)})
_MEAN = {"a": (2.0, 3.0), "b": (4.0, 6.0)}
_LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123\n"
_HTML = b"<!DOCTYPE html>\n<html><body>429 Too Many Requests</body></html>\n"
_PLAIN = "only plain file names"


def laid_out(files: Mapping[str, Content], *arguments: str) -> Build:
    """Return what makes files, in order, with the directories above them.

    Args:
        files: Path below the directory of the case -> bytes, or what is called with that path.
        arguments: Of ``average``.
    """

    def build(directory: Path) -> Sequence[str]:
        for name, content in files.items():
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                path.write_bytes(content)
            else:
                content(path)
        return arguments

    return build


def link(target: str) -> Content:
    """Return what makes a symbolic link, whose target may be anything."""
    return lambda path: path.symlink_to(target)


def folder(path: Path) -> None:
    """Make an empty directory."""
    path.mkdir()


def fifo(path: Path) -> None:
    """Make a FIFO, which nobody writes to."""
    os.mkfifo(path)


def cases() -> Sequence[Case]:
    """Return all cases of this module."""
    return [
        *_paths(), *_indexes(), *_shards(), *_kinds_of_files(), *_disagreements(), *_mixtures(),
        *_averaged(),
    ]  # fmt: skip


def index_bytes(weight_map: Any, **others: Any) -> bytes:
    """Return an index with this weight map."""
    return json.dumps({"metadata": {}, "weight_map": weight_map, **others}).encode()


def _set(
    name: str,
    why: str,
    refusal: str | None,
    changes: Mapping[str, Content | None],
    *,
    index: Any = _MAP,
    culprit: str | None = None,
    values: Mapping[str, Sequence[float]] | None = None,
) -> Case:
    """Return a case whose second checkpoint is the sound one but for some changes.

    Args:
        name, why, refusal, culprit, values: As in ``Case``.
        changes: File in ``bad/``, or after a slash beside it -> its content; None removes it.
        index: The weight map, or the whole index as bytes.
    """
    content = index if isinstance(index, bytes) else index_bytes(index)
    inside: dict[str, Content | None] = {INDEX: content, _A: _SHARD_A, _B: _SHARD_B, **changes}
    files: dict[str, Content] = {"good.safetensors": _GOOD}
    for key, made in inside.items():
        if made is not None:
            files[key.removeprefix("/") if key.startswith("/") else f"bad/{key}"] = made
    build = laid_out(files, "good.safetensors", "bad")
    return Case(
        name=f"shard/{name}", why=why, build=build, refusal=refusal, culprit=culprit, values=values
    )


# -- where an index leads


def _paths() -> Iterator[Case]:
    why = "An index may not lead out of its directory, whatever system it is read on."
    for name, shard in (
        ("parent", "../secret.safetensors"), ("parent_alone", ".."), ("dot", "."), ("empty", ""),
        ("grandparent", "../../secret.safetensors"), ("absolute", "/etc/passwd"), ("root", "/"),
        ("two_slashes", "//secret.safetensors"), ("device", "/dev/zero"),
        ("own_memory", "/proc/self/mem"), ("sub_directory", f"sub/{_B}"),
        ("sub_and_back", f"sub/../{_B}"), ("dot_slash", f"./{_B}"), ("trailing_slash", f"{_B}/"),
        ("home", "~/secret.safetensors"), ("file_url", "file:///etc/passwd"),
        ("https_url", "https://example.org/x.safetensors"), ("hub", "hf://org/name/x.safetensors"),
        ("nul_behind", f"{_B}\0"), ("nul_before_suffix", f"../x\0{_B}"), ("nul_alone", "\0"),
        ("backslash_parent", "..\\secret.safetensors"), ("backslash_sub", f"sub\\{_B}"),
        ("backslash_root", "\\secret.safetensors"), ("drive", "C:\\secret.safetensors"),
        ("drive_relative", "C:secret.safetensors"), ("drive_alone", "C:"),
        ("share", "\\\\host\\share\\x.safetensors"), ("windows_device", "\\\\.\\PhysicalDrive0"),
        ("long_windows_path", "\\\\?\\C:\\secret.safetensors"),
    ):  # fmt: skip
        yield _set(
            f"path_{name}", why, f"index.*{_PLAIN}",
            {"/secret.safetensors": _SHARD_B, f"sub/{_B}": _SHARD_B},
            index=_MAP | {"b": shard},
        )  # fmt: skip
    missing = "No such shard is there; the name must not mean anything else."
    for name, shard in (
        ("windows_console", "CON"), ("windows_port", "COM1.safetensors"), ("windows_nul", "nul"),
        ("percent", f"%2e%2e%2f{_B}"), ("fraction_slash", f"..\u2044{_B}"), ("glob", "model-*"),
        ("braces", "model-0000{1,2}-of-00002.safetensors"), ("variable", "$HOME"),
        ("option", "--output=x"), ("trailing_space", f"{_B} "), ("trailing_dot", f"{_B}."),
        ("stream", f"{_B}:stream"), ("capitals", _B.upper()), ("too_long", "x" * 300),
    ):  # fmt: skip
        yield _set(
            f"path_{name}", missing, "is missing|file name too long|only plain file names", {},
            index=_MAP | {"b": shard},
        )  # fmt: skip
    yield _set(
        "path_index_itself", "An index is no shard.", "neither a safetensors file nor", {},
        index=_MAP | {"b": INDEX}, culprit=INDEX,
    )  # fmt: skip
    escape = "A name from a file may not move the cursor."
    yield _set(
        "path_escape", escape, r"\\x1b\[2J\\n.* is missing", {}, index=_MAP | {"b": "\x1b[2J\n"}
    )
    yield _set(
        "path_half_surrogate", "No file can have that name.", "not valid JSON",
        {}, index=_MAP | {"b": "\ud800"},
    )  # fmt: skip
    yield _set(
        "path_surrogate_byte", "An index names files in Unicode, not in bytes.",
        "not valid JSON", {"b\udcff": _SHARD_B, _B: None},
        index=_MAP | {"b": "b\udcff"},
    )  # fmt: skip


# -- the index


def _indexes() -> Iterator[Case]:
    why, no_map = "An index maps each tensor to the file that holds it.", "index.*weight_map"
    for name, index in (
        ("null", None), ("list", [["a", _A], ["b", _B]]), ("string", _A), ("number", 2),
        ("true", True), ("empty", {}),
    ):  # fmt: skip
        yield _set(f"map_{name}", why, no_map, {}, index=index_bytes(index))
    for name, shard in (
        ("null", None), ("number", 2), ("true", True), ("list", [_B]), ("object", {"file": _B}),
    ):  # fmt: skip
        yield _set(
            f"name_{name}", "A file's name is a string.", f"index.*{_PLAIN}", {},
            index=_MAP | {"b": shard},
        )  # fmt: skip
    rows: Sequence[tuple[str, bytes, str]] = (
        ("no_map", b"{}", no_map),
        ("map_misspelt", b'{"Weight_map":{"a":"x"}}', no_map),
        ("list", b"[]", "index.*not a JSON object"),
        ("null", b"null", "index.*not a JSON object"),
        ("string", b'"x"', "index.*not a JSON object"),
        ("number", b"1", "index.*not a JSON object"),
        ("nothing", b"", "index.*(not valid JSON|empty)"),
        ("zeros", bytes(64), "index.*not valid JSON"),
        ("cut", index_bytes(_MAP)[:-9], "index.*not valid JSON"),
        ("twice", index_bytes(_MAP) * 2, "index.*not valid JSON"),
        ("byte_order_mark", b"\xef\xbb\xbf" + index_bytes(_MAP), "index.*not valid JSON"),
        ("utf_16", index_bytes(_MAP).decode().encode("utf-16"), "index.*not valid JSON"),
        ("bad_utf_8", b'{"weight_map":{"\xff":"x"}}', "index.*not valid JSON"),
        ("deep", b'{"weight_map":' + b"[" * 50_000, "index.*(not valid JSON|at most)"),
        ("deep_closed", b'{"weight_map":' + b"[" * 50_000 + b"]" * 50_000 + b"}",
         "index.*(not valid JSON|weight_map|at most)"),
        ("digits", b'{"weight_map":' + b"9" * 5000 + b"}", "index.*(not valid JSON|weight_map)"),
        ("lfs_pointer", _LFS, "index.*(not valid JSON|Git LFS)"),
        ("html", _HTML, "index.*(not valid JSON|HTML)"),
        ("safetensors", _BOTH, "index.*not valid JSON"),
    )  # fmt: skip
    for name, raw, refusal in rows:
        yield _set(f"index_{name}", "An index is one JSON object.", refusal, {}, index=raw)
    twice = "Two readers would look in different files: an index names nothing twice."
    shards = json.dumps(_MAP)
    for name, text in (
        ("tensor", f'{{"weight_map":{{"a":"{_A}","b":"{_A}","b":"{_B}"}}}}'),
        ("tensor_escaped", f'{{"weight_map":{{"a":"{_A}","b":"../x","\\u0062":"{_B}"}}}}'),
        ("map", f'{{"weight_map":{{"a":"../x"}},"weight_map":{shards}}}'),
    ):
        yield _set(f"index_twice_{name}", twice, "index.*twice", {}, index=text.encode())
    many = _MAP | {f"t{number}": f"{number}.safetensors" for number in range(10_000)}
    yield _set(
        "index_too_many_shards", "Each shard takes an open file.",
        "index.*more than 10000 shards|is missing", {}, index=many,
    )  # fmt: skip
    for name, made in (("directory", folder), ("fifo", fifo)):
        yield _set(
            f"index_{name}", "An index is a regular file.", "index.*(directory|not a regular file)",
            {INDEX: made},
        )  # fmt: skip
    for name, target, refusal in (
        ("dangling_link", "gone", "index.*cannot be opened"),
        ("looping_link", INDEX, "index.*cannot be opened"),
        ("device", "/dev/zero", "index.*not a regular file"),
    ):
        yield _set(f"index_{name}", "An index is a regular file.", refusal, {INDEX: link(target)})


# -- shards


def _shards() -> Iterator[Case]:
    for name, why, content, refusal in (
        ("zero_bytes", "A download or a full disk left it empty.", b"", r"empty \(0 bytes\)"),
        ("lfs_pointer", "Git LFS left a pointer in its place.", _LFS, "Git LFS"),
        ("html", "A proxy answered with a page.", _HTML, "HTML"),
        ("json", "A server answered with an error.", b'{"error":"not found"}\n',
         "neither a safetensors file nor"),
        ("zeros", "Room was reserved and never written.", bytes(len(_SHARD_B)),
         "neither a safetensors file nor"),
        ("truncated_header", "It is cut short.", _SHARD_B[:40], "truncated"),
        ("truncated_data", "It is cut short.", _SHARD_B[:-1], "truncated"),
        ("no_data", "It is cut short.", _SHARD_B[:-8], "truncated"),
        ("longer", "Something was appended.", _SHARD_B + b"\n", "longer than it should be"),
        ("gguf", "It is of another format.", b"GGUF" + bytes(60), "GGUF"),
        ("index", "It is another file.", index_bytes(_MAP), "neither a safetensors file nor"),
        ("pickle", "A pickle is never run.", b"\x80\x04}q\0.", "plain pickle"),
        ("code", "A pickle is never run.",
         torch_bytes(mapping({"b": tensor(), "x": b"cos\nmkdir\n(Vcanary\ntR"})),
         "needs Python code 'os.mkdir'"),
        ("nan_code", "Its dtype does not exist.",
         safetensors_bytes('{"b":{"dtype":"NAN","shape":[2],"data_offsets":[0,8]}}', bytes(8)),
         "'b'.*unknown dtype 'NAN'"),
    ):  # fmt: skip
        yield _set(f"shard_{name}", why, refusal, {_B: content}, culprit=f"bad/{_B}")
    for number, shard in ((1, _A), (2, _B)):
        yield _set(
            f"shard_missing_{number}", "A shard that the index lists is not there.",
            f"{shard} is missing", {shard: None},
        )  # fmt: skip
    yield _set("shard_missing_all", "The index alone is there.", "is missing", {_A: None, _B: None})
    yield _set(
        "shard_partial_name", "A download left it under its temporary name.", f"{_B} is missing",
        {_B: None, f"{_B}.incomplete": _SHARD_B},
    )  # fmt: skip
    yield _set(
        "shard_from_other_set", "The shard of a model in three parts has another name.",
        f"{_B} is missing", {_B: None, "model-00002-of-00003.safetensors": _SHARD_B},
    )  # fmt: skip


def _kinds_of_files() -> Iterator[Case]:
    for name, made, refusal in (
        ("directory", folder, "directory"),
        ("fifo", fifo, "not a regular file"),
        ("dangling_link", link("gone.safetensors"), "cannot be opened|leads nowhere"),
        ("looping_link", link(_B), "cannot be opened.*symbolic link"),
        ("link_to_zero", link("/dev/zero"), "not a regular file"),
        ("link_to_null", link("/dev/null"), "not a regular file"),
        ("link_to_directory", link("."), "directory"),
        ("link_through_file", link(f"{_A}/x"), "cannot be opened"),
        ("link_to_text", link("../note.txt"), "neither a safetensors file nor"),
    ):
        changes: dict[str, Content | None] = {"/note.txt": b"root:x:0:0", _B: made}
        yield _set(
            f"file_{name}", "A shard is a regular file, or a link that ends at one.", refusal,
            changes, culprit=f"bad/{_B}",
        )  # fmt: skip

    def pair_of_links(path: Path) -> None:
        path.symlink_to("other")
        (path.parent / "other").symlink_to(path.name)

    yield _set(
        "file_pair_of_links", "Two links that lead to each other lead nowhere.",
        "cannot be opened.*symbolic link", {_B: pair_of_links}, culprit=f"bad/{_B}",
    )  # fmt: skip


def _disagreements() -> Iterator[Case]:
    lacks, extra = "'b' in .*does not hold it", "which the index lists in"
    twice, differing = "A tensor is in two shards, and not where the index says.", floats(0, 0)
    for name, why, refusal, changes in (
        ("lacks_tensor", "The index lists a tensor that the shard lacks.", lacks,
         {_B: weights({"c": floats(5, 8)})}),
        ("lacks_all", "The index lists a tensor that the shard lacks.", lacks, {_B: weights({})}),
        ("other_capitals", "Names are compared as they are.", lacks,
         {_B: weights({"B": floats(5, 8)})}),
        ("swapped", "Each shard holds what the other should.", "does not hold it",
         {_A: _SHARD_B, _B: _SHARD_A}),
        ("same_shard_twice", "The second shard is a copy of the first.", lacks, {_B: _SHARD_A}),
        ("extra_tensor", "A shard holds a tensor that the index does not list.",
         f"'c', {extra} no shard", {_B: weights({"b": floats(5, 8), "c": floats(1)})}),
        ("twice_other_bytes", twice, f"'[ab]'.*({extra} another shard|differ)",
         {_B: weights({"a": differing, "b": floats(5, 8)})}),
        ("twice_other_shape", twice, f"'[ab]'.*({extra} another shard|differ)",
         {_B: weights({"a": floats(3, 4, 5), "b": floats(5, 8)})}),
        ("twice_other_dtype", twice, f"'[ab]'.*({extra} another shard|differ)",
         {_A: weights({"a": floats(3, 4), "b": ("I32", [2], bytes(8))})}),
    ):  # fmt: skip
        yield _set(f"tensor_{name}", why, refusal, dict(changes))
    yield _set(
        "tensor_twice_equal", "Shards that hold equal bytes leave no doubt; the index decides.",
        None, {_B: weights({"a": floats(3, 4), "b": floats(5, 8)})}, values=_MEAN,
    )  # fmt: skip
    yield _set(
        "tensor_listed_nowhere", "A tensor that no shard lists would be lost.", f"'b', {extra} no",
        {_B: None, _A: _BOTH}, index={"a": _A},
    )  # fmt: skip
    yield _set(
        "tensor_of_other_shape", "The set is sound, but of another model.",
        r"'b' has shape \[2\] in bad, \[3\] in good|'b' has shape \[2\] in good.*\[3\] in bad",
        {_B: weights({"b": floats(1, 2, 3)})},
    )  # fmt: skip


def _mixtures() -> Iterator[Case]:
    which = "Two sets of weights lie in one directory, and nothing says which one counts."
    yield _set("both_single_and_index", which, f"both {SINGLE} and {INDEX}", {SINGLE: _BOTH})
    yield _set(
        "both_single_link_and_index", which, f"both {SINGLE} and {INDEX}", {SINGLE: link("gone")}
    )
    yield _set(
        "both_torch_single_and_index", which, f"both pytorch_model.bin and {_TORCH_INDEX}",
        {INDEX: None, _TORCH_INDEX: index_bytes(_MAP), "pytorch_model.bin": _BOTH},
    )  # fmt: skip
    yield _set(
        "no_index", "The index is written last: without it the set is not whole.", "no index",
        {INDEX: None},
    )  # fmt: skip
    yield _set(
        "no_index_other_names", "Nothing says that these files are one model.",
        "checkpoints of several kinds|no index that makes them one",
        {INDEX: None, _A: None, _B: None, "a.safetensors": _SHARD_A, "b.safetensors": _SHARD_B},
    )  # fmt: skip
    yield _set(
        "torch_index_of_nothing", "A shard that the index lists is not there.", "is missing",
        {INDEX: None, _A: None, _B: None,
         _TORCH_INDEX: index_bytes({"a": "pytorch_model-00001-of-00001.bin"})},
    )  # fmt: skip
    yield _set(
        "nothing", "The directory holds no weights.", "no weights",
        {INDEX: None, _A: None, _B: None, "config.json": b"{}"},
    )  # fmt: skip
    for name, made, refusal in (
        ("directory", folder, "directory"), ("fifo", fifo, "not a regular file"),
        ("dangling_link", link("gone"), "cannot be opened"),
        ("looping_link", link(SINGLE), "cannot be opened.*symbolic link"),
        ("link_to_zero", link("/dev/zero"), "not a regular file"),
    ):  # fmt: skip
        yield _set(
            f"single_{name}", "A weight file is a regular file.", refusal,
            {INDEX: None, _A: None, _B: None, SINGLE: made}, culprit=f"bad/{SINGLE}",
        )  # fmt: skip
    yield Case(
        name="shard/one_alone",
        why="One shard of several is a part of a model.",
        build=laid_out({_A: _SHARD_A}, _A, _A),
        refusal="part of a checkpoint",
    )
    for name in ("config.json", "trainer_state.json"):
        for kind, raw in (("cut", b'{"a":'), ("lfs_pointer", _LFS), ("list", b"[]")):
            yield _set(
                f"{name.partition('.')[0]}_{kind}", "What belongs to the model is damaged.",
                f"{name}.*(not valid JSON|not a JSON object|Git LFS)", {name: raw},
            )  # fmt: skip


def _torch_shard(name: str, *values: float) -> bytes:
    """Return a torch file of one float32 tensor of two elements."""
    storage = struct.pack("<4f", *values, 0, 0)
    return torch_bytes(mapping({name: tensor((2,))}), {"0": storage})


def _averaged() -> Iterator[Case]:
    cache: dict[str, Content | None] = {
        "/blobs/1": _SHARD_A, "/blobs/2": _SHARD_B, "/blobs/3": index_bytes(_MAP),
        _A: link("../blobs/1"), _B: link("../blobs/2"), INDEX: link("../blobs/3"),
    }  # fmt: skip
    torch_names = {
        name: f"pytorch_model-0000{at}-of-00002.bin" for at, name in ((1, "a"), (2, "b"))
    }
    torch: dict[str, Content | None] = {
        INDEX: None, _A: None, _B: None,
        torch_names["a"]: _torch_shard("a", 3, 4), torch_names["b"]: _torch_shard("b", 5, 8),
        _TORCH_INDEX: index_bytes(torch_names),
    }  # fmt: skip
    names = {"a": "a b\t*[1]\u00e9.safetensors", "b": "...safetensors"}
    numbered = {"a": "1.safetensors", "b": "step-2.safetensors"}
    no_suffix = {"a": "weights_0", "b": "weights_1"}
    empty: Stored = ("F32", [0], b"")
    rows: Sequence[tuple[str, str, Mapping[str, Content | None], Any]] = (
        ("sound", "The set is as it should be.", {}, _MAP),
        ("links", "The cache of the Hub is made of links.", cache, _MAP),
        ("link_chain", "A link may lead to a link.",
         {_B: link("next"), "next": link("../elsewhere"), "/elsewhere": _SHARD_B}, _MAP),
        ("other_set", "Nothing but what the index lists counts.",
         {"model-00001-of-00009.safetensors": b"", "old.safetensors": _LFS}, _MAP),
        ("one_shard", "One shard with an index is a set.", {_A: _BOTH, _B: None},
         {"a": _A, "b": _A}),
        ("odd_names", "A plain file name may hold any character.",
         {_A: None, _B: None, names["a"]: _SHARD_A, names["b"]: _SHARD_B}, names),
        ("numbered_names", "What an index lists are shards, not the checkpoints of a run.",
         {_A: None, _B: None, numbered["a"]: _SHARD_A, numbered["b"]: _SHARD_B}, numbered),
        ("no_suffix", "A file's format is not told by its name.",
         {_A: None, _B: None, no_suffix["a"]: _SHARD_A, no_suffix["b"]: _SHARD_B}, no_suffix),
        ("more_metadata", "What else an index says does not matter.", {},
         index_bytes(_MAP, metadata={"total_size": -1, "x": [None]}, more=1.5)),
        ("no_metadata", "Only the map counts.", {}, json.dumps({"weight_map": _MAP}).encode()),
        ("torch", "Torch files have indexes, too.", torch, _MAP),
        ("empty_shard", "A shard may hold empty tensors alone.",
         {_A: _BOTH, _B: weights({"e": empty}), "/good.safetensors": weights(
             {"a": floats(1, 2), "b": floats(3, 4), "e": empty})},
         {"a": _A, "b": _A, "e": _B}),
        ("link_as_directory", "A link to a directory is that directory.",
         {f"/real/{INDEX}": index_bytes(_MAP), f"/real/{_A}": _SHARD_A, f"/real/{_B}": _SHARD_B,
          INDEX: None, _A: None, _B: None, "/bad": link("real")}, _MAP),
    )  # fmt: skip
    for name, why, changes, index in rows:
        yield _set(f"ok_{name}", why, None, changes, index=index, values=_MEAN)
