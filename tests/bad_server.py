"""A web server on 127.0.0.1 that behaves badly on demand, and speaks as much of the Hugging Face hub as is needed."""

import bz2
import collections
import contextlib
import dataclasses
import email.utils
import gzip
import hashlib
import http.server
import io
import json
import lzma
import os
import re
import socket
import struct
import threading
import time
import urllib.parse

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import zstandard

from mlm.data.sources import source as sources
from mlm.data.sources.retry import RetryPolicy

COMMIT = "0123456789abcdef0123456789abcdef01234567"

# Long enough for a busy machine, where nothing is really wrong; the server is silent for 0.5 s.
PATIENCE = RetryPolicy(deadline_seconds=30.0, timeout_seconds=0.2, first_wait_seconds=0.001, max_wait_seconds=0.01)
# Where requests are counted.
CALM = dataclasses.replace(PATIENCE, timeout_seconds=5.0)
# For what is wrong for good; what is well may take its time.
IMPATIENCE = dataclasses.replace(PATIENCE, deadline_seconds=0.05, timeout_seconds=5.0)
# Random letters, so that compressed files are large, too.
TEXTS = [
    f"{n} " + "".join(map(chr, letters))
    for n, letters in enumerate(np.random.default_rng(0).integers(97, 123, (400, 200)))
]
COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard.compress}
TRANSIENT = [
    "reset",
    "reset midway",
    "cut",
    "hang",
    "hang midway",
    500,
    502,
    503,
    504,
    408,
    (429, {}),
    (429, {"Retry-After": "0"}),
    (429, {"ratelimit": '"api";r=0;t=0'}),
]


class Server:
    """Serves `files`, path -> bytes, under `url`; `faults` of a path are its next answers, one a request.

    A fault is a status, or a status with headers, or one of
        "reset"         the connection is reset before an answer
        "hang"          no answer, for longer than a test's time-out
        "reset midway"  and "hang midway", "cut": half of the body, then a reset, silence, or the end
        "cut unsaid"    half of the body, its length not told
        ("stop", n)     the first n bytes, then the end; 500 to who asks for more
        "garbled"       a body of the right length, and of nonsense
        "changed"       a proper answer of a file with another ETag
    After those every answer is `always` of the path, if there is one; None is a proper answer.

    Attributes:
        requests: (method, path, Range) of all requests.
        hub: path of the repository -> its files' names, for the calls of the hub.
        ranges: whether parts of files are served.
        limit: after so many requests every answer is 500; None for no limit.
    """

    def __init__(self, port=0, files=None):
        # Before it serves: who waits for it may ask at once.
        self.files: dict[str, bytes] = dict(files or {})
        self.faults: dict[str, collections.deque] = collections.defaultdict(collections.deque)
        self.always: dict[str, object] = {}
        self.requests: list[tuple[str, str, str]] = []
        self.ranges = True
        self.limit: int | None = None
        self.hub: dict[str, list[str]] = {}
        self.silence_seconds = 0.5
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", port), self._handler())
        self._server.daemon_threads = True
        # Clients may break off, too.
        self._server.handle_error = lambda *arguments: None
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def close(self):
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def count(self, path):
        """Requests of a path."""
        return sum(asked == path for _, asked, _ in self.requests)

    def heal(self):
        """All is well from now on."""
        self.faults.clear()
        self.always.clear()
        self.requests.clear()

    def next_fault(self, path):
        if self.limit is not None and len(self.requests) > self.limit:
            return 500
        if self.faults[path]:
            return self.faults[path].popleft()
        return self.always.get(path)

    def _handler(server):  # noqa: N805
        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments):
                pass

            def do_HEAD(self):
                server.answer(self)

            do_GET = do_POST = do_PUT = do_HEAD

        return Handler

    def answer(self, handler):
        path = urllib.parse.unquote(urllib.parse.urlsplit(handler.path).path)
        wanted = handler.headers.get("Range", "")
        content = read_body(handler)
        self.requests.append((handler.command, path, wanted))
        fault = self.next_fault(path)
        if fault == "reset":
            reset(handler)
        elif fault == "hang":
            time.sleep(self.silence_seconds)
            handler.close_connection = True
        elif isinstance(fault, int) or (isinstance(fault, tuple) and fault[0] != "stop"):
            status, headers = fault if isinstance(fault, tuple) else (fault, {})
            send(handler, status, b"no", headers)
        elif (body := self.hub_answer(handler, path, content)) is not None:
            status, body = body if isinstance(body, tuple) else (200, body)
            send(handler, status, json.dumps(body).encode(), {"Content-Type": "application/json"})
        elif (data := self.find(path)) is None:
            code = "EntryNotFound" if "/resolve/" in path or "/tree/" in path else "RepoNotFound"
            send(handler, 404, b"none", {"X-Error-Code": code})
        else:
            self.send_file(handler, data, wanted, fault)

    def find(self, path):
        if match := re.fullmatch(r"/datasets/(.+)/resolve/[^/]+/(.+)", path):
            path = f"/{match[1]}/{match[2]}"
        return self.files.get(path)

    def send_file(self, handler, data, wanted, fault):
        etag = hashlib.sha1(data).hexdigest() + ("x" if fault == "changed" else "")
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        status, body = 200, data
        if wanted and self.ranges:
            first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted).groups()
            first, last = int(first), min(int(last or len(data)), len(data) - 1)
            if first >= len(data):
                send(handler, 416, b"", {"Content-Range": f"bytes */{len(data)}"})
                return
            status, body = 206, data[first : last + 1]
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        if isinstance(fault, tuple):
            if wanted:
                send(handler, 500, b"no", {})
            else:
                send(handler, 200, body, headers, length=fault[1])
                handler.close_connection = True
        elif fault == "garbled":
            send(handler, status, b"\xff" * len(body), headers)
        elif fault == "cut unsaid":
            headers["Connection"] = "close"
            send(handler, status, body[: len(body) // 2], headers, told=False)
            handler.close_connection = True
        elif fault in ("cut", "reset midway", "hang midway"):
            send(handler, status, body, headers, length=(len(body) + 1) // 2)
            if fault == "reset midway":
                # What is under way would be lost with the reset.
                time.sleep(0.05)
                reset(handler)
            elif fault == "hang midway":
                time.sleep(self.silence_seconds)
            handler.close_connection = True
        else:
            send(handler, status, body, headers)

    def hub_answer(self, handler, path, content):
        """What the hub's API says, None where it is no such question."""
        for repository, names in self.hub.items():
            base = f"/api/datasets/{repository}"
            if path in (base, f"{base}/revision/main", f"{base}/revision/{COMMIT}"):
                siblings = [{"rfilename": name} for name in names]
                return {"id": repository, "sha": COMMIT, "private": False, "tags": [], "siblings": siblings}
            entries = {
                name: {
                    "type": "file",
                    "path": name,
                    "size": len(self.files[f"/{repository}/{name}"]),
                    "oid": hashlib.sha1(self.files[f"/{repository}/{name}"]).hexdigest(),
                }
                for name in names
            }
            if path.startswith(f"{base}/paths-info/"):
                if handler.headers.get("Content-Type", "").startswith("application/json"):
                    asked = json.loads(content)["paths"]
                else:
                    asked = urllib.parse.parse_qs(content.decode())["paths"]
                return [entries[name] for name in asked if name in entries]
            if path in (f"{base}/tree/main", f"{base}/tree/{COMMIT}"):
                return list(entries.values())
        return None


def read_body(handler):
    """What a request brings, in one piece or in chunks."""
    if handler.headers.get("Transfer-Encoding") != "chunked":
        return handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
    chunks = []
    while size := int(handler.rfile.readline(), 16):
        chunks.append(handler.rfile.read(size))
        handler.rfile.readline()
    handler.rfile.readline()
    return b"".join(chunks)


def send(handler, status, body, headers, *, length=None, told=True):
    """An answer, or its first `length` bytes."""
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name, value)
    if told:
        handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    if handler.command != "HEAD":
        with contextlib.suppress(ConnectionError):
            handler.wfile.write(body[:length])
            handler.wfile.flush()


def reset(handler):
    """Ends a connection the hard way."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()
    handler.close_connection = True
    handler.rfile = handler.wfile = open("/dev/null", "r+b", buffering=0)  # noqa: SIM115


def http_date(seconds_from_now):
    """A moment, as headers write it."""
    return email.utils.formatdate(time.time() + seconds_from_now, usegmt=True)


def encode(name, texts):
    """The bytes of a file of this name."""
    stem, extension = os.path.splitext(name)
    if extension in COMPRESS:
        return COMPRESS[extension](encode(stem, texts))
    sink = io.BytesIO()
    if extension == ".parquet":
        pq.write_table(pa.table({"text": texts}), sink, row_group_size=100)
    elif extension == ".csv":
        pa_csv.write_csv(pa.table({"id": range(len(texts)), "text": texts}), sink)
    elif extension == ".jsonl":
        sink.write("".join(json.dumps({"text": text}) + "\n" for text in texts).encode())
    else:
        sink.write("".join(text + "\n" for text in texts).encode())
    return sink.getvalue()


def open_url(server, *names, retry_policy=PATIENCE):
    return sources.open_source(
        dataset_name=None, data_files=[f"{server.url}/{name}" for name in names], retry_policy=retry_policy
    )


def rows_of(source, shard=0, start_row=0):
    return [text for texts in source.read(shard, start_row=start_row) for text in texts.to_pylist()]
