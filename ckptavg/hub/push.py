"""Publishing a model directory on the Hub: one commit, with what it replaces removed.

Weights are sent before the commit is made, so a push that broke off changed nothing, and when it is
made again the Hub takes only what it does not have. The commit names the one it was prepared for,
so one whose answer was lost is not made twice.
"""

import fnmatch
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    get_session,
    get_token,
)
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # it exports them by name alone
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    logging,
)

from ckptavg.directories import files_below
from ckptavg.errors import CkptavgError, HubError, UsageError, without_token
from ckptavg.hub.references import CARD_NAME, reference_text
from ckptavg.hub.threads import in_parallel
from ckptavg.hub.transport import (
    endpoint,
    headers,
    is_offline,
    refuse_failure,
    request_timeout,
    tried,
)
from ckptavg.tensors import PushResult

_FILES_AT_ONCE = 5
_HAS_MOVED = 412  # what the Hub answers if the branch is not where a commit expects it
_WEIGHTS = (
    "*.safetensors", "*.safetensors.index.json",
    "pytorch_model*.bin", "pytorch_model.bin.index.json", "model.pt", "adapter_model.bin",
)  # fmt: skip


def check_may_push(repo: str) -> None:
    """See that there is a network and a token that the Hub knows, before the work begins.

    Raises:
        UsageError: If there is no token, or the network is not to be used.
        SourceError: If the Hub does not know the token.
        HubError: If the Hub cannot be reached.
    """
    if is_offline():
        raise UsageError(f"{repo}: cannot be pushed to while HF_HUB_OFFLINE is set")
    if get_token() is None:
        raise UsageError(f"{repo}: log in to push (hf auth login, or HF_TOKEN)")
    tried(HfApi(endpoint=endpoint()).whoami, repo)


def push_folder(
    directory: Path,
    repo: str,
    *,
    card: str,
    revision: str | None = None,
    private: bool = False,
    create_pr: bool = False,
    message: str,
) -> PushResult:
    """Publish all files of a directory in one commit; make repository and branch if need be.

    Args:
        directory: What to publish.
        repo: ``org/name``.
        card: Content of the README.md, whatever the directory holds.
        revision: Branch; None is ``main``.
        private: Whether a repository that is made now is private.
        create_pr: Open a pull request instead of writing to the branch.
        message: First line of the commit's message.

    Raises:
        UsageError: If there is no token, or the network is not to be used.
        SourceError: If the Hub denies access.
        HubError: If the Hub cannot be reached, or refuses.
    """
    check_may_push(repo)
    api = HfApi(endpoint=endpoint())
    branch = revision or "main"
    what = reference_text(repo, branch)
    with _quiet(), _naming(what):
        tried(lambda: api.create_repo(repo, private=private or None, exist_ok=True), what)
        if revision is not None:
            tried(lambda: api.create_branch(repo, branch=branch, exist_ok=True), what)
        before = str(tried(lambda: api.model_info(repo, revision=branch, timeout=30), what).sha)
        there = tried(lambda: api.list_repo_files(repo, revision=branch), what)
        additions = _additions(directory, card)
        names = {one.path_in_repo for one in additions}
        stale = [
            name
            for name in there
            if name not in names
            and "/" not in name
            and any(fnmatch.fnmatchcase(name, one) for one in _WEIGHTS)
        ]
        removals = [CommitOperationDelete(name) for name in stale]
        # an error now is better than one after hours of sending
        tried(lambda: _check_card(card, what), what)
        _send(api, repo, additions, branch=branch, create_pr=create_pr, what=what)
        made = _commit(
            api, repo, [*additions, *removals],
            message=message, branch=branch, create_pr=create_pr, before=before, what=what,
        )  # fmt: skip
    return PushResult(
        repo=repo,
        revision=made.pull_request or branch,
        commit=made.commit,
        url=made.url or f"{endpoint()}/{repo}" + (f"/tree/{branch}" if revision else ""),
        changed=made.commit != before,
    )


class _Made(NamedTuple):
    """A commit; reference and address of the pull request that it is, if it is one."""

    commit: str
    pull_request: str | None = None
    url: str | None = None


def _additions(directory: Path, card: str) -> list[CommitOperationAdd]:
    files = [path for path in files_below(directory) if path.is_file()]
    found = {path.relative_to(directory).as_posix(): path for path in files}
    found.pop(CARD_NAME, None)
    additions = [CommitOperationAdd(name, path) for name, path in found.items()]
    return [*additions, CommitOperationAdd(CARD_NAME, card.encode("utf-8"))]


def _check_card(card: str, what: str) -> None:
    """Ask the Hub whether it will take a card; raises HfHubHTTPError with what it says if not."""
    response = get_session().post(
        f"{endpoint()}/api/validate-yaml",
        json={"content": card, "repoType": "model"},
        headers=headers(),
        timeout=request_timeout(),
    )
    refuse_failure(response, what)


def _send(
    api: HfApi,
    repo: str,
    additions: list[CommitOperationAdd],
    *,
    branch: str,
    create_pr: bool,
    what: str,
) -> None:
    """Send what the Hub keeps outside git, and does not have yet; an interrupt waits for nothing.

    huggingface_hub sends several files from a pool of threads, which the interpreter waits for:
    each call gets one, unless Xet sends them, which needs no pool.
    """
    by_xet = not constants.HF_HUB_DISABLE_XET and find_spec("hf_xet") is not None
    parts = [additions] if by_xet else [[one] for one in additions]

    def send(part: list[CommitOperationAdd]) -> None:
        try:
            api.preupload_lfs_files(
                repo, part, revision=branch, create_pr=create_pr, free_memory=False
            )
        except HfHubHTTPError:
            raise
        except OSError as error:
            if not by_xet:
                raise
            # hf_xet has tried again itself
            raise HubError(_upload_failed(what, error)) from error

    in_parallel(
        lambda part: tried(lambda: send(part), what, has_deadline=False), parts, _FILES_AT_ONCE
    )


def _commit(
    api: HfApi,
    repo: str,
    operations: list[CommitOperationAdd | CommitOperationDelete],
    *,
    message: str,
    branch: str,
    create_pr: bool,
    before: str,
    what: str,
) -> _Made:
    """Make the commit that follows ``before``, once even if its answer is lost."""
    n_attempts = 0

    def attempt() -> _Made:
        nonlocal n_attempts
        n_attempts += 1
        try:
            made: Any = api.create_commit(
                repo,
                operations,
                commit_message=message,
                revision=branch,
                create_pr=create_pr,
                parent_commit=before,
            )
        except HfHubHTTPError as error:
            if error.response.status_code != _HAS_MOVED or n_attempts == 1:
                raise
            commits = api.list_repo_commits(repo, revision=branch)
            if [one.commit_id for one in commits[1:2]] != [before]:
                raise
            if not message.startswith(commits[0].title):  # that is its first line
                raise
            return _Made(commits[0].commit_id)
        return _Made(str(made.oid), made.pr_revision, made.pr_url)

    return tried(attempt, what)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep huggingface_hub's own bars and remarks away: a library is silent.

    After an interrupt they stay away: threads that nobody waits for may still have some.
    """
    were_disabled, verbosity = are_progress_bars_disabled(), logging.get_verbosity()
    disable_progress_bars()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # it has no types
    is_interrupted = False
    try:
        yield
    except Exception:
        raise
    except BaseException:
        is_interrupted = True
        raise
    finally:
        if not is_interrupted:
            logging.set_verbosity(verbosity)
            if not were_disabled:
                enable_progress_bars()


@contextmanager
def _naming(what: str) -> Iterator[None]:
    """Turn what uploading raises beside HTTP errors into a HubError without a token in it."""
    try:
        yield
    except CkptavgError:
        raise
    except Exception as error:
        raise HubError(_upload_failed(what, error)) from error


def _upload_failed(what: str, error: Exception) -> str:
    said = f"{type(error).__name__}: {without_token(str(error))}"
    if error.__cause__ is not None:  # by its name: its text may hold a signed address
        said += f" ({type(error.__cause__).__name__})"
    is_xet = "xet" in f"{type(error).__module__} {error}".lower()
    hint = "; HF_HUB_DISABLE_XET=1 sends the files in the older way" if is_xet else ""
    return f"{what}: the upload failed: {said}{hint}"
