"""A file at an http(s) URL as a Python file object, sequential or seekable; retry.py says what is retried."""

import atexit
import contextlib
import io
import itertools
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

from huggingface_hub.utils import httpx

from mlm.data.sources import retry


class _HttpFile(io.RawIOBase):
    """The requests that both kinds of file send; they check that all answers come from the same version of the file.

    Args:
        url: where the file is.
        retry_policy: waits and deadline.
        headers: of every request; a redirect to another host leaves Authorization out.

    Raises:
        RetriesExhaustedError, HostUnreachableError: see RetryingClient.
        FileNotFoundError, PermanentError: the server refuses.
    """

    def __init__(self, url: str, *, retry_policy: retry.RetryPolicy, headers: Mapping[str, str] | None = None):
        self._url = url
        self._headers = dict(headers or {})
        self._client = retry.client(retry_policy)
        self._retries = retry.Retries(retry_policy, url.split("?", 1)[0])
        self._etag: str | None = None  # of the first response

    def readable(self) -> bool:
        """Returns True."""
        return True

    def _get(self, bytes_range: str) -> httpx.Response:
        # Without "identity" the server may compress the body, and byte positions would no longer be those of the file.
        headers = self._headers | {"Accept-Encoding": "identity"}
        if bytes_range:
            headers["Range"] = f"bytes={bytes_range}"
        response = self._client.send(self._client.build_request("GET", self._url, headers=headers), stream=True)
        status = response.status_code
        if status in (200, 206):
            etag = response.headers.get("etag", "")
            if self._etag is None:
                self._etag = etag
            if etag == self._etag:
                return response
        response.close()
        if status in (200, 206):
            raise retry.PermanentError("the file on the server changed while it was read")
        if status in (404, 410):
            raise FileNotFoundError(self._url)
        # The hub's own header says more, such as who may read a gated dataset.
        reason = response.headers.get("x-error-message", response.reason_phrase)
        raise retry.PermanentError(f"the server answers {status} {reason}".strip())

    def _check_start(self, response: httpx.Response, start: int) -> None:
        if not response.headers.get("content-range", "").startswith(f"bytes {start}-"):
            raise retry.PermanentError("the server sends other bytes than the requested range")


# At interpreter shutdown modules are destroyed before the generators that read; closing a connection then would fail.
_open_files: "weakref.WeakSet[HttpStreamFile]" = weakref.WeakSet()


@atexit.register
def _close_files() -> None:
    for file in list(_open_files):
        file.close()


class HttpStreamFile(_HttpFile):
    """A file at a URL, read from start to end; after an interruption a Range request continues it."""

    def __init__(self, url: str, *, retry_policy: retry.RetryPolicy, headers: Mapping[str, str] | None = None):
        super().__init__(url, retry_policy=retry_policy, headers=headers)
        self._response: httpx.Response | None = None
        self._chunks: Iterator[bytes] = iter(())
        self._chunk = memoryview(b"")  # received, but not yet returned
        self._bytes_received = 0
        _open_files.add(self)

    def readinto(self, buffer: Any) -> int:
        """Fills a part of a buffer and returns the number of bytes, 0 at the end of the file."""
        while not self._chunk:
            try:
                if self._response is None:
                    self._connect()
                chunk = next(self._chunks, None)
            except httpx.TransportError as error:
                self._disconnect()
                self._retries.failed(error)
                continue
            if chunk is None:
                return 0
            self._retries.succeeded()
            self._bytes_received += len(chunk)
            self._chunk = memoryview(chunk)
        count = min(len(buffer), len(self._chunk))
        buffer[:count] = self._chunk[:count]
        self._chunk = self._chunk[count:]
        return count

    def _connect(self) -> None:
        self._response = self._get(f"{self._bytes_received}-" if self._bytes_received else "")
        is_partial = self._response.status_code == 206
        if is_partial:
            self._check_start(self._response, self._bytes_received)
        self._chunks = self._response.iter_raw()
        # A server without Range requests sends the file from its start.
        bytes_to_skip = 0 if is_partial else self._bytes_received
        while bytes_to_skip:
            chunk = next(self._chunks, None)
            if chunk is None:
                raise retry.PermanentError("the file on the server changed while it was read")
            if len(chunk) > bytes_to_skip:
                self._chunks = itertools.chain([chunk[bytes_to_skip:]], self._chunks)
            bytes_to_skip -= min(bytes_to_skip, len(chunk))

    def _disconnect(self) -> None:
        if self._response is not None:
            self._response.close()
        self._response = None
        self._chunks = iter(())

    def close(self) -> None:
        """Closes the connection."""
        self._disconnect()
        super().close()


class HttpRangeFile(_HttpFile):
    """A seekable file at a URL: each read is a Range request."""

    def __init__(self, url: str, *, retry_policy: retry.RetryPolicy, headers: Mapping[str, str] | None = None):
        super().__init__(url, retry_policy=retry_policy, headers=headers)
        self._position = 0
        self._size = 1
        with self._get_part(1) as response:
            self._size = int(response.headers.get("content-range", "").rpartition("/")[2])

    def seekable(self) -> bool:
        """Returns True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Changes the position, without a request."""
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        return self._position

    def tell(self) -> int:
        """Returns the position in bytes."""
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fills a buffer, or less of it at the end of the file, and returns the number of bytes."""
        size = max(0, min(len(buffer), self._size - self._position))
        done = 0
        while done < size:
            try:
                with self._get_part(size - done) as response:
                    for chunk in response.iter_raw():
                        count = min(len(chunk), size - done)
                        buffer[done : done + count] = chunk[:count]
                        done += count
                        self._position += count
                        self._retries.succeeded()
                if done < size:
                    self._retries.failed(f"the server sent {size - done} bytes less than requested")
            except httpx.TransportError as error:
                self._retries.failed(error)
        return done

    @contextlib.contextmanager
    def _get_part(self, count: int) -> Iterator[httpx.Response]:
        """Requests `count` bytes from the current position; the response may have fewer."""
        response = self._get(f"{self._position}-{self._position + count - 1}")
        try:
            if response.status_code != 206:
                raise retry.PermanentError(
                    "the server has no Range support, which parquet needs; download the file and use the copy"
                )
            self._check_start(response, self._position)
            yield response
        finally:
            response.close()
