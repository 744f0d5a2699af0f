"""Tensor names that differ between checkpoints only by a wrapper's prefix."""

from collections.abc import Callable, Collection, Mapping, Sequence

from ckptavg.checkpoint.protocol import Checkpoint
from ckptavg.checkpoint.state_dict import some
from ckptavg.checkpoint.wrapped import WrappedCheckpoint
from ckptavg.errors import CheckpointError, IncompatibleCheckpointsError
from ckptavg.tensors import Piece

# what DistributedDataParallel and torch.compile put before every name
WRAPPER_PREFIXES = ("module.", "_orig_mod.")
# torch.optim.swa_utils.AveragedModel counts in it, beside the names that begin with ``module.``
_AVERAGED_MODEL_PREFIX, _AVERAGED_MODEL_COUNTER = "module.", "n_averaged"


def normalise_names(
    checkpoints: Sequence[Checkpoint], strip_prefixes: Sequence[str] = ()
) -> tuple[list[Checkpoint], list[str]]:
    """Strip wrapper prefixes from tensor names.

    ``module.`` and ``_orig_mod.`` are stripped when every name of every checkpoint has them; the
    prefixes asked for are stripped from the names that have them, once each, before that. The
    counter of an ``AveragedModel`` is left out: only what it wraps is a model.

    Args:
        checkpoints: Opened checkpoints.
        strip_prefixes: Further prefixes, each of which must occur in some checkpoint.

    Returns:
        The checkpoints under their new names, and one note for each prefix that was stripped.

    Raises:
        IncompatibleCheckpointsError: If a prefix asked for occurs nowhere.
        CheckpointError: If two names become one.
    """
    renamed: list[Checkpoint] = list(checkpoints)
    notes = []
    for prefix in strip_prefixes:
        if not any(name.startswith(prefix) for one in renamed for name in one.tensors):
            raise IncompatibleCheckpointsError(
                f"no tensor name in any checkpoint begins with '{prefix}' (--strip-prefix)"
            )
        renamed = [without_prefix(checkpoint, prefix) for checkpoint in renamed]
        notes.append(f"stripped the prefix '{prefix}' from tensor names, as asked")
    while renamed and (wrapper := _common_wrapper(renamed)):
        averaged = [one.label for one in renamed if _counters(one, wrapper)]
        renamed = [
            without_prefix(checkpoint, wrapper, _counters(checkpoint, wrapper))
            for checkpoint in renamed
        ]
        if averaged:
            notes.append(
                f"{some(averaged)}: averages that training kept already (AveragedModel); "
                f"'{_AVERAGED_MODEL_COUNTER}' is left out"
            )
        notes.append(f"stripped the prefix '{wrapper}', which all tensor names had")
    return renamed, notes


def _common_wrapper(checkpoints: Sequence[Checkpoint]) -> str | None:
    for prefix in WRAPPER_PREFIXES:
        names = [one.tensors.keys() - _counters(one, prefix) for one in checkpoints]
        if all(own and all(name.startswith(prefix) for name in own) for own in names):
            return prefix
    return None


def _counters(checkpoint: Checkpoint, prefix: str) -> frozenset[str]:
    """Return the names that a wrapper of this prefix adds beside those that it prefixes."""
    info = checkpoint.tensors.get(_AVERAGED_MODEL_COUNTER)
    if prefix != _AVERAGED_MODEL_PREFIX or info is None:
        return frozenset()
    is_counter = info.dtype.kind == "integer" and info.shape == ()
    return frozenset({_AVERAGED_MODEL_COUNTER}) if is_counter else frozenset()


def without_prefix(
    checkpoint: Checkpoint, prefix: str, left_out: Collection[str] = ()
) -> "RenamedCheckpoint":
    """Strip a prefix from the names that have it, and leave out some names.

    Raises:
        CheckpointError: If two names become one.
    """
    return RenamedCheckpoint(
        checkpoint,
        lambda name: name.removeprefix(prefix),
        f"without the prefix '{prefix}'",
        left_out,
    )


def under_last_names(checkpoints: Sequence[Checkpoint]) -> tuple[list[Checkpoint], list[str]]:
    """Give tensors that were renamed the names back that they have in the last checkpoint's file.

    Returns:
        The checkpoints, and a note if that changes anything.

    Raises:
        CheckpointError: If two names become one.
    """
    last = checkpoints[-1]
    if not isinstance(last, RenamedCheckpoint):
        return list(checkpoints), []
    stored, how = last.stored_names, f"under the names of {last.label}"
    renamed: list[Checkpoint] = [
        RenamedCheckpoint(one, lambda name: stored.get(name, name), how) for one in checkpoints
    ]
    return renamed, [f"the output keeps the prefixes that tensor names have in {last.label}"]


class RenamedCheckpoint(WrappedCheckpoint):
    """A checkpoint under other names; everything else is passed on.

    Attributes:
        stored_names: The new names, each with the one that it stands for in the file.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        rename: Callable[[str], str],
        how: str,
        left_out: Collection[str] = (),
    ) -> None:
        """Rename all tensors.

        Args:
            checkpoint: Which one; it may have been renamed before.
            rename: Old name -> new name.
            how: What messages say of that.
            left_out: Old names that are not there any more.

        Raises:
            CheckpointError: If two names become one.
        """
        super().__init__(checkpoint)
        self._stored_name: dict[str, str] = {}
        tensors = {name: info for name, info in checkpoint.tensors.items() if name not in left_out}
        aliases = {
            name: owner
            for name, owner in checkpoint.aliases.items()
            if name not in left_out and owner not in left_out
        }
        for stored in (*tensors, *aliases):
            if self._stored_name.setdefault(rename(stored), stored) != stored:
                raise CheckpointError(f"{checkpoint.label}: two tensor names become one {how}")
        before = checkpoint.stored_names if isinstance(checkpoint, RenamedCheckpoint) else {}
        self.stored_names: Mapping[str, str] = {
            name: before.get(stored, stored) for name, stored in self._stored_name.items()
        }
        self.tensors = {rename(stored): info for stored, info in tensors.items()}
        self.aliases = {rename(name): rename(owner) for name, owner in aliases.items()}
        self.metadata = {
            **checkpoint.metadata,
            **{name: owner for name, owner in self.aliases.items() if name not in self.tensors},
        }

    def _changes(self) -> object:
        return sorted(self._stored_name.items())

    def read_into(self, pieces: Sequence[Piece], buffer: memoryview) -> None:
        """Fill ``buffer`` with the pieces; see the protocol."""
        stored = self._stored_name
        self._checkpoint.read_into(
            [Piece(stored[name], start, stop) for name, start, stop in pieces], buffer
        )
