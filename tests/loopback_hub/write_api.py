"""Endpoints of the Hub that write: repositories, uploads, commits, branches and tags."""

import base64
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from loopback_hub.messages import Call, Response, error_response, json_response
from loopback_hub.repositories import StoredFile, is_lfs, regular_file
from loopback_hub.state import USER, HubState
from loopback_hub.targets import Target


class NotUploadedError(Exception):
    """A commit names a large file that was not uploaded before."""


@dataclass
class CommitPayload:
    """The lines of a commit request, put together."""

    title: str = ""
    message: str = ""
    expected_parent: str | None = None
    changes: dict[str, StoredFile | None] = field(default_factory=dict)


class WriteApi:
    """Answers calls that change something; their callers have shown a token."""

    def __init__(self, state: HubState) -> None:
        self._state = state

    def create_repository(self, call: Call) -> Response:
        """Make a repository."""
        asked = json.loads(call.body.read())
        repo_id = _repo_id(asked)
        value = {"url": f"{self._state.hub_url}/{repo_id}", "name": repo_id, "id": "0" * 24}
        if repo_id in self._state.repositories:
            # the client takes the url from here when it may exist
            value["error"] = "You already created this model repo"
            return json_response(value, status=409)
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self._state.create(repo_id, private=private)
        return json_response(value)

    def delete_repository(self, call: Call) -> Response:
        """Forget a repository."""
        repo_id = _repo_id(json.loads(call.body.read()))
        if self._state.repositories.pop(repo_id, None) is None:
            return error_response(404, "Repository not found", "RepoNotFound")
        return json_response({})

    def preupload(self, call: Call, target: Target) -> Response:
        """Tell which files are LFS, and what is there: the client leaves out what is the same."""
        answers = []
        for asked in json.loads(call.body.read())["files"]:
            path = asked["path"]
            answer = {
                "path": path,
                "uploadMode": "lfs" if is_lfs(path, asked["size"]) else "regular",
                "shouldIgnore": False,
            }
            present = target.commit.files.get(path)
            if present is not None:
                answer["oid"] = present.etag
            answers.append(answer)
        return json_response({"files": answers, "commitOid": target.commit.oid})

    def lfs_batch(self, call: Call, target: Target) -> Response:
        """Tell where to upload large files, those that are not here yet."""
        asked = json.loads(call.body.read())
        is_multipart = False
        objects = []
        for wanted in asked["objects"]:
            sha256, n_bytes = wanted["oid"], wanted["size"]
            answer = {"oid": sha256, "size": n_bytes, "authenticated": True}
            if not self._state.blobs.has(sha256):
                part_nbytes = self._state.multipart_over_bytes
                if part_nbytes is not None and n_bytes > part_nbytes:
                    is_multipart = True
                    upload = self._multipart_upload(sha256, n_bytes, part_nbytes)
                else:
                    upload = {"href": self._state.signed_url(f"/upload/{sha256}")}
                verify = {"href": f"{self._state.hub_url}/lfs/verify/{sha256}"}
                answer["actions"] = {"upload": upload, "verify": verify}
            objects.append(answer)
        return json_response(
            {"transfer": "multipart" if is_multipart else "basic", "objects": objects},
            {"Content-Type": "application/vnd.git-lfs+json"},
        )

    def _multipart_upload(self, sha256: str, n_bytes: int, part_nbytes: int) -> dict[str, Any]:
        header = {"chunk_size": str(part_nbytes)}
        for number in range(1, math.ceil(n_bytes / part_nbytes) + 1):
            header[f"{number:05d}"] = self._state.signed_url(f"/upload/{sha256}/{number}")
        return {"href": f"{self._state.hub_url}/lfs/complete/{sha256}", "header": header}

    def complete_upload(self, call: Call, sha256: str) -> Response:
        """Put the parts of a large file together."""
        parts = json.loads(call.body.read())["parts"]
        parts.sort(key=_part_number)
        if not self._state.blobs.join_parts(sha256, [part["etag"].strip('"') for part in parts]):
            return error_response(400, "The parts are not all there, or wrong")
        return json_response({})

    def verify_upload(self, call: Call, sha256: str) -> Response:
        """Tell whether a large file has arrived."""
        if not self._state.blobs.has(sha256):
            return error_response(404, "Not uploaded")
        return json_response({})

    def commit(self, call: Call, target: Target) -> Response:
        """Put a commit on a branch, or on a new pull request from it."""
        try:
            payload = self._read_payload(call.body.read(), target.commit.files)
        except NotUploadedError as error:
            return error_response(400, f"LFS object {error} was not uploaded")
        expected = payload.expected_parent
        if expected is not None and not target.commit.oid.startswith(expected):
            message = "A commit has happened since. Please refresh and try again."
            return error_response(412, message)
        repository = target.repository
        repository_url = f"{self._state.hub_url}/{repository.id}"
        value: dict[str, Any] = {"success": True, "hookOutput": ""}
        branch = target.names["rev"]
        if call.flag("create_pr"):
            pull_request = repository.add_pull_request(branch, payload.title)
            branch = pull_request.ref
            value["pullRequestUrl"] = f"{repository_url}/discussions/{pull_request.number}"
        elif branch not in repository.branches:
            return error_response(400, f"{branch} is not a branch")
        commit = repository.add_commit(
            branch, target.commit, payload.changes, payload.title, payload.message
        )
        value["commitOid"] = commit.oid
        value["commitUrl"] = f"{repository_url}/commit/{commit.oid}"
        return json_response(value)

    def _read_payload(self, body: bytes, present: Mapping[str, StoredFile]) -> CommitPayload:
        payload = CommitPayload()
        for line in body.splitlines():
            if not line.strip():
                continue
            operation = json.loads(line)
            kind, value = operation["key"], operation["value"]
            if kind == "header":
                payload.title = value["summary"]
                payload.message = value.get("description", "")
                payload.expected_parent = value.get("parentCommit") or None
            elif kind == "file":
                payload.changes[value["path"]] = regular_file(base64.b64decode(value["content"]))
            elif kind == "lfsFile":
                file = self._state.uploaded_file(value["oid"], value["size"])
                if file is None:
                    raise NotUploadedError(value["oid"])
                payload.changes[value["path"]] = file
            elif kind == "deletedFile":
                payload.changes[value["path"]] = None
            elif kind == "deletedFolder":
                prefix = f"{value['path'].rstrip('/')}/"
                payload.changes |= {path: None for path in present if path.startswith(prefix)}
            else:
                raise ValueError(f"unknown commit operation {kind}")
        return payload

    def create_branch(self, call: Call, target: Target) -> Response:
        """Make a branch."""
        name, repository = target.names["name"], target.repository
        if name in repository.branches:
            return error_response(409, f"Reference already exists: refs/heads/{name}")
        asked = json.loads(call.body.read() or b"{}")
        start = repository.find_commit(asked.get("startingPoint") or "main")
        if start is None:
            return error_response(404, "Invalid starting point", "RevisionNotFound")
        repository.branches[name] = start.oid
        return json_response({})

    def delete_branch(self, call: Call, target: Target) -> Response:
        """Remove a branch."""
        name = target.names["name"]
        if name == "main":
            return error_response(403, "Cannot delete the default branch")
        if target.repository.branches.pop(name, None) is None:
            return error_response(404, f"Invalid rev id: {name}", "RevisionNotFound")
        return json_response({})

    def create_tag(self, call: Call, target: Target) -> Response:
        """Tag a commit."""
        tag = json.loads(call.body.read())["tag"]
        if tag in target.repository.tags:
            return error_response(409, f"Tag already exists: {tag}")
        target.repository.tags[tag] = target.commit.oid
        return json_response({})

    def delete_tag(self, call: Call, target: Target) -> Response:
        """Remove a tag."""
        name = target.names["name"]
        if target.repository.tags.pop(name, None) is None:
            return error_response(404, f"Invalid rev id: {name}", "RevisionNotFound")
        return json_response({})

    def create_pull_request(self, call: Call, target: Target) -> Response:
        """Open a pull request without changes; commits on its branch follow."""
        title = json.loads(call.body.read())["title"]
        pull_request = target.repository.add_pull_request("main", title)
        return json_response({"num": pull_request.number})


def _repo_id(asked: Mapping[str, Any]) -> str:
    return f"{asked.get('organization') or USER}/{asked['name']}"


def _part_number(part: Mapping[str, Any]) -> int:
    number: int = part["partNumber"]
    return number
