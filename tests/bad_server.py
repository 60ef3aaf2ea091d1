"""A web server on 127.0.0.1 that fails on demand and implements the part of the Hugging Face hub that tests need."""

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

from mlm.data.sources.retry import RetryPolicy
from mlm.data.sources.source import open_source

COMMIT = "0123456789abcdef0123456789abcdef01234567"

# The deadline is long enough for a busy machine; the time-out is less than the 0.5 s for which the server is silent.
RETRY_POLICY = RetryPolicy(deadline_seconds=30.0, timeout_seconds=0.2, first_wait_seconds=0.001, max_wait_seconds=0.01)
# No time-outs on a busy machine, for tests that count requests.
LONG_TIMEOUT = dataclasses.replace(RETRY_POLICY, timeout_seconds=5.0)
# For failures that do not end.
SHORT_DEADLINE = dataclasses.replace(RETRY_POLICY, deadline_seconds=0.05, timeout_seconds=5.0)
# Random letters, so that compressed files are large as well.
TEXTS = [
    f"{n} " + "".join(map(chr, letters))
    for n, letters in enumerate(np.random.default_rng(0).integers(97, 123, (400, 200)))
]
COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard.compress}
TRANSIENT_FAULTS = [
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
    """Serves `files` (path -> bytes) under `url`. The next responses to a path fail as `faults[path]` says, in order.

    A fault is a status, (status, headers), or one of
        "reset"             the connection is reset before a response
        "hang"              no response within a test's time-out
        "reset midway"      half of the body, then a reset
        "hang midway"       half of the body, then silence
        "cut"               half of the body, then the connection is closed
        "cut, no length"    the same, without a Content-Length header
        ("stop", n)         the first n bytes, then the connection is closed; 500 to requests for the rest
        "garbled"           a body of the right length with other bytes
        "changed"           a correct response with another ETag
    After these, every response is as `always[path]` says, if there is one. None is a correct response.

    Attributes:
        requests: (method, path, Range) of all requests.
        hub: path of a hub repository -> names of its files.
        ranges: whether Range requests are supported.
        limit: every response after this number of requests is 500; None for no limit.
    """

    def __init__(self, port=0, files=None):
        # Set before the server starts, because a client may be waiting for it.
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
        # No traceback when a client closes the connection.
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
        """Returns the number of requests of a path."""
        return sum(requested == path for _, requested, _ in self.requests)

    def heal(self):
        """Ends all faults and forgets the requests."""
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
        bytes_range = handler.headers.get("Range", "")
        content = read_body(handler)
        self.requests.append((handler.command, path, bytes_range))
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
            self.send_file(handler, data, bytes_range, fault)

    def find(self, path):
        if match := re.fullmatch(r"/datasets/(.+)/resolve/[^/]+/(.+)", path):
            path = f"/{match[1]}/{match[2]}"
        return self.files.get(path)

    def send_file(self, handler, data, bytes_range, fault):
        etag = hashlib.sha1(data).hexdigest() + ("x" if fault == "changed" else "")
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        status, body = 200, data
        if bytes_range and self.ranges:
            first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", bytes_range).groups()
            first, last = int(first), min(int(last or len(data)), len(data) - 1)
            if first >= len(data):
                send(handler, 416, b"", {"Content-Range": f"bytes */{len(data)}"})
                return
            status, body = 206, data[first : last + 1]
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        if isinstance(fault, tuple):
            if bytes_range:
                send(handler, 500, b"no", {})
            else:
                send(handler, 200, body, headers, length=fault[1])
                handler.close_connection = True
        elif fault == "garbled":
            send(handler, status, b"\xff" * len(body), headers)
        elif fault == "cut, no length":
            headers["Connection"] = "close"
            send(handler, status, body[: len(body) // 2], headers, send_length=False)
            handler.close_connection = True
        elif fault in ("cut", "reset midway", "hang midway"):
            send(handler, status, body, headers, length=(len(body) + 1) // 2)
            if fault == "reset midway":
                # A reset discards data that has not been received yet.
                time.sleep(0.05)
                reset(handler)
            elif fault == "hang midway":
                time.sleep(self.silence_seconds)
            handler.close_connection = True
        else:
            send(handler, status, body, headers)

    def hub_answer(self, handler, path, content):
        """Returns the hub API's response, or None if the path is not one of the API."""
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
                    requested = json.loads(content)["paths"]
                else:
                    requested = urllib.parse.parse_qs(content.decode())["paths"]
                return [entries[name] for name in requested if name in entries]
            if path in (f"{base}/tree/main", f"{base}/tree/{COMMIT}"):
                return list(entries.values())
        return None


def read_body(handler):
    """Reads the body of a request, chunked or not."""
    if handler.headers.get("Transfer-Encoding") != "chunked":
        return handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
    chunks = []
    while size := int(handler.rfile.readline(), 16):
        chunks.append(handler.rfile.read(size))
        handler.rfile.readline()
    handler.rfile.readline()
    return b"".join(chunks)


def send(handler, status, body, headers, *, length=None, send_length=True):
    """Sends a response with the first `length` bytes of the body; the Content-Length header says all of it."""
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name, value)
    if send_length:
        handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    if handler.command != "HEAD":
        with contextlib.suppress(ConnectionError):
            handler.wfile.write(body[:length])
            handler.wfile.flush()


def reset(handler):
    """Closes a connection with a TCP reset."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()
    handler.close_connection = True
    handler.rfile = handler.wfile = open("/dev/null", "r+b", buffering=0)  # noqa: SIM115


def http_date(seconds_from_now):
    """Returns a time in the format of HTTP headers."""
    return email.utils.formatdate(time.time() + seconds_from_now, usegmt=True)


def encode(name, texts):
    """Returns the bytes of a file with these texts, in the format of its extension."""
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


def open_url(server, *names, retry_policy=RETRY_POLICY):
    return open_source(data_files=[f"{server.url}/{name}" for name in names], retry_policy=retry_policy)


def rows_of(source, shard=0, start_row=0):
    return [text for texts in source.read(shard, start_row=start_row) for text in texts.to_pylist()]
