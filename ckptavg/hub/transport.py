"""Requests to the Hub: each is tried again where that can help, and ends at its deadline.

They go through huggingface_hub's own session, so proxies, certificates and the user's token are
those of every other Hub tool. A message never holds an address: some are signed.
"""

import errno
import json
import random
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from threading import Event, Lock
from time import monotonic
from typing import Any, TypeVar
from urllib.parse import urlsplit

from huggingface_hub import constants, get_session
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # it exports them by name alone
    build_hf_headers,
    hf_raise_for_status,
    httpx,
    parse_ratelimit_headers,
)

from ckptavg._version import __version__
from ckptavg.errors import CkptavgError, HubError, SourceError, without_token
from ckptavg.hub.threads import in_time

DEADLINE_SECONDS = 600.0  # of one request, with all its attempts; a quota lasts 300
TEMPORARY_STATUS = frozenset({408, 429, 500, 502, 503, 504})
TRANSPORT_ERRORS = (httpx.HTTPError, OSError)
_MAX_ATTEMPTS = 6
_MAX_CONNECT_ATTEMPTS = 3
_MANY_ATTEMPTS = 1000  # the deadline comes first
_FIRST_WAIT_SECONDS = 0.5
_MAX_WAIT_SECONDS = 20.0
_LOCAL_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
_MAX_JSON_BYTES = 100_000_000

T = TypeVar("T")


class _Traffic:
    """Counts the bytes of all bodies that this process fetched."""

    def __init__(self) -> None:
        self.nbytes = 0
        self._lock = Lock()

    def add(self, nbytes: int) -> None:
        with self._lock:
            self.nbytes += nbytes


traffic = _Traffic()


class Attempts:
    """One request: how often it is tried, and when it has to end.

    Args:
        what: What messages call it.
        cancelled: Set when nobody waits for the result any more.
        is_under_way: Whether work would be lost: a network that goes away is waited for.
    """

    def __init__(
        self, what: str, cancelled: Event | None = None, *, is_under_way: bool = False
    ) -> None:
        self._what = what
        self._cancelled = cancelled or Event()
        self._ends = monotonic() + DEADLINE_SECONDS
        self._n_failures = 0
        self._last_reason = ""
        self.max_connects = _MANY_ATTEMPTS if is_under_way else _MAX_CONNECT_ATTEMPTS

    def check(self) -> None:
        """Raise HubError once the time is over, or nobody waits any more."""
        if self._cancelled.is_set():
            raise HubError(f"{self._what}: cancelled")
        if monotonic() >= self._ends:
            told = f" ({self._last_reason})" if self._last_reason else ""
            raise HubError(
                f"{self._what}: not done within {DEADLINE_SECONDS:.0f} s{told}; try again"
            )

    def progressed(self) -> None:
        """Note that something arrived: the attempts begin anew, the time does not."""
        self._n_failures = 0

    def failed(
        self, reason: str, wait_seconds: float | None = None, most: int = _MAX_ATTEMPTS
    ) -> None:
        """Wait before the next attempt, or raise HubError if there is none.

        Args:
            reason: What went wrong.
            wait_seconds: How long the Hub asks to wait.
            most: How many attempts there are.
        """
        self._n_failures += 1
        self._last_reason = reason
        if self._n_failures >= most:
            raise HubError(f"{self._what}: {reason}, {most} times; try again later")
        if wait_seconds is None:
            longest = min(_MAX_WAIT_SECONDS, _FIRST_WAIT_SECONDS * 2**self._n_failures)
            wait_seconds = min(longest * random.uniform(0.5, 1), max(self._ends - monotonic(), 0))
        elif monotonic() + wait_seconds > self._ends:
            raise HubError(
                f"{self._what}: {reason}, and the Hub asks to wait {wait_seconds:.0f} s; try again "
                "then (a quota is larger for those who log in: hf auth login)"
            )
        self._cancelled.wait(wait_seconds)
        self.check()


def headers() -> dict[str, str]:
    """Return the headers of a request to the Hub, the user's token among them."""
    built: dict[str, str] = build_hf_headers(library_name="ckptavg", library_version=__version__)
    return built


def is_offline() -> bool:
    """Tell whether the user asked for no network (HF_HUB_OFFLINE)."""
    return bool(constants.HF_HUB_OFFLINE)


def endpoint() -> str:
    """Return the address of the Hub (HF_ENDPOINT)."""
    return str(constants.ENDPOINT).rstrip("/")


def request_timeout() -> Any:
    """Return the longest silences of a connection (HF_HUB_DOWNLOAD_TIMEOUT)."""
    return httpx.Timeout(float(constants.HF_HUB_DOWNLOAD_TIMEOUT))


def address_timeout() -> float:
    """Return the longest silence when a file's address is asked for (HF_HUB_ETAG_TIMEOUT)."""
    return float(constants.HF_HUB_ETAG_TIMEOUT)


def get_json(path: str, what: str) -> Any:
    """Return what the Hub's API answers; lists that come in pages are joined.

    Raises:
        SourceError: If it is not there, or may not be seen.
        HubError: If the Hub cannot be reached, or its answer makes no sense.
    """
    pages: list[Any] = []
    address: str | None = endpoint() + path
    while address is not None:
        content, answer_headers = download(address, what, max_nbytes=_MAX_JSON_BYTES)
        try:
            value = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise HubError(f"{what}: the Hub's answer is not JSON") from error
        if not isinstance(value, list):
            return value
        pages.extend(value)
        address = _next_page(answer_headers.get("link", ""))
    return pages


def download(address: str, what: str, *, max_nbytes: int) -> tuple[bytes, Mapping[str, str]]:
    """Return a whole small body, with its headers; raises as ``get_json`` does."""
    attempts = Attempts(what)
    while True:
        with (
            answering(attempts, what),
            get_session().stream(
                "GET", address, headers=headers(), timeout=request_timeout()
            ) as response,
        ):
            refuse_failure(response, what)
            content = bytearray()
            for part in response.iter_bytes():
                attempts.check()
                content += part
                traffic.add(len(part))
                if len(content) > max_nbytes:
                    raise HubError(f"{what}: is larger than {max_nbytes} bytes")
            return bytes(content), response.headers


@contextmanager
def answering(attempts: Attempts, what: str) -> Iterator[None]:
    """Turn what a request raises into a wait for the next attempt, or into a CkptavgError."""
    attempts.check()
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise HubError(f"{what}: HF_HUB_OFFLINE is set, and it is not in the cache") from error
    except HfHubHTTPError as error:
        error.args = (without_token(str(error)),)  # a traceback shows what the server said, too
        if error.response.status_code not in TEMPORARY_STATUS:
            raise refusal(error, what) from error
        attempts.failed(
            f"the Hub answers {error.response.status_code}", _asked_to_wait(error.response.headers)
        )
    except httpx.ConnectError:
        # no network at all does not come back within seconds
        attempts.failed("the Hub cannot be reached", most=attempts.max_connects)
    except TRANSPORT_ERRORS as error:
        if isinstance(error, OSError) and error.errno in _LOCAL_TROUBLE:
            raise HubError(f"{what}: cannot be kept on this machine: {error.strerror}") from error
        attempts.failed(_reason(error))


def tried(call: Callable[[], T], what: str, *, has_deadline: bool = True) -> T:
    """Return what a call of huggingface_hub's own returns, tried again where that can help.

    Args:
        call: The call; not all of them have timeouts, so it runs in a thread that can be left.
        what: What messages call it.
        has_deadline: Whether it has to end in time, as all do but uploads.
    """
    attempts = Attempts(what)
    while True:
        with answering(attempts, what):
            return in_time(call, attempts.check) if has_deadline else call()


def refuse_failure(response: Any, what: str) -> None:
    """Raise HfHubHTTPError if a streamed response tells of a failure."""
    if response.status_code >= 400:
        response.read()
        hf_raise_for_status(response)


def refusal(error: HfHubHTTPError, what: str) -> CkptavgError:
    """Say what the Hub refused, and what to do about it."""
    if isinstance(error, GatedRepoError):  # one of those that follow, too
        return SourceError(
            f"{what}: is gated: ask for access on its page on the Hub, then log in (hf auth login, "
            "or HF_TOKEN)"
        )
    if isinstance(error, RepositoryNotFoundError):
        return SourceError(
            f"{what}: no such repository on the Hub, or it is private: check the name, and log in "
            "(hf auth login, or HF_TOKEN) to one that may see it"
        )
    if isinstance(error, RevisionNotFoundError):
        return SourceError(f"{what}: no such revision on the Hub")
    if isinstance(error, RemoteEntryNotFoundError):
        return SourceError(f"{what}: no such file or folder on the Hub")
    status = error.response.status_code
    if status == 401:
        return SourceError(
            f"{what}: the Hub does not know the token; log in again (hf auth login, or HF_TOKEN)"
        )
    said = without_token(error.server_message or "").strip()
    told = f": {said}" if said else ""
    if status == 403:
        return SourceError(
            f"{what}: the Hub denies access{told}; does the token have the right to do this?"
        )
    return HubError(f"{what}: the Hub answers {status}{told}")


def _asked_to_wait(answer: Mapping[str, str]) -> float | None:
    """Return the seconds that the Hub asks to wait; None if it does not say."""
    quota = parse_ratelimit_headers(answer)
    if quota is not None and quota.remaining == 0:
        return float(quota.reset_in_seconds + 1)
    told = answer.get("retry-after", "")
    return float(told) if told.isdigit() else None


def _next_page(link: str) -> str | None:
    match = re.search(r'<([^>]+)>\s*;\s*rel="next"', link)
    if not match:
        return None
    # the token goes along, so to nobody else; a mirror may pass on the address of its origin
    parts = urlsplit(match[1])
    return endpoint() + parts.path + (f"?{parts.query}" if parts.query else "")


def _reason(error: Exception) -> str:
    """Name a failure of the connection; its own text may hold an address."""
    if isinstance(error, httpx.TimeoutException):
        return "the Hub does not answer"
    if isinstance(error, (httpx.NetworkError, httpx.RemoteProtocolError)):
        return "the connection broke"
    return f"the request failed ({type(error).__name__})"
