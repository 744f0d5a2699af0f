"""Checkpoints that are open and in order, whatever will be done with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from ckptavg.checkpoint import Checkpoint, normalise_names, under_last_names
from ckptavg.errors import CkptavgError
from ckptavg.gathering import close_all, open_source, open_sources, order_by_position
from ckptavg.selection import Selection
from ckptavg.sources import HubAccess, Source


@dataclass(frozen=True, kw_only=True)
class Opened:
    """Checkpoints that are open, in the order of training.

    Attributes:
        checkpoints: Oldest first, under names without prefixes; then the further ones.
        order: Where each of the former stood among the sources.
        opened: What is closed at the end; may be added to.
        notes: What the user should know, one sentence each; may be added to.
        hub: Access to the Hub.
    """

    checkpoints: Sequence[Checkpoint]
    order: Sequence[int]
    opened: list[Checkpoint]
    notes: list[str]
    hub: HubAccess

    @property
    def is_reordered(self) -> bool:
        """Whether the order is another one than that of the sources."""
        return list(self.order) != sorted(self.order)


@contextmanager
def opened_in_order(
    sources: Source | Sequence[Source],
    *,
    further: Sequence[Source] = (),
    selection: Selection | None = None,
    state_key: str | None = None,
    strip_prefixes: Sequence[str] = (),
    keep_prefix: bool = False,
    n_threads: int | None = None,
    cache: bool = False,
) -> Iterator[Opened]:
    """Open the sources, put them in the order of training, and close them at the end.

    Args as in ``average_checkpoints``; ``further`` are single checkpoints that no selection
    concerns, in their order.
    """
    hub = HubAccess(cache=cache, connections=n_threads)
    opened: list[Checkpoint] = []
    notes: list[str] = []
    if sources or not further:
        with telling_what_was_fetched(hub):
            opened, notes = open_sources(sources, state_key=state_key, hub=hub, selection=selection)
    try:
        order = order_by_position(opened)
        if order != sorted(order):
            notes.append("checkpoints are in the order of training, not as typed")
        checkpoints: list[Checkpoint] = []
        if opened:
            in_order = [opened[index] for index in order]
            checkpoints, naming_notes = normalise_names(in_order, strip_prefixes)
            notes += naming_notes
        for source in further:
            with telling_what_was_fetched(hub):
                opened.append(open_source(source, state_key=state_key, hub=hub))
            there = [one for one in strip_prefixes if _begins(opened[-1], one)]
            renamed, naming_notes = normalise_names(opened[-1:], there)
            checkpoints += renamed
            notes += naming_notes
        if keep_prefix:
            checkpoints, kept_notes = under_last_names(checkpoints)
            notes += kept_notes
        yield Opened(checkpoints=checkpoints, order=order, opened=opened, notes=notes, hub=hub)
    finally:
        hub.cancel()
        close_all(opened)


def _begins(checkpoint: Checkpoint, prefix: str) -> bool:
    return any(name.startswith(prefix) for name in checkpoint.tensors)


@contextmanager
def telling_what_was_fetched(hub: HubAccess) -> Iterator[None]:
    """Add to an error that no more than headers was fetched, where that is worth knowing."""
    try:
        yield
    except CkptavgError as error:
        for note in fetched_notes(hub):
            error.add_note(note)
        raise


def fetched_notes(hub: HubAccess) -> list[str]:
    """Say how much was fetched from the Hub, where anything was."""
    return (
        [f"{hub.fetched_nbytes} bytes of headers and lists were fetched from the Hub"]
        if hub.fetched_nbytes
        else []
    )
