"""The server that holds large files: addresses come from the Hub, and carry their own right."""

import re

from loopback_hub.messages import Call, Response, error_response
from loopback_hub.state import HubState

BLOB_PATH = re.compile(r"/blob/(?P<sha256>[0-9a-f]{64})")
UPLOAD_PATH = re.compile(r"/upload/(?P<sha256>[0-9a-f]{64})(?:/(?P<part>\d+))?")


class Cdn:
    """Downloads and uploads of blobs."""

    def __init__(self, state: HubState) -> None:
        self._state = state

    def respond(self, call: Call) -> Response:
        """Answer one call."""
        if call.headers.get("Authorization") is not None:
            # as S3 does: the address is signed, and a token must not have come this far
            return error_response(400, "Only one auth mechanism allowed")
        if call.option("generation") != str(self._state.url_generation):
            return error_response(403, "Request has expired")
        blob = BLOB_PATH.fullmatch(call.path)
        if blob is not None and call.method in ("GET", "HEAD"):
            return self._download(blob["sha256"])
        upload = UPLOAD_PATH.fullmatch(call.path)
        if upload is not None and call.method == "PUT":
            if upload["part"] is not None:
                return self._upload_part(upload["sha256"], int(upload["part"]), call)
            return self._upload(upload["sha256"], call)
        return error_response(403, "Access denied")

    def _download(self, sha256: str) -> Response:
        if not self._state.blobs.has(sha256):
            return error_response(403, "Access denied")
        headers = {"ETag": f'"{sha256}"', "Content-Type": "binary/octet-stream"}
        return Response(200, headers, self._state.blobs.path(sha256), accepts_ranges=True)

    def _upload(self, sha256: str, call: Call) -> Response:
        if self._state.blobs.add_pieces(call.body.pieces(), sha256) is None:
            return error_response(400, "The sha256 of the body is another one")
        return Response(200, {"ETag": f'"{sha256}"'})

    def _upload_part(self, sha256: str, number: int, call: Call) -> Response:
        etag = self._state.blobs.add_part(sha256, number, call.body.pieces())
        return Response(200, {"ETag": f'"{etag}"'})
