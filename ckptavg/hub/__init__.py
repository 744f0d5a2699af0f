"""The only door to huggingface_hub.

::

    references   what was typed                    (no network)
    catalog      which revisions and files there are
    remote_file  one file, read by ranges  ──►  read_ahead  several connections, bounded memory
    transport    every request: attempts, deadline, errors that say what to do
    threads      calls beside each other, and calls that can be left
    connection   all of it, for one run
    push, card   a model directory, published with its card

huggingface_hub takes a third of a second to import: only what asks the Hub imports it, so this
module does not.
"""

from ckptavg.hub.references import (
    CARD_NAME,
    SCHEME,
    HubReference,
    is_glob,
    label_of,
    natural_order,
    parse_reference,
    pinned_reference,
    reference_text,
)
from ckptavg.hub.shards import split_into_shards

__all__ = [
    "CARD_NAME",
    "SCHEME",
    "HubReference",
    "is_glob",
    "label_of",
    "natural_order",
    "parse_reference",
    "pinned_reference",
    "reference_text",
    "split_into_shards",
]
