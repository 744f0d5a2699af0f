"""Changes of zip files: what their members and their directory say."""

import struct
from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Any

import hostile

from faults.mutated_bytes import EDGES, mutated, n_changes, nudged


def mutated_zip(rng: Random, members: list[hostile.Member]) -> bytes:
    options: dict[str, Any] = {}
    is_patched = rng.random() < 0.4
    for _ in range(0 if is_patched else n_changes(rng)):
        at = rng.randrange(len(members))
        action = rng.randrange(10)
        if action < 5:
            members[at] = _changed_member(rng, members[at])
        elif action < 8:
            options |= _archive_option(rng, members)
        elif action == 8:
            rng.shuffle(members)
        elif len(members) > 1:
            del members[at]
    raw = hostile.zip_bytes(members, **options)
    return patched(rng, raw) if is_patched else raw


def _changed_member(rng: Random, member: hostile.Member) -> hostile.Member:
    size = len(member.content)
    fields: dict[str, Any] = {
        "name": _other_name(rng, member.raw_name),
        "content": mutated(rng, member.content, [b"little"]),
        "flags": 1 << rng.randrange(16),
        "local_flags": rng.choice((0, 1, 8, 0x800)),
        "method": rng.choice((0, 8, 12, 99)),
        "local_method": rng.choice((0, 8)),
        "crc": rng.choice((0, 1, 2**32 - 1)),
        "stored": nudged(rng, size) % 2**32,
        "size": nudged(rng, size) % 2**32,
        "offset": nudged(rng, 0) % 2**32,
        "extra": _extra(rng, size),
        "local_extra": _extra(rng, size),
        "comment": rng.randbytes(rng.randrange(9)),
        "local_name": _other_name(rng, member.raw_name),
        "descriptor": b"PK\x07\x08" + bytes(rng.choice((8, 12, 20))),
    }
    chosen = rng.choice(list(fields))
    changed = replace(member, **{chosen: fields[chosen]})
    if chosen == "descriptor":
        changed = replace(changed, flags=8, local_flags=8)
    if chosen == "name" and rng.random() < 0.8:
        changed = replace(changed, local_name=None)
    if chosen == "extra" and rng.random() < 0.7:
        changed = replace(changed, size=2**32 - 1, stored=2**32 - 1)
    return changed


def _other_name(rng: Random, name: bytes) -> bytes:
    return rng.choice(
        (
            b"", b"/", name + b"/", b"x" + name, name[:-1], name.upper(), name.replace(b"/", b"\\"),
            b"archive/code/x.py", b"archive/constants.pkl", b"archive/data.pkl", b"other/data.pkl",
            b"archive/data/0", b"archive/data/1", b"archive/byteorder", b"archive/\xff\xfe",
            b"archive/" + name, b"../" + name, name + b"\0", "archive/\u202e".encode(),
            b"archive/.data",
        )
    )  # fmt: skip


def _extra(rng: Random, size: int) -> bytes:
    return rng.choice(
        (
            rng.randbytes(rng.randrange(9)),
            hostile.zip64_extra(size, size),
            hostile.zip64_extra(nudged(rng, size) % 2**64, size),
            hostile.zip64_extra(size),
            hostile.zip64_extra(),
            struct.pack("<HH", 1, 65535),
            struct.pack("<HH4s", 0x4246, 4, b"ZZZZ"),
        )
    )


def _archive_option(rng: Random, members: Sequence[hostile.Member]) -> dict[str, Any]:
    count = nudged(rng, len(members))
    options: dict[str, Any] = {
        "before": rng.randbytes(rng.randrange(9)),
        "gap": rng.randbytes(rng.randrange(9)),
        "after": rng.randbytes(rng.randrange(1, 9)),
        "comment": rng.choice((b"PK\x05\x06" + bytes(18), rng.randbytes(5))),
        "count": count % 2**16,
        "directory_bytes": rng.choice(EDGES) % 2**32,
        "start": rng.choice(EDGES) % 2**32,
        "disk": rng.choice((1, 65535)),
        "zip64": rng.choice(
            (
                {},
                {
                    rng.choice(("count", "directory_bytes", "start", "at")): rng.choice(EDGES)
                    % 2**64
                },
                {"count": count % 2**64},
                {"disks": rng.choice((0, 2))},
                {"signature": b"PK\x06\x05"},
            )
        ),
    }
    chosen = rng.choice(list(options))
    return {chosen: options[chosen]}


# signature -> offset and width of each field of the records of a zip file
_RECORDS = {
    b"PK\x03\x04": (
        (0, 4), (4, 2), (6, 2), (8, 2), (10, 2), (14, 4), (18, 4), (22, 4), (26, 2), (28, 2),
    ),
    b"PK\x01\x02": (
        (0, 4), (4, 2), (6, 2), (8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (30, 2),
        (32, 2), (34, 2), (36, 2), (38, 4), (42, 4),
    ),
    b"PK\x05\x06": ((0, 4), (4, 2), (6, 2), (8, 2), (10, 2), (12, 4), (16, 4), (20, 2)),
}  # fmt: skip


def patched(rng: Random, raw: bytes) -> bytes:
    """Change one or a few fields of a zip file's records where they lie."""
    content = bytearray(raw)
    for _ in range(n_changes(rng)):
        signature = rng.choice(tuple(_RECORDS))
        places = [at for at in range(len(raw) - 4) if content.startswith(signature, at)]
        if not places:
            continue
        offset, width = rng.choice(_RECORDS[signature])
        at = rng.choice(places) + offset
        number = nudged(rng, int.from_bytes(content[at : at + width], "little"))
        content[at : at + width] = (number % 256**width).to_bytes(width, "little")
    return bytes(content)
