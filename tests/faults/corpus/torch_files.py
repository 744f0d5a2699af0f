"""torch files: the zip archive, the tensors that its pickle describes, its root, the old format."""

import io
import pickle
import struct
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from zlib import DEFLATED, compressobj, crc32

import torch
from hostile import (
    Member,
    call,
    group,
    legacy_bytes,
    mapping,
    name,
    number,
    pickled,
    row_major,
    sizes,
    storage,
    tensor,
    text,
    torch_bytes,
    torch_members,
    zip64_extra,
    zip_bytes,
)

from faults.case import Build, Case, alone

Row = tuple[str, str, bytes, str]  # name, why, content, refusal

DATA = struct.pack("<4f", 0, 1, 2, 3)
WEIGHTS = mapping({"w": tensor()})
PKL, ORDER, STORAGE, VERSION = torch_members(pickled(WEIGHTS))
COMMAND = text("touch canary")
EVIL = call(name("os", "system"), COMMAND)
EVIL_PICKLE = pickled(EVIL)
U32 = 0xFFFFFFFF
FAR = 2**62

# what only the CRC-32 of the data can tell, which is compared when that is asked for
_CHECKED = ("storage-of-another-checksum", "another-checksum")


def cases() -> Sequence[Case]:
    """Return the cases of this module."""
    return [
        *refused("torch-zip", _archives() + _members() + _contents()),
        *refused("torch-tensor", _tensors() + _references()),
        *refused("torch-root", _roots()),
        *refused("torch-legacy", _legacy()),
        *refused("foreign", _foreign()),
        *_averaged(),
    ]


def refused(kind: str, rows: Sequence[Row], filename: str = "bad.pt") -> list[Case]:
    """Return a case for each row: this content, beside a good checkpoint, must be refused."""
    return [
        Case(
            name=f"{kind}/{one}",
            why=why,
            build=alone(content, filename, *(["--checksum"] if one in _CHECKED else [])),
            refusal=refusal,
        )
        for one, why, content, refusal in rows
    ]


def archive(
    *,
    pkl: Member = PKL,
    order: Member = ORDER,
    data: Member = STORAGE,
    version: Member = VERSION,
    more: Sequence[Member] = (),
    raw: Mapping[str, int | bytes] | None = None,
) -> bytes:
    """Return a torch file with some members changed; ``raw`` are options of ``zip_bytes``."""
    return zip_bytes([pkl, order, data, version, *more], **(raw or {}))  # type: ignore[arg-type]


def deflated(member: Member) -> Member:
    """Return a member whose content is compressed."""
    packer = compressobj(9, DEFLATED, -15)
    packed = packer.compress(member.content) + packer.flush()
    return replace(
        member,
        content=packed,
        method=8,
        size=len(member.content),
        stored=len(packed),
        crc=crc32(member.content),
    )


def _with_second_directory() -> bytes:
    """Return an archive whose comment is another directory, of the same members but one."""
    nines = replace(STORAGE, content=struct.pack("<4f", 9, 9, 9, 9))
    hidden = replace(nines, name="archive/data/1", local_name=b"archive/data/0")
    one = archive(more=[hidden])
    at = one.index(nines.content) - 30 - len(hidden.raw_name)
    # the same bytes again, listed so that the directory alone is needed of what comes out
    other = archive(data=replace(nines, offset=at))
    start = int.from_bytes(other[-6:-2], "little")
    moved = len(one).to_bytes(4, "little")
    comment = other[start:-6] + moved + other[-2:]
    return one[:-2] + len(comment).to_bytes(2, "little") + comment


def _header_inside_the_pickle() -> bytes:
    """Return an archive whose storage lies, header and all, inside the content of its pickle."""
    inner = zip_bytes([STORAGE])[: 30 + len(STORAGE.raw_name) + len(DATA)]
    held = mapping({"w": tensor(), "x": b"B" + struct.pack("<I", len(inner)) + inner})
    pkl = replace(PKL, content=pickled(held))
    at = 30 + len(pkl.raw_name) + pkl.content.index(inner)
    listed = replace(
        STORAGE, content=b"", size=16, crc=crc32(DATA), offset=at, local_name=b"archive/filler"
    )
    return archive(pkl=pkl, data=listed)


def _archives() -> list[Row]:
    whole = archive()
    start = int.from_bytes(whole[-6:-2], "little")
    nowhere = r"zip directory.*(where|end record)"
    cut = r"truncated"
    return [
        *(
            (f"cut-{what}", "A file that ends early has lost its directory.", whole[:end], cut)
            for what, end in (
                ("by-one-byte", -1), ("before-the-end-record", -22),
                ("in-the-directory", -60), ("in-the-data", 150), ("in-a-header", 20),
            )
        ),
        ("only-an-end-record", "An archive without members holds no data.pkl.",
         zip_bytes([]), r"no data\.pkl"),
        ("bytes-after-the-end", "Nothing may follow the end record but the comment it announces.",
         archive(raw={"after": b"x"}), r"bytes after the end"),
        ("comment-longer-than-stated", "The end record states the length of the comment.",
         archive(raw={"comment": b"abc", "after": b"def"}), r"bytes after the end"),
        ("bytes-before-with-true-offsets",
         "torch begins with the first member; what lies before it may be another file.",
         archive(raw={"before": b"PK\x03\x04" + bytes(26)}),
         r"before the first member of its zip archive"),
        ("bytes-before-with-old-offsets",
         "A program put in front moves everything away from where the directory says it is.",
         archive(raw={"before": b"PK\x03\x04" + bytes(26), "start": start}), nowhere),
        ("bytes-between-directory-and-end", "The directory ends where the end record begins.",
         archive(raw={"gap": b"smuggled"}), nowhere),
        ("bytes-behind-the-version",
         "What lies between two members belongs to none, whether or not they are read.",
         archive(version=replace(VERSION, descriptor=b"smuggled")),
         r"'archive/version' does not end where"),
        ("archive-twice",
         "The offsets of an archive that follows another are wrong by the first one's size.",
         whole + whole, nowhere),
        ("second-directory-in-the-comment",
         "Two directories say different things of one file; readers choose differently.",
         _with_second_directory(), r"zip archive.*(end where|next|between|gap|director)"),
        ("directory-start-past-the-end", "The end record says where the directory begins.",
         archive(raw={"start": 2**31}), nowhere),
        ("directory-size-too-small", "The end record says how many bytes the directory has.",
         archive(raw={"directory_bytes": 10}), nowhere),
        ("more-members-than-fit", "65,000 entries do not fit into a directory of four.",
         archive(raw={"count": 65_000}), nowhere),
        ("one-member-too-many", "The end record counts an entry that is not there.",
         archive(version=replace(VERSION, comment=bytes(60)), raw={"count": 5}),
         r"truncated zip directory"),
        ("one-member-too-few", "An entry that the end record does not count may be read by others.",
         archive(raw={"count": 3}), r"zip directory.*left over"),
        ("multi-disk", "Only a part of the archive is in this file.",
         archive(raw={"disk": 1}), r"several files"),
        ("multi-disk-zip64", "Only a part of the archive is in this file.",
         zip_bytes([PKL, ORDER, STORAGE, VERSION], zip64={"disks": 2}), r"zip64|several files"),
        *(
            (f"zip64-{what}",
             "The zip64 records must be where, and as long as, they are said to be.",
             zip_bytes([PKL, ORDER, STORAGE, VERSION], zip64=fields), refusal)
            for what, fields, refusal in (
                ("locator-elsewhere", {"at": 5}, "damaged zip64"),
                ("locator-past-the-end", {"at": 2**64 - 1}, "damaged zip64"),
                ("record-without-signature", {"signature": b"PK\x06\x05"}, "damaged zip64"),
                ("counts-differ", {"here": 3}, "damaged zip64"),
                ("count-beyond-counting", {"count": 2**63}, nowhere),
                ("start-wraps-around", {"start": 2**64 - 8, "directory_bytes": 8}, nowhere),
                ("directory-of-exabytes", {"directory_bytes": 2**62}, nowhere),
            )
        ),
    ]  # fmt: skip


def _members() -> list[Row]:
    compressed = r"'archive/data/0'.*compressed or encrypted"
    header = r"'archive/data/0'.*(damaged|own) header"
    gap = r"'archive/data/0' does not end where"
    outside = r"'archive/data/0' lies outside"
    local_sizes = struct.pack("<III", crc32(DATA), 16, 16)
    longer = archive().replace(local_sizes, struct.pack("<III", crc32(DATA), 32, 32), 1)
    rows: list[tuple[str, str, Member, str]] = [
        ("storage-deflated", "Compressed bytes read in place are other numbers.",
         deflated(STORAGE), compressed),
        ("storage-of-an-unknown-method",
         "torch only stores; what 93 (zstd) makes of 16 bytes is unknown.",
         replace(STORAGE, method=93), compressed),
        ("storage-of-two-sizes", "What is stored has as many bytes before as after.",
         replace(STORAGE, stored=8, size=16), compressed),
        ("storage-encrypted", "Encrypted bytes are other numbers.",
         replace(STORAGE, flags=0x1), compressed),
        ("storage-strongly-encrypted", "Encrypted bytes are other numbers.",
         replace(STORAGE, flags=0x41), compressed),
        ("storage-is-a-patch",
         "Flag 5 says that the bytes are a patch to other data; torch refuses it.",
         replace(STORAGE, flags=0x20), r"'archive/data/0'.*(compressed|encrypted|flag|patch)"),
        ("directory-encrypted",
         "Flag 13 says that values in the local headers are masked; torch refuses it.",
         replace(STORAGE, flags=0x2000), r"'archive/data/0'.*(compressed|encrypted|flag)"),
        ("local-header-deflated", "The local header contradicts the directory.",
         replace(STORAGE, local_method=8), header),
        ("local-header-encrypted", "The local header contradicts the directory.",
         replace(STORAGE, local_flags=1), header),
        ("local-header-without-signature", "At the stated offset begins no member.",
         replace(STORAGE, local_signature=b"PK\x03\x05"), header),
        ("local-header-of-another-name",
         "The bytes belong to another storage than the directory says.",
         replace(STORAGE, local_name=b"archive/data/1"), r"'archive/data/0'.*another name"),
        ("local-name-of-64-kB", "The local header contradicts the directory.",
         replace(STORAGE, local_name=b"archive/data/0" + b"0" * 65_000),
         r"'archive/data/0'.*another name"),
        ("local-extra-field-past-the-data",
         "An extra field that is too long shifts the data by as much.",
         replace(STORAGE, local_extra=b"FB\x04\x00ZZZZ", descriptor=b"z" * 8), gap),
        ("bytes-between-members", "What lies between two members belongs to none.",
         replace(STORAGE, descriptor=b"smuggled"), gap),
        ("descriptor-announced-but-absent", "Flag 3 says that sizes follow the data.",
         replace(STORAGE, flags=8), gap),
        ("descriptor-without-signature", "16 bytes that begin with zeros are no descriptor.",
         replace(STORAGE, flags=8, descriptor=bytes(16)), gap),
        ("smaller-than-its-room", "4 of the 16 bytes belong to no member.",
         replace(STORAGE, size=12), r"'w' has 12 bytes, expected 16"),
        ("larger-than-its-room", "The member's last bytes are the next one's header.",
         replace(STORAGE, size=20), r"'w' has 20 bytes, expected 16"),
        ("gigabytes-in-a-small-file", "No file of 500 bytes holds 2 GiB.",
         replace(STORAGE, size=2**31), outside),
        ("exabytes-in-a-small-file", "The size of the zip64 field would wrap around.",
         replace(STORAGE, size=U32, extra=zip64_extra(2**64 - 1, 2**64 - 1)), outside),
        ("offset-past-the-end", "No member begins behind the directory.",
         replace(STORAGE, offset=2**31), outside),
        ("offset-one-too-large", "At the stated offset begins no member.",
         replace(STORAGE, offset=archive().index(DATA) - 43),
         header + r"|'archive/byteorder' does not end where"),
        ("offset-of-another-member", "Two members cannot lie at one place.",
         replace(STORAGE, offset=0), r"same place"),
        ("zip64-field-absent", "An offset of 0xFFFFFFFF stands for the one in the zip64 field.",
         replace(STORAGE, offset=U32), r"'archive/data/0' lacks its zip64"),
        ("zip64-field-cut", "The zip64 field is shorter than it says.",
         replace(STORAGE, offset=U32, extra=b"\x01\x00\x08\x00abc"),
         r"'archive/data/0' lacks its zip64"),
        ("entry-without-signature", "An entry of the directory begins with its signature.",
         replace(STORAGE, signature=b"PK\x01\x03"), r"damaged zip directory"),
        ("name-not-utf-8", "A name that is no text cannot be the key of a storage.",
         replace(STORAGE, name=b"archive/data/\xff"), r"name is not UTF-8"),
        ("name-with-a-NUL", "Readers that end names at NUL see the storage 0, others none.",
         replace(STORAGE, name=b"archive/data/0\0.txt"),
         r"(storage of tensor 'w' is missing|name)"),
        ("name-with-backslashes", "Member names have slashes.",
         replace(STORAGE, name="archive\\data\\0"),
         r"storage of tensor 'w' is missing|outside archive/"),
    ]  # fmt: skip
    return [
        *((one, why, archive(data=member), refusal) for one, why, member, refusal in rows),
        ("local-header-of-another-size",
         "Without flag 3, the local header states the size, and says 32 instead of 16.",
         longer, r"'archive/data/0'.*(header|size)"),
        ("storage-inside-the-pickle", "A member inside another can be two things at once.",
         _header_inside_the_pickle(), r"overlaps|does not end where"),
        ("pickle-larger-than-its-room", "The member's last bytes are the next one's header.",
         archive(pkl=replace(PKL, size=len(PKL.content) + 4)), r"'archive/data\.pkl' overlaps"),
        ("pickle-smaller-than-its-room", "A pickle may hide behind another that ends early.",
         archive(pkl=replace(PKL, size=len(PKL.content) - 4)),
         r"'archive/data\.pkl' does not end where"),
        ("pickle-deflated", "torch only stores; compressed bytes are a bomb's way in.",
         archive(pkl=deflated(PKL)), r"'archive/data\.pkl'.*compressed"),
        ("storage-twice", "Which of two members of one name counts depends on the reader.",
         archive(more=[replace(STORAGE, content=bytes(16))]), r"'archive/data/0' twice"),
        ("pickle-twice", "Which of two members of one name counts depends on the reader.",
         archive(more=[replace(PKL, content=pickled(b"}"))]), r"'archive/data\.pkl' twice"),
        *(
            (f"member-{what}", "All members lie in one folder; torch refuses others.",
             archive(more=[Member(name=path, content=b"x")]), r"(folder|directory|outside|beside)")
            for what, path in (
                ("that-climbs-out", "../../canary"),
                ("of-an-absolute-path", "/tmp/canary"),
                ("of-another-folder", "other/data/0"),
            )
        ),
    ]  # fmt: skip


def _contents() -> list[Row]:
    scripted = r"TorchScript"
    no_pickle = r"data\.pkl"
    missing = r"storage of tensor 'w' is missing"
    return [
        ("pickle-of-another-checksum", "The CRC-32 shows that bytes of the pickle changed.",
         archive(pkl=replace(PKL, crc=1)), r"data\.pkl is damaged \(CRC"),
        ("byteorder-of-another-checksum", "The CRC-32 shows that bytes changed.",
         archive(order=replace(ORDER, crc=1)), r"byteorder is damaged \(CRC"),
        ("storage-of-another-checksum", "The CRC-32 shows that weights changed.",
         archive(data=replace(STORAGE, crc=1)), r"CRC"),
        ("no-pickle", "Nothing says what the storages are.",
         zip_bytes([ORDER, STORAGE, VERSION]), no_pickle),
        ("pickle-at-the-top", "torch puts all members into a folder.",
         archive(pkl=replace(PKL, name="data.pkl")), no_pickle),
        ("pickle-too-deep", "torch puts data.pkl right into the folder.",
         archive(pkl=replace(PKL, name="archive/inner/data.pkl")), no_pickle),
        ("two-pickles", "Which of two pickles is the checkpoint is anyone's guess.",
         archive(more=[replace(PKL, name="other/data.pkl")]), no_pickle),
        ("pickle-empty", "A pickle has at least a value and its end.",
         archive(pkl=replace(PKL, content=b"")), r"pickle is damaged"),
        ("pickle-cut", "The pickle ends inside a value.",
         archive(pkl=replace(PKL, content=PKL.content[:40])), r"pickle is damaged"),
        ("pickle-without-its-end", "The last operation of a pickle is STOP.",
         archive(pkl=replace(PKL, content=PKL.content[:-1])), r"pickle is damaged"),
        ("not-torchs", "A zip file of documents is no checkpoint.",
         zip_bytes([Member(name="readme.txt", content=b"hello")]), no_pickle),
        ("torchscript-constants", "An archive with constants.pkl is a program.",
         archive(more=[Member(name="archive/constants.pkl", content=pickled(b")"))]), scripted),
        ("torchscript-code", "An archive with code is a program.",
         archive(more=[Member(name="archive/code/__torch__.py", content=b"pass")]), scripted),
        ("torchscript-code-deflated", "An archive with code is a program; torch compresses that.",
         archive(more=[deflated(Member(name="archive/code/__torch__.py", content=b"pass" * 50))]),
         scripted),
        ("byteorder-big", "The bytes of every number are in reverse order.",
         archive(order=replace(ORDER, content=b"big")), r"big-endian"),
        ("byteorder-unknown", "Only little and big are byte orders.",
         archive(order=replace(ORDER, content=b"middle")), r"endian|byte ?order"),
        ("byteorder-empty", "Only little and big are byte orders.",
         archive(order=replace(ORDER, content=b"")), r"endian|byte ?order"),
        *(
            (f"version-{what}",
             "The version tells how to read the rest; torch refuses what it does not know.",
             archive(version=replace(VERSION, content=content)), r"version")
            for what, content in (
                ("of-the-future", b"99\n"), ("zero", b"0\n"), ("in-words", b"three\n"),
            )
        ),
        ("version-missing",
         "torch writes the version into every archive, and reads none without it.",
         zip_bytes([PKL, ORDER, STORAGE]), r"version"),
        ("storage-missing", "The pickle refers to a storage that is not there.",
         zip_bytes([PKL, ORDER, VERSION]), missing),
        ("storage-in-another-folder", "The pickle refers to a storage that is not there.",
         archive(data=replace(STORAGE, name="archive/0")), missing),
        *(
            (f"storage-of-{nbytes}-bytes", "The pickle says that the storage has 16 bytes.",
             archive(data=replace(STORAGE, content=bytes(nbytes))),
             rf"storage of tensor 'w' has {nbytes} bytes, expected 16")
            for nbytes in (0, 15, 17, 32)
        ),
    ]  # fmt: skip


def _weights(value: bytes) -> bytes:
    return torch_bytes(mapping({"w": value}))


def _rebuilt(function: str, *arguments: bytes) -> bytes:
    return call(name("torch._utils", function), *arguments)


def _of_raw_storage(dtype: str, numel: int, nbytes: int) -> bytes:
    """Push a tensor whose storage is raw bytes, as torch writes dtypes without storage class."""
    return _rebuilt(
        "_rebuild_tensor_v3",
        storage(numel=nbytes, kind="UntypedStorage"),
        number(0),
        sizes([numel]),
        sizes([1]),
        b"\x89",
        b"N",
        name("torch", dtype),
    )


def _tensors() -> list[Row]:
    past = r"tensor 'w' reaches past the end of its storage"
    repeats = r"tensor 'w' is an expanded view"
    damaged = r"pickle is damaged"
    views = (
        ("one-element-too-many", (5,), (1,), 0, past),
        ("offset-too-large", (4,), (1,), 1, past),
        ("offset-far-away", (1,), (1,), FAR, past),
        ("offset-that-wraps-around", (4,), (1,), 2**64 - 16, past),
        ("stride-too-large", (2,), (4,), 0, past),
        ("stride-that-wraps-around", (2, 4), (FAR, 1), 0, past),
        ("rows-too-far-apart", (2, 2), (3, 1), 0, past),
        ("exabytes", (FAR,), (1,), 0, past),
        ("size-overflow", (2**32, 2**32), (2**32, 1), 0, past),
        ("size-overflow-to-nothing", (FAR, FAR, 4), (1, 1, 1), 0, past),
        ("size-of-2**63", (2**63,), (1,), 0, damaged),
        ("size-of-2**200", (2**200,), (1,), 0, damaged),
        ("stride-of-2**63", (2,), (2**63,), 0, damaged),
        ("offset-negative", (4,), (1,), -1, damaged),
        ("size-negative", (-4,), (1,), 0, damaged),
        ("sizes-negative-twice", (-2, -2), (2, 1), 0, damaged),
        ("stride-negative", (4,), (-1,), 3, damaged),
        ("fewer-strides-than-sizes", (2, 2), (1,), 0, damaged),
        ("more-strides-than-sizes", (4,), (1, 1), 0, damaged),
        ("expanded", (4, 4), (1, 0), 0, repeats),
        ("expanded-to-terabytes", (2**38,), (0,), 0, repeats),
        ("expanded-beyond-counting", (FAR,) * 16, (0,) * 16, 0, repeats),
        ("windows-that-overlap", (3, 2), (1, 1), 0, repeats),
        ("65-dimensions", (1,) * 65, (1,) * 65, 0, r"'w' is of more than 64 dimensions"),
    )
    kinds = (
        ("quantised", "_rebuild_qtensor", "quantised"),
        ("sparse", "_rebuild_sparse_tensor", "sparse"),
        ("nested", "_rebuild_nested_tensor", "nested"),
        ("meta", "_rebuild_meta_tensor_no_storage", "no values"),
        ("subclass", "_rebuild_wrapper_subclass", "subclass"),
        ("numpy", "_rebuild_device_tensor_from_numpy", "numpy"),
    )
    arguments = (storage(), number(0), sizes([4]), sizes([1]))
    four = b"G" + struct.pack(">d", 4)
    return [
        *(
            (f"view-{what}",
             "A view must lie inside its storage, and hold each element of it once.",
             _weights(tensor(shape, strides, offset=offset)), refusal)
            for what, shape, strides, offset, refusal in views
        ),
        *(
            (what, "Only a plain array of numbers can be averaged number by number.",
             _weights(_rebuilt(function, *arguments, b"N")), rf"tensor 'w' is .*{refusal}")
            for what, function, refusal in kinds
        ),
        *(
            (f"{what}-not-applied",
             "The stored bytes are not the values before the flag is applied to them.",
             _weights(tensor(metadata=mapping({what: b"\x88"}))),
             r"tensor 'w' is .*(conjugation|negation)")
            for what in ("conj", "neg")
        ),
        ("tensor-object", "An object of torch.Tensor without a rebuilding function has no values.",
         _weights(name("torch", "Tensor") + b")\x81"), r"tensor 'w' is .*subclass"),
        ("storage-as-a-tensor", "A storage has no shape.",
         torch_bytes(mapping({"w": storage()})), r"no weights"),
        ("size-of-a-truth-value", "True is not a size.",
         _weights(_rebuilt("_rebuild_tensor_v2", *arguments[:2], group(b"\x88"), sizes([1]))),
         damaged),
        ("size-of-a-float", "4.0 is not a size.",
         _weights(_rebuilt("_rebuild_tensor_v2", *arguments[:2], group(four), sizes([1]))),
         damaged),
        ("without-a-storage", "None is not a storage.",
         _weights(_rebuilt("_rebuild_tensor_v2", b"N", *arguments[1:])), damaged),
        ("without-arguments", "A tensor is rebuilt from storage, offset, sizes and strides.",
         _weights(_rebuilt("_rebuild_tensor_v2")), damaged),
        ("raw-storage-without-a-dtype", "Raw bytes are no numbers until a dtype says which.",
         _weights(tensor(stored=storage(numel=16, kind="UntypedStorage"))), damaged),
        ("dtype-that-is-none", "torch.device is not a dtype.",
         _weights(_of_raw_storage("device", 4, 16)), damaged),
        ("elements-of-four-bits", "Two numbers share a byte.",
         _weights(_of_raw_storage("float4_e2m1fn_x2", 16, 16)), r"tensor 'w' is quantised"),
        ("dtype-wider-than-the-bytes", "Four float64 numbers need 32 bytes, not 16.",
         _weights(_of_raw_storage("float64", 4, 16)), past),
    ]  # fmt: skip


def _references() -> list[Row]:
    kind = name("torch", "FloatStorage")
    damaged = r"pickle is damaged"
    identities = (
        ("that-is-none", b"N"),
        ("that-is-a-string", text("storage")),
        ("without-a-size", group(text("storage"), kind, text("0"), text("cpu"))),
        ("to-a-module", group(text("module"), kind, text("0"), text("cpu"), number(4))),
        ("to-a-kind-in-words", group(text("storage"), text("FloatStorage"), *_TO_FOUR)),
        ("of-a-negative-size", group(text("storage"), kind, *_TO_FOUR[:2], number(-4))),
        ("of-a-size-in-words", group(text("storage"), kind, *_TO_FOUR[:2], text("4"))),
        ("by-a-number", group(text("storage"), kind, number(0), *_TO_FOUR[1:])),
    )
    return [
        *(
            (f"reference-{what}",
             "A storage is referred to by its class, key, device and number of elements.",
             _weights(tensor(stored=identity + b"Q")), damaged)
            for what, identity in identities
        ),
        ("reference-to-a-view-of-a-storage",
         "torch 0.1 shared views of storages; their offset must not be lost.",
         _weights(tensor(stored=group(text("storage"), kind, *_TO_FOUR, group(text("1"))) + b"Q")),
         r"views of storages"),
        ("reference-that-climbs-out", "The key of a storage is no path to a file.",
         _weights(tensor(stored=storage("../../../../etc/passwd"))),
         r"storage of tensor 'w' is missing"),
        ("storage-wider-than-its-bytes", "Four float64 numbers need 32 bytes, not 16.",
         _weights(tensor(stored=storage(kind="DoubleStorage"))),
         r"storage of tensor 'w' has 16 bytes, expected 32"),
        ("storage-narrower-than-its-bytes",
         "Four float16 numbers need 8 bytes; which 8 of these 16?",
         _weights(tensor(stored=storage(kind="HalfStorage"))),
         r"storage of tensor 'w' has 16 bytes, expected 8"),
        *(
            (f"second-reference-{what}",
             "Every reference to a storage states its size, and all of them the same.",
             torch_bytes(
                 mapping({"w": tensor(), "v": tensor([numel], stored=storage(numel=numel))})
             ),
             r"refers to the storage '0' in two ways")
            for what, numel in (("larger", 40), ("smaller", 2), ("huge", 2**60))
        ),
        *(
            (f"storage-{kind}", "The integers of a quantised storage are no weights.",
             _weights(tensor(stored=storage(kind=kind))), r"quantised")
            for kind in ("QInt8Storage", "QUInt8Storage", "QInt32Storage")
        ),
        ("storage-of-eight-bits", "The mean of 8-bit floats loses most of what they hold.",
         torch_bytes(
             mapping({"w": tensor(stored=storage(kind="Float8_e4m3fnStorage"))}),
             {"0": bytes(4)},
         ),
         r"quantised|float8"),
    ]  # fmt: skip


_TO_FOUR = (text("0"), text("cpu"), number(4))  # the rest of a reference to a storage


def _roots() -> list[Row]:
    cyclic = b"}q\x00" + text("model") + b"h\x00s"
    no_dict = r"expected a state dict"
    no_weights = r"no weights found"
    depth = 20_000
    return [
        ("list", "A list gives tensors no names.", torch_bytes(b"]" + tensor() + b"a"), no_dict),
        ("tensor", "A tensor alone has no name.", torch_bytes(tensor()), r"a tensor, " + no_dict),
        ("tuple", "A tuple gives tensors no names.", torch_bytes(group(tensor())), no_dict),
        ("nothing", "None holds no weights.", torch_bytes(b"N"), no_dict),
        ("number", "A number holds no weights.", torch_bytes(number(7)), no_dict),
        ("string", "A string holds no weights.", torch_bytes(text("w")), no_dict),
        ("namespace", "The attributes of an object are no state dict.",
         torch_bytes(name("argparse", "Namespace") + b")\x81" + WEIGHTS + b"b"), no_dict),
        ("empty", "An empty state dict holds no weights.", torch_bytes(b"}"), no_weights),
        ("no-tensors", "A state dict of numbers holds no weights.",
         torch_bytes(mapping({"epoch": number(3), "loss": b"G" + struct.pack(">d", 0.5)})),
         no_weights),
        ("only-an-optimizer", "The moments of an optimizer are no weights.",
         torch_bytes(mapping({"optimizer": mapping({"state": mapping({"m": tensor()})})})),
         no_weights),
        ("only-an-average", "An average kept in training is taken only when asked for.",
         torch_bytes(mapping({"model_ema": WEIGHTS})), no_weights + r".*--state-key model_ema"),
        ("two-candidates", "Which of two networks is meant is anyone's guess.",
         torch_bytes(mapping({"model": WEIGHTS, "net": WEIGHTS})),
         r"'model', 'net' all hold weights"),
        ("cyclic", "A mapping that holds itself never ends.", torch_bytes(cyclic), no_weights),
        ("cyclic-with-weights", "A mapping that holds itself never ends.",
         torch_bytes(b"}q\x00(" + text("w") + tensor() + text("model") + b"h\x00u"), no_weights),
        ("deep", "Mappings nested thousands of times must not end the process.",
         torch_bytes(b"}" + (text("model") + b"}") * depth + b"s" * depth), no_weights),
        ("module", "A whole module is a program: its class is code.",
         torch_bytes(name("torch.nn.modules.linear", "Linear") + b")\x81" + WEIGHTS + b"b"),
         r"needs Python code 'torch\.nn\.modules\.linear\.Linear'"),
        ("module-below-a-key", "A whole module is a program: its class is code.",
         torch_bytes(mapping({"model": name("__main__", "Net") + b")\x81" + WEIGHTS + b"b"})),
         r"needs Python code '__main__\.Net'"),
        *(
            (f"key-{what}", "The names of tensors are strings.",
             torch_bytes(mapping([(text("w"), tensor()), (key, tensor())])),
             r"key that is not a string")
            for what, key in (
                ("number", number(1)), ("none", b"N"), ("bytes", b"C\x01w"),
                ("tuple", group(text("w"))), ("tensor", tensor()),
            )
        ),
        ("key-no-unicode", "A lone surrogate cannot be written as UTF-8.",
         torch_bytes(mapping({"w\ud800": tensor()})), r"'w\\ud800' is not valid Unicode"),
        ("key-twice", "Which of two tensors of one name counts depends on the reader.",
         torch_bytes(mapping([(text("w"), tensor()), (text("w"), tensor((2,)))])), r"'w' twice"),
        ("key-that-moves-the-cursor",
         "A name must not clear the screen of whoever reads the error.",
         torch_bytes(mapping({"w\x1b[2J\n": tensor((5,))})), r"'w\\x1b\[2J\\n' reaches past"),
        ("key-that-reverses-the-line", "A name must not turn the text around that follows it.",
         torch_bytes(mapping({"w\u202e": tensor((5,))})), r"'w\\u202e' reaches past"),
        ("key-of-100-kB", "A name must not push the error out of sight.",
         torch_bytes(mapping({"w" * 100_000: tensor((5,))})), r"past the end of its storage"),
    ]  # fmt: skip


def _legacy() -> list[Row]:
    whole = legacy_bytes(WEIGHTS)
    magic = number(0x1950A86A20F9469CFC6C)
    cut = r"truncated"
    mentioned = r"'{}' that its pickle does not mention once"
    return [
        *(
            (f"cut-{what}", "The file ends before the last storage does.", whole[:end], cut)
            for what, end in (
                ("in-the-magic-number", 14), ("in-the-machine", 40), ("in-the-root", 120),
                ("in-the-keys", -26), ("in-the-count", -20), ("in-the-data", -1),
            )
        ),
        ("bytes-left-over", "The last storage ends the file.",
         legacy_bytes(WEIGHTS, after=b"x"), r"bytes left over"),
        ("magic-number-that-is-dropped",
         "The first pickle is the magic number, not a program that mentions it.",
         legacy_bytes(WEIGHTS, magic=magic + b"0N"), r"magic number"),
        ("version-of-the-future", "1001 is the only protocol version that torch ever wrote.",
         legacy_bytes(WEIGHTS, version=number(1002)), r"protocol version 1001"),
        ("version-in-words", "The protocol version is a number.",
         legacy_bytes(WEIGHTS, version=text("1001")), r"protocol version 1001"),
        ("big-endian-machine", "The bytes of every number are in reverse order.",
         legacy_bytes(WEIGHTS, machine=mapping({"little_endian": b"\x89"})), r"big-endian"),
        ("machine-unknown", "Without a byte order, bytes are no numbers.",
         legacy_bytes(WEIGHTS, machine=b"}"), r"endian|byte order"),
        ("keys-that-are-no-list", "The fifth pickle lists the keys of the storages.",
         legacy_bytes(WEIGHTS, keys=b"N"), r"list of storages"),
        ("key-that-is-a-number", "The keys of storages are strings.",
         legacy_bytes(WEIGHTS, keys=b"]" + number(0) + b"a"), r"list of storages"),
        ("key-unknown", "A storage that no tensor refers to has an unknown size.",
         legacy_bytes(WEIGHTS, [("1", 4, DATA)]), mentioned.format(1)),
        ("key-twice", "One storage cannot lie at two places.",
         legacy_bytes(WEIGHTS, [("0", 4, DATA)] * 2), mentioned.format(0)),
        ("key-missing", "The pickle refers to a storage that is not there.",
         legacy_bytes(WEIGHTS, []), r"storage of tensor 'w' is missing"),
        *(
            (f"count-{what}", "The count before a storage is that of its references.",
             legacy_bytes(WEIGHTS, [("0", count, DATA)]), rf"has {count} elements, expected 4")
            for what, count in (("larger", 5), ("negative", -4), ("huge", 2**63 - 1))
        ),
        ("reference-larger",
         "Every reference to a storage states its size, and all of them the same.",
         legacy_bytes(mapping({"w": tensor(), "v": tensor([40], stored=storage(numel=40))})),
         r"refers to the storage '0' in two ways"),
        ("exabytes", "No file of 500 bytes holds 2**62 numbers.",
         legacy_bytes(mapping({"w": tensor([FAR], stored=storage(numel=FAR))})), cut),
        ("view-past-the-storage", "A view must lie inside its storage.",
         legacy_bytes(mapping({"w": tensor([5])})), r"reaches past the end of its storage"),
        ("quantised", "The integers of a quantised storage are no weights.",
         legacy_bytes(mapping({"w": tensor(stored=storage(kind="QInt8Storage"))})), r"quantised"),
        ("root-list", "A list gives tensors no names.",
         legacy_bytes(b"]" + tensor() + b"a"), r"expected a state dict"),
        ("pickle-damaged", "An operation needs a value, and the stack is empty.",
         legacy_bytes(b"R"), r"pickle is damaged"),
        ("tar", "The format before that one is not read.",
         tar_bytes(), r"oldest format|tar archive"),
    ]  # fmt: skip


def tar_bytes(root: bytes = WEIGHTS) -> bytes:
    """Return a torch file of the oldest format: a tar archive of storages, tensors and a pickle."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as target:
        for member, content in (
            ("sys_info", pickled(mapping({"little_endian": b"\x88"}))),
            ("pickle", pickled(root)),
            ("storages", pickled(number(0))),
            ("tensors", pickled(number(0))),
        ):
            told = tarfile.TarInfo(member)
            told.size = len(content)
            target.addfile(told, io.BytesIO(content))
    return buffer.getvalue()


def _foreign() -> list[Row]:
    pointer = (
        b"version https://git-lfs.github.com/spec/v1\n"
        b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
    )
    formats = (
        ("html", b"<!DOCTYPE html>\n<html><body>404</body></html>", r"HTML"),
        ("html-after-spaces", b"\n  <html><head>", r"HTML"),
        ("lfs-pointer", pointer, r"Git LFS"),
        ("gguf", b"GGUF\x03\0\0\0" + bytes(60), r"GGUF"),
        ("hdf5", b"\x89HDF\r\n\x1a\n" + bytes(60), r"HDF5"),
        ("onnx", b"\x08\x08\x12\x07pytorch\x1a\x052.1.0" + bytes(40), r"ONNX"),
        ("gzip", b"\x1f\x8b\x08\0" + bytes(60), r"gzip"),
        ("zstd", b"\x28\xb5\x2f\xfd" + bytes(60), r"zstd"),
        ("xz", b"\xfd7zXZ\0" + bytes(60), r"xz"),
        ("bzip2", b"BZh91AY&SY" + bytes(60), r"bzip2"),
        ("pickle", pickle.dumps({"w": [1.0]}), r"plain pickle"),
        ("pickle-of-protocol-0", pickle.dumps({"w": [1.0]}, 0), r"plain pickle"),
        ("tensorflow-list", b'model_checkpoint_path: "model.ckpt-1"\n', r"TensorFlow"),
        ("json-error", b'{"error": "Repository not found"}', r"neither"),
        ("png", b"\x89PNG\r\n\x1a\n" + bytes(60), r"neither"),
        ("elf", b"\x7fELF\x02\x01\x01" + bytes(60), r"neither"),
        ("random", bytes((7 * at * at + 13) % 251 for at in range(600)), r"neither"),
        ("zeros", bytes(4096), r"neither"),
        ("nothing", b"", r"empty"),
        ("one-byte", b"P", r"neither"),
        ("half-a-signature", b"PK\x03", r"neither"),
    )
    return [
        (what, "Another format is told by its first bytes, not by its name.", content, refusal)
        for what, content, refusal in formats
    ]


# -- what must be averaged: from numbers 0..7 in one file and 2..9 in the other, 1..8

Make = Callable[[Sequence[float]], bytes]


def _floats(numbers: Sequence[float]) -> bytes:
    return struct.pack(f"<{len(numbers)}f", *numbers)


def view(
    shape: Sequence[int] = (8,), strides: Sequence[int] | None = None, offset: int = 0
) -> bytes:
    """Push a view of the storage with eight numbers."""
    return tensor(shape, strides or row_major(shape), offset=offset, stored=storage(numel=8))


def both(make: Make, *options: str, suffix: str = ".pt") -> Build:
    """Return what writes two files, of the numbers 0 to 7 and 2 to 9."""

    def build(directory: Path) -> Sequence[str]:
        names = [f"{letter}{suffix}" for letter in "ab"]
        for first, one in zip((0, 2), names, strict=True):
            (directory / one).write_bytes(make([float(first + at) for at in range(8)]))
        return [*names, *options]

    return build


def in_archive(value: bytes, *, folder: str = "archive") -> Make:
    """Return what puts eight numbers beside a pickle of this value."""
    return lambda numbers: zip_bytes(
        torch_members(pickled(value), {"0": _floats(numbers)}, root=folder)
    )


def _changed_members(change: Callable[[Member], Member], **options: bytes) -> Make:
    members = torch_members(pickled(mapping({"w": view()})), {"0": b""})

    def make(numbers: Sequence[float]) -> bytes:
        filled = [
            replace(one, content=_floats(numbers)) if one.name == "archive/data/0" else one
            for one in members
        ]
        return zip_bytes([change(one) for one in filled], **options)  # type: ignore[arg-type]

    return make


def _of_dtype(kind: str, layout: str) -> Make:
    return lambda numbers: torch_bytes(
        mapping({"w": tensor((8,), stored=storage(numel=8, kind=kind))}),
        {"0": struct.pack(f"<8{layout}", *numbers)},
    )


def _of_bfloat16(numbers: Sequence[float]) -> bytes:
    raw = b"".join(struct.pack("<f", one)[2:] for one in numbers)
    stored = storage(numel=8, kind="BFloat16Storage")
    return torch_bytes(mapping({"w": tensor((8,), stored=stored)}), {"0": raw})


def _beside_integers(numbers: Sequence[float]) -> bytes:
    counted = tensor((), stored=storage("1", 1, "LongStorage"))
    count = struct.pack("<q", 2**53 + 1 + int(numbers[0]))
    return torch_bytes(mapping({"w": view(), "n": counted}), {"0": _floats(numbers), "1": count})


def _complex(numbers: Sequence[float]) -> bytes:
    pairs = tensor((4,), stored=storage(numel=4, kind="ComplexFloatStorage"))
    return torch_bytes(mapping({"c": pairs}), {"0": _floats(numbers)})


def _of_a_trainer(protocol: int, is_legacy: bool = False) -> Make:
    """Return what has torch save a whole training: weights, optimizer, numbers."""

    def make(numbers: Sequence[float]) -> bytes:
        weight = torch.nn.Parameter(torch.tensor(numbers).reshape(2, 4))
        optimizer = torch.optim.Adam([weight], lr=1e-3)
        weight.sum().backward()  # type: ignore[no-untyped-call]  # torch does not type it
        optimizer.step()
        with torch.no_grad():
            weight.copy_(torch.tensor(numbers).reshape(2, 4))
        buffer = io.BytesIO()
        content = {
            "epoch": 3,
            "global_step": 100 + int(numbers[0]),
            "state_dict": {"w": weight.data, "t": weight.data.T, "none": torch.empty(0, 3)},
            "optimizer": optimizer.state_dict(),
            "best": float("nan"),
            "args": {"lr": 0.1, "seed": None, "sizes": (1, 2)},
        }
        torch.save(
            content,
            buffer,
            pickle_protocol=protocol,
            _use_new_zipfile_serialization=not is_legacy,
        )
        return buffer.getvalue()

    return make


def _two_old_storages(numbers: Sequence[float]) -> bytes:
    halves = (("1", 4, _floats(numbers[4:])), ("0", 4, _floats(numbers[:4])))
    root = mapping({"w": tensor(), "v": tensor(stored=storage("1"))})
    return legacy_bytes(root, halves)


def _averaged() -> list[Case]:
    mean = [float(at) for at in range(1, 9)]
    ordered = name("collections", "OrderedDict")
    columns = [1, 5, 2, 6, 3, 7, 4, 8]
    every = {"w": mean}
    trained: Mapping[str, Sequence[float]] = {"w": mean, "t": columns, "none": []}
    descriptor = b"PK\x07\x08" + bytes(12)
    made: list[tuple[str, str, Make, Mapping[str, Sequence[float]]]] = [
        ("plain", "The file that the bad ones are made of is a good one.",
         in_archive(mapping({"w": view()})), every),
        ("tied", "Two names may have one storage.",
         in_archive(mapping({"a": view(), "b": view()})), {"a": mean}),
        ("transposed", "A view may go through its storage column by column.",
         in_archive(mapping({"w": view((4, 2), (1, 4))})), {"w": columns}),
        ("parts-of-a-storage", "Views may begin inside a storage.",
         in_archive(mapping({"head": view((3,)), "tail": view((5,), offset=3)})),
         {"head": mean[:3], "tail": mean[3:]}),
        ("every-second", "A view may leave elements out.",
         in_archive(mapping({"w": view((4,), (2,), 1)})), {"w": [2, 4, 6, 8]}),
        ("overlapping-parts", "Two tensors may share some elements of a storage.",
         in_archive(mapping({"a": view((5,)), "b": view((5,), offset=3)})),
         {"a": mean[:5], "b": mean[3:]}),
        ("element-in-two-rows", "A view may hold an element twice if it does not grow by that.",
         in_archive(mapping({"w": view((2, 2), (2, 2))})), {"w": [1, 3, 3, 5]}),
        ("no-dimensions", "A tensor without dimensions has one value.",
         in_archive(mapping({"w": view((), (), 5)})), {"w": [6]}),
        ("empty", "A tensor may have no elements, wherever it says that it lies.",
         in_archive(mapping({"w": view(), "none": view((0, 3), (3, 1), 99)})),
         {"w": mean, "none": []}),
        ("ordered", "A state dict is an OrderedDict with a version of each module.",
         in_archive(
             ordered
             + b")R"
             + mapping({"w": view()})[1:]
             + mapping({"_metadata": ordered + b")R"})
             + b"b"
         ),
         every),
        ("parameter", "A parameter is a tensor with a flag.",
         in_archive(
             mapping({"w": _rebuilt("_rebuild_parameter", view(), b"\x88", ordered + b")R")})
         ),
         every),
        ("beside-numbers", "What is no tensor beside tensors is left out.",
         in_archive(mapping({"w": view(), "step": number(3), "note": text("x"), "no": b"N"})),
         every),
        ("hostile-facts", "A step of a hundred digits or a rate in words is no reason to fail.",
         in_archive(
             mapping(
                 {
                     "model": mapping({"w": view()}),
                     "epoch": number(2**300),
                     "global_step": text("many"),
                     "loss": view(),
                     "optimizer": mapping({"param_groups": b"N"}),
                     "lr_scheduler": mapping({"last_epoch": number(-(2**70))}),
                 }
             )
         ),
         every),
        ("on-a-device-that-is-absent", "Where a storage was does not matter.",
         in_archive(mapping({"w": view()}).replace(text("cpu"), text("cuda:7"))), every),
        ("another-folder", "The folder in the archive has the name of the file that was saved.",
         in_archive(mapping({"w": view()}), folder="my.model v1.0"), every),
        ("folder-that-climbs-out",
         "Nothing is unpacked, so what the folder is called does no harm.",
         in_archive(mapping({"w": view()}), folder=".."), every),
        ("no-checksums", "A CRC-32 of 0 was not computed, as torch can be told.",
         _changed_members(lambda one: replace(one, crc=0)), every),
        ("padded", "torch aligns data with an extra field.",
         _changed_members(lambda one: replace(one, local_extra=b"FB\x06\x00ZZZZZZ")), every),
        ("with-descriptors", "Sizes may follow the data, as torch writes them.",
         _changed_members(lambda one: replace(one, flags=8, descriptor=descriptor, comment=b"x")),
         every),
        ("comment", "An archive may have a comment.",
         _changed_members(lambda one: one, comment=b"made by hand"), every),
        ("float16", "Halves are averaged.", _of_dtype("HalfStorage", "e"), every),
        ("float64", "Doubles are averaged.", _of_dtype("DoubleStorage", "d"), every),
        ("integers", "Integers are not averaged: those of the last file count, to the last digit.",
         _beside_integers, {"w": mean, "n": [2**53 + 3]}),
        ("complex", "Both parts of a complex number are averaged.", _complex, {"c": mean}),
        ("old-format", "torch wrote the old format until 1.6, and still does on demand.",
         lambda numbers: legacy_bytes(mapping({"w": view()}), [("0", 8, _floats(numbers))]), every),
        ("old-format-of-two-storages",
         "Storages lie in the order of their keys in the fifth pickle.",
         _two_old_storages, {"w": mean[:4], "v": mean[4:]}),
        *(
            (f"training-of-protocol-{protocol}{'-old' if is_legacy else ''}",
             "A trainer's file holds an optimizer and numbers beside the weights.",
             _of_a_trainer(protocol, is_legacy),
             trained)
            for protocol, is_legacy in ((2, False), (5, False), (2, True))
        ),
    ]  # fmt: skip
    return [
        *(
            Case(name=f"torch-good/{one}", why=why, build=both(make), refusal=None, values=values)
            for one, why, make, values in made
        ),
        Case(
            name="torch-good/bfloat16",
            why="The upper halves of floats are averaged.",
            build=both(_of_bfloat16, "--dtype", "float32"),
            refusal=None,
            values=every,
        ),
    ]
