"""Endpoints of the Hub that read: what there is, and where its content is."""

import json
from collections.abc import Sequence
from operator import itemgetter
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qs, quote, urlencode

from loopback_hub.messages import Call, Response, error_response, json_response
from loopback_hub.repositories import Commit, StoredFile, directory_entry, file_entry, timestamp
from loopback_hub.state import USER, HubState
from loopback_hub.targets import Target

COMMITS_PER_PAGE = 50
NO_ID = "0" * 24


class ReadApi:
    """Answers calls that change nothing."""

    def __init__(self, state: HubState) -> None:
        self._state = state

    def model_info(self, call: Call, target: Target) -> Response:
        """Describe a repository at a revision."""
        repository, commit = target.repository, target.commit
        return json_response(
            {
                "_id": NO_ID,
                "id": repository.id,
                "modelId": repository.id,
                "author": repository.id.split("/")[0],
                "sha": commit.oid,
                "lastModified": commit.date,
                "createdAt": repository.history(commit)[-1].date,
                "private": repository.private,
                "gated": "auto" if repository.gated else False,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": [],
                "siblings": [
                    _sibling(path, file, with_blobs=call.flag("blobs"))
                    for path, file in sorted(commit.files.items())
                ],
            }
        )

    def refs(self, call: Call, target: Target) -> Response:
        """List branches and tags, and pull requests if they are asked for."""
        repository = target.repository
        value: dict[str, Any] = {
            "branches": [
                {"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid}
                for name, oid in repository.branches.items()
                if not name.startswith("refs/pr/")
            ],
            "converts": [],
            "tags": [
                {"name": name, "ref": f"refs/tags/{name}", "targetCommit": oid}
                for name, oid in repository.tags.items()
            ],
        }
        if call.flag("include_prs"):
            value["pullRequests"] = [
                {"name": name, "ref": name, "targetCommit": oid}
                for name, oid in repository.branches.items()
                if name.startswith("refs/pr/")
            ]
        return json_response(value)

    def commits(self, call: Call, target: Target) -> Response:
        """List the history of a revision, newest first."""
        history = target.repository.history(target.commit)
        page = int(call.option("p", "0"))
        page_size = min(self._state.page_size, COMMITS_PER_PAGE)
        listed = history[page * page_size : (page + 1) * page_size]
        value = [
            {
                "id": commit.oid,
                "title": commit.title,
                "message": commit.message,
                "authors": [{"user": USER}],
                "date": commit.date,
            }
            for commit in listed
        ]
        headers = {"X-Total-Count": str(len(history))}
        if (page + 1) * page_size < len(history):
            headers["Link"] = self._next_page(call, p=page + 1)
        return json_response(value, headers)

    def tree(self, call: Call, target: Target) -> Response:
        """List a directory, with those below it if that is asked for."""
        directory = target.names["path"].strip("/")
        entries = self._entries(
            target, directory, recursive=call.flag("recursive"), expand=call.flag("expand")
        )
        if directory and not entries:
            message = f'{directory} does not exist on "{target.names["rev"]}"'
            return error_response(
                404, message, "EntryNotFound", {"X-Repo-Commit": target.commit.oid}
            )
        first = int(call.option("cursor", "0"))
        stop = first + self._state.page_size
        headers = {"Link": self._next_page(call, cursor=stop)} if stop < len(entries) else {}
        return json_response(entries[first:stop], headers)

    def paths_info(self, call: Call, target: Target) -> Response:
        """List some paths, without those that do not exist."""
        paths, expand = _paths_asked_for(call.body.read())
        files = target.commit.files
        entries = []
        for path in paths:
            if path in files:
                entries.append(self._file_entry(target, path, expand=expand))
            elif any(name.startswith(f"{path.rstrip('/')}/") for name in files):
                entries.append(directory_entry(path.rstrip("/")))
        return json_response(entries)

    def resolve(self, call: Call, target: Target) -> Response:
        """Send a regular file, or the address of a large one."""
        path, commit = target.names["path"], target.commit
        headers = {"X-Repo-Commit": commit.oid}
        file = commit.files.get(path)
        if file is None:
            return error_response(404, "Entry not found", "EntryNotFound", headers)
        headers["ETag"] = f'"{file.etag}"'
        if file.content is not None:
            headers["Content-Type"] = "text/plain; charset=utf-8"
            return Response(200, headers, file.content, accepts_ranges=True)
        headers["X-Linked-Etag"] = f'"{file.etag}"'
        headers["X-Linked-Size"] = str(file.n_bytes)
        headers["Accept-Ranges"] = "bytes"
        headers["Location"] = self._state.signed_url(
            f"/blob/{file.sha256}", filename=PurePosixPath(path).name
        )
        if file.xet_hash is not None:
            token_url = (
                f"{self._state.hub_url}/api/models/{target.repository.id}"
                f"/xet-read-token/{commit.oid}"
            )
            headers["X-Xet-Hash"] = file.xet_hash
            headers["Link"] = f'<{token_url}>; rel="xet-auth"'
        headers["Content-Type"] = "text/plain; charset=utf-8"
        return Response(302, headers, b"Found. Redirecting")

    def xet_token(self, call: Call, target: Target) -> Response:
        """Tell where the Xet storage is."""
        if self._state.xet is None:
            return error_response(404, "Xet storage is not enabled")
        return self._state.xet.token_response()

    def pull_request(self, call: Call, target: Target) -> Response:
        """Describe a pull request."""
        number = int(target.names["number"])
        if not 1 <= number <= len(target.repository.pull_requests):
            return error_response(404, f"No discussion {number}")
        pull_request = target.repository.pull_requests[number - 1]
        return json_response(
            {
                "title": pull_request.title,
                "num": number,
                "author": {"name": USER},
                "createdAt": timestamp(),
                "status": "draft",
                "repo": {"name": target.repository.id, "type": "model"},
                "isPullRequest": True,
                "changes": {"base": "refs/heads/main"},
                "filesWithConflicts": [],
                "events": [],
                "diff": "",
            }
        )

    def _entries(
        self, target: Target, directory: str, *, recursive: bool, expand: bool
    ) -> list[dict[str, Any]]:
        prefix = f"{directory}/" if directory else ""
        directories = set()
        entries = []
        for path in target.commit.files:
            if not path.startswith(prefix):
                continue
            parents = path.removeprefix(prefix).split("/")[:-1]
            if recursive or not parents:
                entries.append(self._file_entry(target, path, expand=expand))
            n_shown = len(parents) if recursive else min(len(parents), 1)
            for n_parts in range(1, n_shown + 1):
                directories.add(prefix + "/".join(parents[:n_parts]))
        entries += [directory_entry(path) for path in directories]
        return sorted(entries, key=itemgetter("path"))

    def _file_entry(self, target: Target, path: str, *, expand: bool) -> dict[str, Any]:
        entry = file_entry(path, target.commit.files[path])
        if expand:
            change = target.repository.last_change(target.commit, path)
            entry["lastCommit"] = _commit_entry(change)
        return entry

    def _next_page(self, call: Call, **position: int) -> str:
        query = {name: values[0] for name, values in call.query.items()}
        query |= {name: str(value) for name, value in position.items()}
        return (
            f'<{self._state.hub_url}{quote(call.path, safe="/%")}?{urlencode(query)}>; rel="next"'
        )


def _paths_asked_for(body: bytes) -> tuple[Sequence[str], bool]:
    if body.startswith(b"{"):
        asked = json.loads(body)
        return asked["paths"], bool(asked.get("expand"))
    form = parse_qs(body.decode())
    return form.get("paths", []), form.get("expand", ["false"])[0].lower() == "true"


def _sibling(path: str, file: StoredFile, *, with_blobs: bool) -> dict[str, Any]:
    sibling: dict[str, Any] = {"rfilename": path}
    if with_blobs:
        entry = file_entry(path, file)
        sibling |= {"size": entry["size"], "blobId": entry["oid"]}
        if "lfs" in entry:
            lfs = entry["lfs"]
            sibling["lfs"] = {**lfs, "sha256": lfs["oid"]}
            del sibling["lfs"]["oid"]
    return sibling


def _commit_entry(commit: Commit) -> dict[str, str]:
    return {"id": commit.oid, "title": commit.title, "date": commit.date}
