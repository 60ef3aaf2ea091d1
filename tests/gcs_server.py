"""An emulated Google Cloud Storage: gcp-storage-emulator, which keeps buckets in memory and implements the JSON API,
plus conditional uploads, which it lacks, and refusals that tests ask for."""

import contextlib
import http.server
import io
import json
import re
import threading
import urllib.parse
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path

from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import buckets
from gcp_storage_emulator.server import RequestHandler
from gcp_storage_emulator.storage import Storage

BUCKET = "bucket"


class GcsServer:
    """A server at `url` with one bucket, which programs use that have `environment`.

    Attributes:
      refuse: (HTTP method, object name or "") -> the status code to answer with, or None to serve the request.
      asked: (method, name) of every request so far.
    """

    def __init__(self):
        self.storage = Storage(use_memory_fs=True)
        buckets.create_bucket(BUCKET, self.storage)
        self.refuse: Callable[[str, str], int | None] = lambda method, name: None
        self.asked: list[tuple[str, str]] = []
        self.lock = threading.Lock()
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, self.storage, outer=self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables by which google-cloud-storage, gcsfs and TensorStore find the server."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
            "NO_GCE_CHECK": "true",
        }

    def names(self, prefix: str = "") -> list[str]:
        """Returns the names of the objects, sorted."""
        with self.lock:
            return sorted(name for name in self.storage.objects.get(BUCKET, {}) if name.startswith(prefix))

    def read(self, name: str) -> bytes:
        """Returns the content of an object."""
        with self.lock:
            return self.storage.get_file(BUCKET, name)

    def write(self, name: str, content: bytes) -> None:
        """Writes an object, as another machine would."""
        query = urllib.parse.urlencode({"uploadType": "media", "name": name})
        address = f"{self.url}/upload/storage/v1/b/{BUCKET}/o?{query}"
        urllib.request.urlopen(urllib.request.Request(address, data=content, method="POST")).close()

    def download(self, prefix: str, directory: Path) -> None:
        """Writes all objects below `prefix` to files."""
        for name in self.names(prefix + "/"):
            path = directory / name.removeprefix(prefix + "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.read(name))

    def generation(self, name: str) -> int:
        """Returns the generation of an object, 0 if it does not exist. The caller must hold the lock."""
        with contextlib.suppress(NotFound):
            return int(self.storage.get_file_obj(BUCKET, name).get("generation", 0))
        return 0

    def close(self) -> None:
        """Stops the server."""
        self._server.shutdown()
        self._server.server_close()


class _Handler(RequestHandler):
    def __init__(self, *args, outer: GcsServer, **kwargs):
        self._outer, self._generation = outer, None
        super().__init__(*args, **kwargs)

    def _answer(self, method: str) -> None:
        outer = self._outer
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.rfile = io.BytesIO(body)
        query = dict(urllib.parse.parse_qsl(urllib.parse.urlparse(self.path).query))
        match = re.match(r"/(?:download/)?storage/v1/b/[^/]+/o/([^/?]+)", self.path)
        name = urllib.parse.unquote(match[1]) if match else query.get("name", "")
        if method == "POST" and not name and (match := re.search(rb'"name": ?"([^"]+)"', body[:2000])):
            name = match[1].decode()  # A multipart upload.
        with outer.lock:
            outer.asked.append((method, name))
            status = outer.refuse(method, name) or self._condition(method, name, query)
            if status is None:
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    getattr(super(), f"do_{method}")()
                return
        answer = b"" if status == 304 else json.dumps({"error": {"code": status, "message": "refused"}}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def _condition(self, method: str, name: str, query: dict[str, str]) -> int | None:
        """Returns a status code if a condition on the object's generation fails; TensorStore relies on these."""
        generation = str(self._outer.generation(name))
        if method == "GET" and generation != "0":
            self._generation = generation
            if query.get("ifGenerationNotMatch") == generation:
                return 304
        return 412 if query.get("ifGenerationMatch", generation) != generation else None

    def end_headers(self) -> None:
        if self._generation is not None:
            self.send_header("x-goog-generation", self._generation)
        super().end_headers()

    def do_GET(self) -> None:  # noqa: N802
        self._answer("GET")

    def do_POST(self) -> None:  # noqa: N802
        self._answer("POST")

    def do_PUT(self) -> None:  # noqa: N802
        self._answer("PUT")

    def do_DELETE(self) -> None:  # noqa: N802
        self._answer("DELETE")

    def do_PATCH(self) -> None:  # noqa: N802
        self._answer("PATCH")
