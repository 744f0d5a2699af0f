"""The work of an average, cut into parts that are noted, shared and worked on one by one.

A block is what the journal and the processes count in; a chunk is what a thread works on at once:
a block, or a part of one.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from ckptavg.tensors import DType, Piece, TensorInfo

BLOCK_NBYTES = 16 * 2**20
TAKE_CHUNK_NBYTES = 2**20

Differing = set[tuple[int, str]]  # output index, name of a copied tensor that differed for it


class Action(Enum):
    """What becomes of a tensor."""

    AVERAGE = "average"  # the weighted mean, rounded once to the output dtype
    TAKE = "take"  # integers and bools: copied; where checkpoints differ, from one of them
    ALIAS = "alias"  # tied: the same bytes as another name, averaged once
    DERIVE = "derive"  # computed together with other tensors, see ckptavg.derived; in no block


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """One tensor of the output.

    Attributes:
        name: Its name.
        info: dtype and shape in the checkpoints; a derived tensor may get another shape.
        output_dtype: dtype in the output.
        action: What becomes of it.
        owner: For an alias, the name it is tied to.
        shard: Index of its output shard.
        offset: First byte in the data of that shard.
    """

    name: str
    info: TensorInfo
    output_dtype: DType
    action: Action
    owner: str | None
    shard: int
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes in the output."""
        return self.info.numel * self.output_dtype.itemsize


@dataclass(frozen=True, slots=True)
class Chunk:
    """A run of consecutive output elements, small enough to be worked on at once.

    Attributes:
        block: Number of the block of the plan that it is, or is a part of.
        pieces: The input bytes, the same in every checkpoint.
        numel: Number of elements; a complex number counts as two.
        dtype: dtype of the input elements; complex numbers are worked on as pairs.
        output_dtype: dtype of the output elements.
        action: AVERAGE or TAKE.
        destinations: (shard index, first byte in its data) of every place the result goes to.
    """

    block: int
    pieces: tuple[Piece, ...]
    numel: int
    dtype: DType
    output_dtype: DType
    action: Action
    destinations: tuple[tuple[int, int], ...]

    @property
    def nbytes(self) -> int:
        """Bytes read from each checkpoint."""
        return self.numel * self.dtype.itemsize

    def cut(self, max_nbytes: int) -> Iterator["Chunk"]:
        """Cut into chunks of at most so many input bytes from one checkpoint, in order.

        Each but the last has an even number of elements, so that pairs of 16-bit values are never
        split.
        """
        max_numel = max(max_nbytes // (2 * self.dtype.itemsize), 1) * 2
        if self.numel <= max_numel:
            yield self
            return
        runs = _cut_pieces(self.pieces, max_numel * self.dtype.itemsize)
        for first, pieces in zip(range(0, self.numel, max_numel), runs, strict=True):
            yield replace(
                self,
                pieces=pieces,
                numel=min(max_numel, self.numel - first),
                destinations=tuple(
                    (shard, offset + first * self.output_dtype.itemsize)
                    for shard, offset in self.destinations
                ),
            )


def cut_into_blocks(tensors: Sequence[TensorPlan]) -> tuple[Chunk, ...]:
    """Cut an output's tensors into blocks, in their order.

    Neighbours in the output with the same dtypes and action share blocks: thousands of small
    tensors cost no more than one large one.
    """
    copies: dict[str, list[TensorPlan]] = {}
    for tensor in tensors:
        if tensor.action is Action.ALIAS and tensor.owner is not None:
            copies.setdefault(tensor.owner, []).append(tensor)
    spans: list[list[TensorPlan]] = []
    for tensor in tensors:
        if tensor.action in (Action.ALIAS, Action.DERIVE) or not tensor.nbytes:
            continue
        if (
            spans
            and _follows(tensor, spans[-1][-1])
            and copies.keys().isdisjoint((tensor.name, spans[-1][-1].name))
        ):
            spans[-1].append(tensor)
        else:
            spans.append([tensor])
    blocks: list[Chunk] = []
    for span in spans:
        blocks.extend(_cut_span(span, copies, len(blocks)))
    return tuple(blocks)


def _follows(tensor: TensorPlan, previous: TensorPlan) -> bool:
    """Tell whether a tensor lies right behind another (no alias between) and is worked on alike."""
    return (
        tensor.shard == previous.shard
        and tensor.offset == previous.offset + previous.nbytes
        and tensor.info.dtype is previous.info.dtype
        and tensor.output_dtype is previous.output_dtype
        and tensor.action is previous.action
    )


def _cut_span(
    span: Sequence[TensorPlan], copies: Mapping[str, Sequence[TensorPlan]], first_block: int
) -> Iterator[Chunk]:
    """Cut tensors that lie side by side in the output into blocks."""
    first = span[0]
    # real and imaginary parts of complex numbers are averaged alike
    dtype, output_dtype = first.info.dtype.part, first.output_dtype.part
    scale = first.info.dtype.itemsize // dtype.itemsize
    whole = Chunk(
        block=first_block,
        pieces=tuple(
            Piece(tensor.name, 0, tensor.info.numel * scale * dtype.itemsize) for tensor in span
        ),
        numel=sum(tensor.info.numel for tensor in span) * scale,
        dtype=dtype,
        output_dtype=output_dtype,
        action=first.action,
        destinations=tuple(  # tied names may share one place
            dict.fromkeys(
                (tensor.shard, tensor.offset) for tensor in (first, *copies.get(first.name, ()))
            )
        ),
    )
    for number, block in enumerate(whole.cut(BLOCK_NBYTES), start=first_block):
        yield replace(block, block=number)


def _cut_pieces(pieces: Iterable[Piece], nbytes: int) -> Iterator[tuple[Piece, ...]]:
    """Cut pieces into runs of so many bytes; the last may have fewer."""
    run: list[Piece] = []
    room = nbytes
    for name, start, stop in pieces:
        while start < stop:
            end = min(stop, start + room)
            run.append(Piece(name, start, end))
            room -= end - start
            start = end
            if room == 0:
                yield tuple(run)
                run, room = [], nbytes
    if run:
        yield tuple(run)
