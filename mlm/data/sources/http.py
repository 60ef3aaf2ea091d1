"""A file at an http(s) URL as a Python file, from first to last or here and there; network.py says how patiently."""

import atexit
import contextlib
import io
import weakref
from collections.abc import Iterator

from huggingface_hub.utils import httpx

from mlm.data.sources import retry


class _Remote(io.RawIOBase):
    """What the two ways to read a URL have in common: requests of one and the same file.

    Raises:
        GaveUpError, UnknownHostError: see PatientClient.
        FileNotFoundError, RefusedError: the server's answer.
    """

    def __init__(self, url: str, *, retry_policy: retry.RetryPolicy):
        self._url = url
        self._client = retry.client(retry_policy)
        self._retries = retry.Retries(retry_policy, url.split("?", 1)[0])
        self._version: str | None = None  # the ETag of the first answer

    def readable(self) -> bool:
        """As any file's."""
        return True

    def _get(self, bytes_range: str) -> httpx.Response:
        # Else the server may compress what it sends, and positions would mean something else.
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={bytes_range}"} if bytes_range else {})
        response = self._client.send(self._client.build_request("GET", self._url, headers=headers), stream=True)
        status = response.status_code
        if status in (200, 206):
            version = response.headers.get("etag", "")
            if self._version is None:
                self._version = version
            if version == self._version:
                return response
        response.close()
        if status in (200, 206):
            raise retry.RefusedError("the file on the server was changed while it was read")
        if status in (404, 410):
            raise FileNotFoundError(self._url)
        raise retry.RefusedError(f"the server answers {status} {response.reason_phrase}".strip())

    def _check_start(self, response: httpx.Response, start: int) -> None:
        if not response.headers.get("content-range", "").startswith(f"bytes {start}-"):
            raise retry.RefusedError("the server sends another part of the file than it was asked for")


# While Python ends, modules go before the generators that read; a connection closed by those complains.
_streams: "weakref.WeakSet[RemoteStream]" = weakref.WeakSet()


@atexit.register
def _close_streams() -> None:
    for stream in list(_streams):
        stream.close()


class RemoteStream(_Remote):
    """The bytes of a URL from first to last. A body that breaks off is gone on with, by a Range request."""

    def __init__(self, url: str, *, retry_policy: retry.RetryPolicy):
        super().__init__(url, retry_policy=retry_policy)
        self._response: httpx.Response | None = None
        self._chunks: Iterator[bytes] = iter(())
        self._chunk = memoryview(b"")  # come and not yet given
        self._received = 0  # bytes
        _streams.add(self)

    def readinto(self, buffer: memoryview) -> int:
        """Fills part of a buffer; 0 at the end."""
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
            self._received += len(chunk)
            self._chunk = memoryview(chunk)
        count = min(len(buffer), len(self._chunk))
        buffer[:count] = self._chunk[:count]
        self._chunk = self._chunk[count:]
        return count

    def _connect(self) -> None:
        self._response = self._get(f"{self._received}-" if self._received else "")
        partial = self._response.status_code == 206
        if partial:
            self._check_start(self._response, self._received)
        self._chunks = self._response.iter_raw()
        # A server that knows no Range begins anew.
        skip = 0 if partial else self._received
        while skip:
            chunk = next(self._chunks, None)
            if chunk is None:
                raise retry.RefusedError("the file on the server was changed while it was read")
            if len(chunk) > skip:
                self._chunks = _chain(chunk[skip:], self._chunks)
            skip -= min(skip, len(chunk))

    def _disconnect(self) -> None:
        if self._response is not None:
            self._response.close()
        self._response = None
        self._chunks = iter(())

    def close(self) -> None:
        """Drops the connection."""
        self._disconnect()
        super().close()


def _chain(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    yield first
    yield from rest


class RemoteParts(_Remote):
    """A file at a URL that is read here and there, by Range requests."""

    def __init__(self, url: str, *, retry_policy: retry.RetryPolicy):
        super().__init__(url, retry_policy=retry_policy)
        self._position = 0
        self._size = 1
        with self._part(1) as response:
            self._size = int(response.headers.get("content-range", "").rpartition("/")[2])

    def seekable(self) -> bool:
        """As any file's."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """As any file's."""
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        return self._position

    def tell(self) -> int:
        """As any file's."""
        return self._position

    def readinto(self, buffer: memoryview) -> int:
        """Fills a buffer as far as the file goes."""
        wanted = max(0, min(len(buffer), self._size - self._position))
        done = 0
        while done < wanted:
            try:
                with self._part(wanted - done) as response:
                    for chunk in response.iter_raw():
                        count = min(len(chunk), wanted - done)
                        buffer[done : done + count] = chunk[:count]
                        done += count
                        self._position += count
                        self._retries.succeeded()
                if done < wanted:
                    self._retries.failed(f"the server sends {wanted - done} bytes fewer than it was asked for")
            except httpx.TransportError as error:
                self._retries.failed(error)
        return done

    @contextlib.contextmanager
    def _part(self, count: int) -> Iterator[httpx.Response]:
        """An answer that holds `count` bytes from the present position on, or fewer."""
        response = self._get(f"{self._position}-{self._position + count - 1}")
        try:
            if response.status_code != 206:
                raise retry.RefusedError("the server gives no parts of files, which parquet needs: download it first")
            self._check_start(response, self._position)
            yield response
        finally:
            response.close()
