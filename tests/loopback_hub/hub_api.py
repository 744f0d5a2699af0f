"""The Hub itself: takes addresses apart, checks who may do what, and calls the endpoint."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import unquote

from loopback_hub.messages import Call, Response, error_response, json_response
from loopback_hub.read_api import ReadApi
from loopback_hub.state import USER, HubState
from loopback_hub.targets import Target
from loopback_hub.write_api import WriteApi

REPO = r"(?P<repo>[\w.\-]+(?:/[\w.\-]+)?)"
MODEL = rf"/api/models/{REPO}"
REV = "(?P<rev>[^/]+)"
NAME = "(?P<name>[^/]+)"
LFS_PATH = re.compile(r"/lfs/(?P<action>complete|verify)/(?P<sha256>[0-9a-f]{64})")


@dataclass(frozen=True)
class Route:
    """An endpoint that is about one repository."""

    method: str  # GET stands for HEAD too
    pattern: str
    endpoint: Callable[[Call, Target], Response]
    needs_token: bool = False
    is_content: bool = False  # closed to strangers if the repository is gated


class HubApi:
    """Answers all calls to the Hub."""

    def __init__(self, state: HubState) -> None:
        self._state = state
        self._write = WriteApi(state)
        self._routes = _routes(ReadApi(state), self._write)

    def respond(self, call: Call) -> Response:
        """Answer one call."""
        call.body.read()  # a slow client must not keep the others waiting for the lock
        authorization = call.headers.get("Authorization")
        is_known = authorization in {f"Bearer {token}" for token in self._state.tokens}
        if authorization is not None and not is_known:
            return error_response(401, "Invalid credentials in Authorization header")
        with self._state.lock:
            response = self._respond_to_account(call, is_known=is_known)
            if response is None:
                response = self._respond_to_repository(call, is_known=is_known)
        return response

    def _respond_to_account(self, call: Call, *, is_known: bool) -> Response | None:
        """Answer what is not about a repository that exists."""
        line = f"{call.method} {call.path}"
        if line == "POST /api/validate-yaml":
            return json_response({"errors": [], "warnings": []})
        lfs = LFS_PATH.fullmatch(call.path)
        if lfs is not None and call.method == "POST":
            if lfs["action"] == "complete":
                return self._write.complete_upload(call, lfs["sha256"])
            return self._write.verify_upload(call, lfs["sha256"])
        if line not in (
            "GET /api/whoami-v2", "POST /api/repos/create", "DELETE /api/repos/delete",
        ):  # fmt: skip
            return None
        if not is_known:
            return _no_token()
        if call.path == "/api/repos/create":
            return self._write.create_repository(call)
        if call.path == "/api/repos/delete":
            return self._write.delete_repository(call)
        token = {"role": "write", "displayName": "test"}
        auth = {"type": "access_token", "accessToken": token}
        return json_response({"type": "user", "name": USER, "orgs": [], "auth": auth})

    def _respond_to_repository(self, call: Call, *, is_known: bool) -> Response:
        method = "GET" if call.method == "HEAD" else call.method
        for route in self._routes:
            found = re.fullmatch(route.pattern, call.path) if route.method == method else None
            if found is not None:
                names = {name: unquote(text or "") for name, text in found.groupdict().items()}
                return self._follow(route, call, names, is_known=is_known)
        return error_response(404, f"no endpoint {call.method} {call.path}")

    def _follow(
        self, route: Route, call: Call, names: dict[str, str], *, is_known: bool
    ) -> Response:
        repository = self._state.repositories.get(names["repo"])
        if repository is None or (repository.private and not is_known):
            # strangers are not told whether it exists
            return error_response(404 if is_known else 401, "Repository not found", "RepoNotFound")
        if repository.gated and route.is_content and not is_known:
            message = (
                f"Access to model {repository.id} is restricted. You must have access to it and"
                " be authenticated to access it. Please log in."
            )
            return error_response(403, message, "GatedRepo")
        if route.needs_token and not is_known:
            return _no_token()
        revision = names.get("rev") or "main"
        commit = repository.find_commit(revision)
        if commit is None:
            return error_response(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return route.endpoint(call, Target(repository, commit, names))


def _no_token() -> Response:
    return error_response(401, "Invalid username or password.")


def _routes(read: ReadApi, write: WriteApi) -> list[Route]:
    return [
        Route("GET", f"{MODEL}/revision/{REV}", read.model_info),
        Route("GET", f"{MODEL}/refs", read.refs),
        Route("GET", f"{MODEL}/commits/{REV}", read.commits),
        Route("GET", f"{MODEL}/tree/{REV}(?:/(?P<path>.*))?", read.tree),
        Route("POST", f"{MODEL}/paths-info/{REV}", read.paths_info),
        Route("GET", f"/{REPO}/resolve/{REV}/(?P<path>.+)", read.resolve, is_content=True),
        Route("GET", f"{MODEL}/xet-read-token/{REV}", read.xet_token, is_content=True),
        Route("GET", f"{MODEL}/xet-write-token/{REV}", read.xet_token, needs_token=True),
        Route("GET", rf"{MODEL}/discussions/(?P<number>\d+)", read.pull_request),
        Route("POST", f"{MODEL}/discussions", write.create_pull_request, needs_token=True),
        Route("POST", f"{MODEL}/preupload/{REV}", write.preupload, needs_token=True),
        Route("POST", f"/{REPO}\\.git/info/lfs/objects/batch", write.lfs_batch, needs_token=True),
        Route("POST", f"{MODEL}/commit/{REV}", write.commit, needs_token=True),
        Route("POST", f"{MODEL}/branch/{NAME}", write.create_branch, needs_token=True),
        Route("DELETE", f"{MODEL}/branch/{NAME}", write.delete_branch, needs_token=True),
        Route("POST", f"{MODEL}/tag/{REV}", write.create_tag, needs_token=True),
        Route("DELETE", f"{MODEL}/tag/{NAME}", write.delete_tag, needs_token=True),
        Route("GET", MODEL, read.model_info),  # last: it would take "name/refs" for a repository
    ]
