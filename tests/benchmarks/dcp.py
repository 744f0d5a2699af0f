"""torch.distributed.checkpoint directories as four processes write them, without the processes."""

import io
import pickle
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path

N_PROCESSES = 4


def write_dcp(
    path: Path,
    specs: Mapping[str, tuple[tuple[int, ...], str]],
    pieces: Callable[[str, tuple[int, ...], str], Iterator[memoryview]],
    *,
    columns: bool,
) -> None:
    """Write float32 matrices, the rows or columns of each shared out to four processes."""
    import torch
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    path.mkdir(exist_ok=True)
    described: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    stored = {}
    names = [f"__{process}_0.distcp" for process in range(N_PROCESSES)]
    files = [(path / name).open("wb") for name in names]
    for name, (shape, code) in specs.items():
        data = bytearray().join(pieces(name, shape, code))
        whole = torch.frombuffer(data, dtype=torch.float32).reshape(shape)
        axis = 1 if columns else 0
        edges = [shape[axis] * process // N_PROCESSES for process in range(N_PROCESSES + 1)]
        chunks = []
        for process, (first, end) in enumerate(pairwise(edges)):
            part = whole.narrow(axis, first, end - first).clone()
            offsets = torch.Size((0, first) if columns else (first, 0))
            chunks.append(ChunkStorageMetadata(offsets, part.shape))
            archive = io.BytesIO()
            torch.save(part, archive)
            index = MetadataIndex(f"model.{name}", offsets, process)
            begin = files[process].tell()
            stored[index] = _StorageInfo(names[process], begin, archive.tell())
            files[process].write(archive.getbuffer())
        properties = TensorProperties(dtype=torch.float32)
        described[f"model.{name}"] = TensorStorageMetadata(properties, whole.size(), chunks)
    for file in files:
        file.close()
    paths = {f"model.{name}": ("model", name) for name in specs}
    metadata = Metadata(described, planner_data=paths, storage_data=stored)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
