"""The only door to huggingface_hub.

::

    references   what was typed                    (no network)
    catalog      which revisions and files there are
    remote_file  one file, read by ranges  ──►  read_ahead  several connections, bounded memory
    transport    every request: attempts, deadline, errors that say what to do
    connection   all of it, for one run
    push, card   a model directory, published with its card

huggingface_hub takes a third of a second to import: it is, once something is asked of the Hub.
"""

from typing import TYPE_CHECKING, Any

from ckptavg.hub.references import (
    SCHEME,
    HubReference,
    natural_order,
    parse_reference,
    pinned_reference,
    reference_text,
)
from ckptavg.hub.shards import split_into_shards

if TYPE_CHECKING:
    from ckptavg.hub.catalog import Entry
    from ckptavg.hub.connection import HubConnection

__all__ = [
    "SCHEME",
    "Entry",
    "HubConnection",
    "HubReference",
    "natural_order",
    "parse_reference",
    "pinned_reference",
    "reference_text",
    "split_into_shards",
]


def __getattr__(name: str) -> Any:
    if name == "HubConnection":
        from ckptavg.hub.connection import HubConnection

        return HubConnection
    if name == "Entry":
        from ckptavg.hub.catalog import Entry

        return Entry
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
