"""The errors users see, and the one function that makes foreign text safe to print.

The tree::

    CkptavgError                      anything ckptavg refuses or fails at; one line, names escaped
    ├── UsageError                    the request itself makes no sense (exit code 2)
    ├── SourceError                   what was typed does not lead to checkpoints
    ├── CheckpointError               one checkpoint is broken, unsupported, or changed while read
    │   └── IncompleteCheckpointError it is cut short, or lacks a file: perhaps still being written
    ├── IncompatibleCheckpointsError  each checkpoint is fine, but they cannot be averaged together
    ├── HubError                      the Hub cannot be reached, or answers nonsense
    ├── MemoryBudgetError             the work does not fit the memory it may use
    ├── ProcessError                  another process of the same run failed
    │   └── ProcessEndedError         it ended, or was interrupted; the run can be continued
    ├── StorageError                  the system refused to read or write a file
    ├── OutputError                   the output cannot be written; nothing was published
    ├── AfterPublishError             the output was published, a later step failed (exit code 3)
    ├── VerificationError             an output is not what its provenance says
    ├── ReportError                   what a report is to tell is not there, or cannot be read
    ├── ModelError                    the user's model or data could not be built or loaded
    └── BatchNormError                BatchNorm statistics could not be computed; model unchanged

Every message is one line: what, where, expected, found, remedy.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

_NO_TOKEN = "hf_***"
_MIN_TOKEN_CHARACTERS = 6
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9_]{20,}|(?<=Bearer )\S+")
_MAX_MESSAGE_CHARACTERS = 2000  # a hostile name can be megabytes long
_MAX_ENDING_CHARACTERS = 200  # the end of a message says what to do
_BIDI_AND_SEPARATORS = frozenset(
    "\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
)


def without_token(text: str) -> str:
    """Blank out the user's token for the Hub, and whatever else looks like one."""
    own = os.environ.get("HF_TOKEN", "").strip()
    if len(own) >= _MIN_TOKEN_CHARACTERS:
        text = text.replace(own, _NO_TOKEN)
    return _TOKEN.sub(_NO_TOKEN, text)


def printable(text: str) -> str:
    r"""Escape every character that could move the cursor, hide text or break a line.

    Names of tensors and files come from files that anyone may have written. Printable characters
    stay as they are; the others become ``\xNN``, ``\uNNNN`` or ``\UNNNNNNNN``.
    """
    if text.isprintable() and not _BIDI_AND_SEPARATORS.intersection(text):
        return text
    return "".join(
        character
        if character.isprintable() and character not in _BIDI_AND_SEPARATORS
        else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


class CkptavgError(Exception):
    """Base of all errors that ckptavg raises on purpose; ``str()`` of it is one printable line."""

    def __init__(self, message: str) -> None:
        if len(message) > _MAX_MESSAGE_CHARACTERS:
            message = f"{message[:_MAX_MESSAGE_CHARACTERS]}…{message[-_MAX_ENDING_CHARACTERS:]}"
        message = printable(message)
        if len(message) > _MAX_MESSAGE_CHARACTERS:
            kept = _MAX_MESSAGE_CHARACTERS - _MAX_ENDING_CHARACTERS - 1
            message = f"{message[:kept]}…{message[-_MAX_ENDING_CHARACTERS:]}"
        super().__init__(message)


class UsageError(CkptavgError):
    """The request itself makes no sense, whatever the files hold."""


class SourceError(CkptavgError):
    """What was typed does not lead to checkpoints."""


class CheckpointError(CkptavgError):
    """One checkpoint is broken, hostile, unsupported, or changed while it was read."""


class IncompleteCheckpointError(CheckpointError):
    """A checkpoint is cut short or lacks a file: it is still being written, or was interrupted."""


class IncompatibleCheckpointsError(CkptavgError):
    """Each checkpoint can be read, but they cannot be averaged together."""


class HubError(CkptavgError):
    """The Hugging Face Hub cannot be reached, takes too long, or answers something else."""


class MemoryBudgetError(CkptavgError):
    """The work does not fit into the memory that it may use."""


class ProcessError(CkptavgError):
    """Another of the processes that share a run failed; nothing was published."""


class ProcessEndedError(ProcessError):
    """Another process ended or was interrupted; the same command goes on where the run stopped."""


class StorageError(CkptavgError):
    """The system refused to read, list or write something; what was there before is untouched."""


class OutputError(CkptavgError):
    """The output cannot be written; what was there before is untouched."""


class AfterPublishError(CkptavgError):
    """The output is published and whole, but something that came after it failed."""


class VerificationError(CkptavgError):
    """An output is not what its provenance says, or nothing says what it should be."""


class ReportError(CkptavgError):
    """What a report is to tell is not there, cannot be read, or is of another version."""


class ModelError(CkptavgError):
    """The user's model or data could not be found, built, or loaded with the weights."""


class BatchNormError(CkptavgError):
    """BatchNorm statistics could not be computed; the model is as it was before."""


@contextmanager
def told_storage_errors() -> Iterator[None]:
    """Turn what the system refuses, wherever it was asked, into an error; also a decorator.

    Raises:
        StorageError: For an OSError that nothing nearer could explain.
        UsageError: For a path that holds a NUL byte.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:  # not the system's: a caller's own, from a callback
            raise
        raise storage_error(error) from error
    except ValueError as error:
        if not is_nul(error):
            raise
        raise UsageError("a path holds a NUL byte") from error


def is_nul(error: ValueError) -> bool:
    """Tell whether a path was refused since it holds a NUL byte."""
    return str(error) in ("embedded null byte", "embedded null character in path")


def storage_error(error: OSError) -> StorageError:
    """Return the error for what the system refused."""
    where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
    reason = error.strerror or str(error) or type(error).__name__
    return StorageError(f"{where}the system refuses: {reason.lower()}")
