"""The zip directory: stored members at known offsets, and every way to say something else."""

import os
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hostile import Member, whole, zip64_extra, zip_bytes

from ckptavg.checkpoint.files import PositionalFile
from ckptavg.checkpoint.zip_directory import ZipDirectory
from ckptavg.errors import CheckpointError

ONE = Member(name="a/one", content=b"first")
TWO = Member(name="a/two", content=b"second", local_extra=b"FB\x02\x00ZZ")
U32 = 0xFFFFFFFF
DESCRIPTOR = b"PK\x07\x08" + bytes(12)
LONG_DESCRIPTOR = b"PK\x07\x08" + bytes(20)


def contents(tmp_path: Path, raw: bytes) -> dict[str, bytes]:
    """Return what every member of an archive holds."""
    path = tmp_path / "w.pt"
    path.write_bytes(raw)
    file = PositionalFile(path, "w.pt")
    try:
        directory = ZipDirectory(file)
        return {
            name: file.read(directory.data_offset(member), member.nbytes)
            for name, member in directory.members.items()
        }
    finally:
        file.close()


def refused(tmp_path: Path, raw: bytes, what: str) -> None:
    """Check that an archive is refused with exactly this message."""
    with pytest.raises(CheckpointError, match=whole(f"w.pt: {what}")):
        contents(tmp_path, raw)


EXPECTED = {"a/one": b"first", "a/two": b"second"}


@pytest.mark.parametrize(
    "raw",
    [
        zip_bytes([ONE, TWO]),
        zip_bytes([ONE, TWO], comment=b"made by hand"),
        zip_bytes([ONE, TWO], zip64={}),
        zip_bytes([ONE, TWO], zip64={}, count=0xFFFF, start=U32, directory_bytes=U32),
        zip_bytes([replace(ONE, flags=8, descriptor=DESCRIPTOR), TWO]),
        zip_bytes([replace(ONE, flags=8, descriptor=LONG_DESCRIPTOR), TWO]),
        zip_bytes([replace(ONE, flags=0x800, comment=b"said of it", extra=b"XX\x01\x00y"), TWO]),
        zip_bytes([replace(ONE, size=U32, offset=U32, extra=zip64_extra(5, 5, 0)), TWO]),
        zip_bytes([replace(ONE, offset=U32, extra=b"XX\x01\x00y" + zip64_extra(0)), TWO]),
        zip_bytes([replace(ONE, size=U32, extra=zip64_extra(5, 5)), TWO]),
    ],
    ids=[
        "plain", "comment", "zip64", "only in zip64", "descriptor", "long descriptor", "extra",
        "zip64 sizes", "zip64 offset", "zip64 size",
    ],
)  # fmt: skip
def test_archives_of_stored_members_are_read(tmp_path: Path, raw: bytes) -> None:
    assert contents(tmp_path, raw) == EXPECTED


def test_an_empty_archive_has_no_members(tmp_path: Path) -> None:
    assert contents(tmp_path, zip_bytes([])) == {}


def test_an_empty_member_and_names_of_any_alphabet_are_read(tmp_path: Path) -> None:
    raw = zip_bytes([Member(name="é/空"), Member(name="")])
    assert contents(tmp_path, raw) == {"é/空": b"", "": b""}


def test_archives_of_pythons_zipfile_are_read(tmp_path: Path) -> None:
    path = tmp_path / "w.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in EXPECTED.items():
            archive.writestr(name, content)
        with archive.open("a/three", "w", force_zip64=True) as member:
            member.write(b"third")
    assert contents(tmp_path, path.read_bytes()) == {**EXPECTED, "a/three": b"third"}


def test_an_archive_without_a_comment_is_found_by_its_last_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    whole_read = PositionalFile.read

    def noted(file: PositionalFile, offset: int, nbytes: int) -> bytes:
        read.append(nbytes)
        return whole_read(file, offset, nbytes)

    monkeypatch.setattr(PositionalFile, "read", noted)
    large = Member(name="a/large", content=bytes(100_000))
    assert len(contents(tmp_path, zip_bytes([large]))["a/large"]) == 100_000
    assert read.pop() == 100_000
    assert max(read) < 100
    contents(tmp_path, zip_bytes([ONE], comment=b"x" * 1000))
    assert max(read) > 1000


def test_an_end_record_inside_another_is_no_end(tmp_path: Path) -> None:
    raw = zip_bytes([ONE], directory_bytes=int.from_bytes(b"PK\x05\x06", "little"))
    size = len(raw)
    refused(
        tmp_path,
        raw,
        f"has {size} bytes, but no zip directory at its end: the torch file is truncated",
    )


def test_a_member_beyond_four_gigabytes_is_found(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    far = 5 * 2**30
    raw = zip_bytes([ONE])
    body = 30 + len("a/one") + len("first")
    moved = zip_bytes(
        [replace(ONE, offset=U32, extra=zip64_extra(far))],
        zip64={"start": far + body, "at": far + body + 46 + 5 + 12},
        start=U32,
    )
    with path.open("wb") as sparse:
        sparse.seek(far)
        sparse.write(raw[:body] + moved[body:])
    file = PositionalFile(path, "w.pt")
    directory = ZipDirectory(file)
    assert file.read(directory.data_offset(directory.members["a/one"]), 5) == b"first"
    file.close()
    path.unlink()


BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "no end record": (
        lambda: b"PK\x03\x04" + bytes(100),
        "has 104 bytes, but no zip directory at its end: the torch file is truncated",
    ),
    "end record cut": (
        lambda: zip_bytes([ONE])[:-1],
        "has 112 bytes, but no zip directory at its end: the torch file is truncated",
    ),
    "bytes at the end": (
        lambda: zip_bytes([ONE], after=b"x"),
        "has bytes after the end of its zip archive",
    ),
    "comment that lies": (
        lambda: zip_bytes([ONE], comment=b"abc")[:-1],
        "has bytes after the end of its zip archive",
    ),
    "second disk": (
        lambda: zip_bytes([ONE], disk=1),
        "is part of a zip archive in several files",
    ),
    "bytes in front": (
        lambda: zip_bytes([ONE, TWO], before=b"PK\x03\x04", start=30),
        "has a zip directory that is not where its end record says",
    ),
    "bytes behind the directory": (
        lambda: zip_bytes([ONE, TWO], gap=b"x"),
        "has a zip directory that is not where its end record says",
    ),
    "directory size that lies": (
        lambda: zip_bytes([ONE, TWO], directory_bytes=10),
        "has a zip directory that is not where its end record says",
    ),
    "too many entries": (
        lambda: zip_bytes([ONE, TWO], count=60_000),
        "has a zip directory that is not where its end record says",
    ),
    "an entry too many": (
        lambda: zip_bytes([replace(ONE, comment=bytes(100)), TWO], count=3),
        "has a truncated zip directory",
    ),
    "an entry too few": (
        lambda: zip_bytes([ONE, TWO], count=1),
        "has a zip directory with bytes left over",
    ),
    "zip64 locator that lies": (
        lambda: zip_bytes([ONE], zip64={"at": 5}),
        "has a damaged zip64 directory",
    ),
    "zip64 locator past the end": (
        lambda: zip_bytes([ONE], zip64={"at": 2**64 - 1}),
        "has a damaged zip64 directory",
    ),
    "zip64 of two disks": (
        lambda: zip_bytes([ONE], zip64={"disks": 2}),
        "has a damaged zip64 directory",
    ),
    "zip64 record damaged": (
        lambda: zip_bytes([ONE], zip64={"signature": b"PK\x06\x05"}),
        "has a damaged zip64 directory",
    ),
    "zip64 counts that differ": (
        lambda: zip_bytes([ONE], zip64={"here": 2}),
        "has a damaged zip64 directory",
    ),
    "zip64 entries beyond counting": (
        lambda: zip_bytes([ONE], zip64={"count": 2**63}),
        "has a zip directory that is not where its end record says",
    ),
    "zip64 start beyond the file": (
        lambda: zip_bytes([ONE], zip64={"start": 2**64 - 60, "directory_bytes": 51}),
        "has a zip directory that is not where its end record says",
    ),
    "entry damaged": (
        lambda: zip_bytes([ONE, replace(TWO, signature=b"PK\x01\x03")]),
        "has a damaged zip directory",
    ),
    "name reaches past the directory": (
        lambda: zip_bytes([ONE]).replace(b"\x05" + bytes(17) + b"a/", b"\xff" + bytes(17) + b"a/"),
        "has a damaged zip directory",
    ),
    "name that is not UTF-8": (
        lambda: zip_bytes([replace(ONE, name=b"a/\xff")]),
        "has a zip member whose name is not UTF-8",
    ),
    "deflated": (
        lambda: zip_bytes([ONE, replace(TWO, method=8)]),
        "the zip archive's member 'a/two' is compressed or encrypted, which torch.save never does",
    ),
    "encrypted": (
        lambda: zip_bytes([ONE, replace(TWO, flags=1)]),
        "the zip archive's member 'a/two' is compressed or encrypted, which torch.save never does",
    ),
    "two sizes": (
        lambda: zip_bytes([ONE, replace(TWO, stored=5)]),
        "the zip archive's member 'a/two' is compressed or encrypted, which torch.save never does",
    ),
    "same name": (
        lambda: zip_bytes([ONE, replace(TWO, name="a/one")]),
        "the zip archive holds 'a/one' twice",
    ),
    "same place": (
        lambda: zip_bytes([ONE, replace(TWO, offset=0)]),
        "two members of the zip archive lie at the same place",
    ),
    "outside": (
        lambda: zip_bytes([ONE, replace(TWO, offset=1000)]),
        "the zip archive's member 'a/two' lies outside the file",
    ),
    "too long": (
        lambda: zip_bytes([ONE, replace(TWO, size=50)]),
        "the zip archive's member 'a/two' lies outside the file",
    ),
    "gigabytes": (
        lambda: zip_bytes([replace(ONE, size=2**31)]),
        "the zip archive's member 'a/one' lies outside the file",
    ),
    "exabytes": (
        lambda: zip_bytes([replace(ONE, size=U32, extra=zip64_extra(2**64 - 1, 2**64 - 1))]),
        "the zip archive's member 'a/one' lies outside the file",
    ),
    "zip64 sizes absent": (
        lambda: zip_bytes([replace(ONE, offset=U32)]),
        "the zip archive's member 'a/one' lacks its zip64 sizes",
    ),
    "zip64 sizes incomplete": (
        lambda: zip_bytes([replace(ONE, size=U32, offset=U32, extra=zip64_extra(5, 5))]),
        "the zip archive's member 'a/one' lacks its zip64 sizes",
    ),
    "zip64 sizes cut": (
        lambda: zip_bytes([replace(ONE, offset=U32, extra=b"\x01\x00\x08\x00abc")]),
        "the zip archive's member 'a/one' lacks its zip64 sizes",
    ),
    "overlap": (
        lambda: zip_bytes([replace(ONE, size=6), TWO]),
        "the zip archive's member 'a/one' overlaps what comes after it",
    ),
    "last overlaps the directory": (
        lambda: zip_bytes([ONE, replace(TWO, size=7)]),
        "the zip archive's member 'a/two' overlaps what comes after it",
    ),
    "own header damaged": (
        lambda: zip_bytes([replace(ONE, local_signature=b"PK\x03\x05"), TWO]),
        "the zip archive's member 'a/one' has a damaged header",
    ),
    "own header deflated": (
        lambda: zip_bytes([replace(ONE, local_method=8), TWO]),
        "the zip archive's member 'a/one' has a damaged header",
    ),
    "own header encrypted": (
        lambda: zip_bytes([replace(ONE, local_flags=1), TWO]),
        "the zip archive's member 'a/one' has a damaged header",
    ),
    "another name": (
        lambda: zip_bytes([replace(ONE, local_name=b"a/oen"), TWO]),
        "the zip archive's member 'a/one' has another name in its own header",
    ),
    "longer name": (
        lambda: zip_bytes([replace(ONE, local_name=b"a/one" + b"e" * 65_000), TWO]),
        "the zip archive's member 'a/one' has another name in its own header",
    ),
    "header inside another member": (
        lambda: zip_bytes([ONE, TWO, Member(name="a/three", offset=41)]),
        "the zip archive's member 'a/two' overlaps what comes after it",
    ),
    "shorter than its room": (
        lambda: zip_bytes([replace(ONE, size=4), TWO]),
        "the zip archive's member 'a/one' does not end where the next one begins",
    ),
    "shifted by its extra field": (
        lambda: zip_bytes([ONE, replace(TWO, local_extra=b"FB\x02\x00ZZ", descriptor=b"zzzz")]),
        "the zip archive's member 'a/two' does not end where the next one begins",
    ),
    "descriptor without a signature": (
        lambda: zip_bytes([replace(ONE, flags=8, descriptor=bytes(16)), TWO]),
        "the zip archive's member 'a/one' does not end where the next one begins",
    ),
    "descriptor of another length": (
        lambda: zip_bytes([replace(ONE, flags=8, descriptor=DESCRIPTOR + b"z"), TWO]),
        "the zip archive's member 'a/one' does not end where the next one begins",
    ),
    "no descriptor": (
        lambda: zip_bytes([replace(ONE, flags=8), TWO]),
        "the zip archive's member 'a/one' does not end where the next one begins",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "what"), BAD.values(), ids=BAD)
def test_a_bad_archive_is_refused(tmp_path: Path, make: Callable[[], bytes], what: str) -> None:
    refused(tmp_path, make(), what)


def test_a_compressed_program_is_told_apart(tmp_path: Path) -> None:
    refused(
        tmp_path,
        zip_bytes([Member(name="a/code/model.py", method=8)]),
        "the zip archive's member 'a/code/model.py' is compressed or encrypted, which torch.save "
        "never does; a TorchScript archive is a program: save its state_dict() with torch.save",
    )


def test_a_directory_of_many_megabytes_is_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ckptavg.checkpoint.zip_directory.MAX_ZIP_DIRECTORY_BYTES", 50)
    what = "has a zip directory that is not where its end record says"
    refused(tmp_path, zip_bytes([ONE]), what)


def test_a_bomb_of_overlapping_members_is_refused(tmp_path: Path) -> None:
    kernel = bytes(10_000)
    members = [
        Member(name=f"a/{index}", content=b"", size=5_000, offset=33 * index) for index in range(50)
    ]
    raw = zip_bytes([*members, Member(name="a/kernel", content=kernel)])
    what = "the zip archive's member 'a/0' overlaps what comes after it"
    refused(tmp_path, raw, what)


def test_the_library_zipfile_agrees_about_what_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    for raw in (zip_bytes([ONE, TWO]), zip_bytes([ONE, TWO], comment=b"x", zip64={})):
        path.write_bytes(raw)
        with zipfile.ZipFile(path) as archive:
            found: dict[str, Any] = {name: archive.read(name) for name in archive.namelist()}
        assert found == contents(tmp_path, raw)


def test_a_file_that_shrinks_while_its_directory_is_read_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    path.write_bytes(zip_bytes([ONE, TWO]))
    file = PositionalFile(path, "w.pt")
    os.truncate(path, 10)
    with pytest.raises(CheckpointError, match="ends at byte .*it changed while being read"):
        ZipDirectory(file)
    file.close()
