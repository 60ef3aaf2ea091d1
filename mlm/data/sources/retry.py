"""Retries of reads over a network: which failures are retried, for how long, and which are permanent.

A request that is reset, times out, is cut short or is answered with 408, 425, 429 or 5xx is sent again. The waits grow,
and respect a Retry-After header. A body continues at the byte where it was interrupted. So the bytes, and the rows made
of them, are those of a healthy server, each once and in order. After `deadline_seconds` without any new data the read
ends with `RetriesExhaustedError`. Other 4xx answers are permanent. The jitter of the waits comes from a separate random
generator and has no influence on the data.

`configure_hub_retries` makes huggingface_hub and `datasets` behave the same. By default, huggingface_hub 2.4 sends a
request 6 times and sleeps as long as a Retry-After header says; `datasets` 5.2 tries each read 20 more times; a body
that is interrupted twice ends a read; and a README that fails once counts as missing, and with it the dataset's
configuration.

Two failures cannot be detected: a body that ends early, after a complete line, from a server that does not send the
length; and a server that sends one byte within every time-out. Data that does not decode may have been cut, so it is
fetched again a few times.
"""

import dataclasses
import email.utils
import enum
import functools
import random
import re
import socket
import ssl
import threading
import time

import aiohttp
import huggingface_hub
from absl import logging
from huggingface_hub.utils import httpx

# HTTP status codes that mean too early, too many requests, or a failure of the server.
_RETRYABLE_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504, 507, 509, 520, 521, 522, 523, 524, 529, 530})
# A host that never answered is more likely misspelled than down.
_MAX_FIRST_CONTACT_TRIES = 3
# Data that fails to decode this many times was not cut, but is corrupt on the server.
_MAX_DECODE_TRIES = 5
# What the clients raise besides OSError.
CLIENT_ERRORS = (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, aiohttp.ClientError)


@dataclasses.dataclass(frozen=True)
class RetryPolicy:
    """How long a failing read is retried.

    Attributes:
        deadline_seconds: give up after failing for this long without any new data.
        timeout_seconds: a connection that is silent for this long counts as broken.
        first_wait_seconds, max_wait_seconds: the waits double from the first to the maximum; a jitter shortens each by
            up to a half.
    """

    deadline_seconds: float = 300.0
    timeout_seconds: float = 30.0
    first_wait_seconds: float = 1.0
    max_wait_seconds: float = 30.0


class RetriesExhaustedError(OSError):
    """The network failed for longer than the deadline.

    Neither one of httpx's errors nor a TimeoutError, which huggingface_hub and `datasets` would retry.
    """


class PermanentError(OSError):
    """A failure that a retry cannot fix, such as an HTTP 403 answer."""


class HostUnreachableError(httpx.ConnectError):
    """No connection to a host that has never answered this process."""


class Failure(enum.Enum):
    """The kind of failure that an exception during a read stands for."""

    PERMANENT = "a retry would fail the same way"
    TRANSIENT = "the network or the server failed"
    DECODE = "the data cannot be decoded"
    EXHAUSTED = "retries were exhausted"


def classify_error(error: BaseException) -> Failure:
    """Classifies an exception of a read from a network by itself and the exceptions that caused it."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    if any(isinstance(link, RetriesExhaustedError) for link in chain):
        return Failure.EXHAUSTED
    for link in chain:
        status = getattr(link, "status", None) or getattr(getattr(link, "response", None), "status_code", None)
        if isinstance(status, int) and status >= 400:
            return Failure.TRANSIENT if status in _RETRYABLE_STATUS else Failure.PERMANENT
    permanent = (
        HostUnreachableError,
        PermanentError,
        ImportError,
        PermissionError,
        ssl.SSLCertVerificationError,
        httpx.InvalidURL,
        httpx.UnsupportedProtocol,
        aiohttp.InvalidURL,
        huggingface_hub.errors.OfflineModeIsEnabled,
    )
    if any(isinstance(link, permanent) for link in chain):
        return Failure.PERMANENT
    transient = (
        httpx.HTTPError,
        httpx.StreamError,
        aiohttp.ClientError,
        ConnectionError,
        TimeoutError,
        socket.gaierror,
        ssl.SSLError,
    )
    if any(isinstance(link, transient) or _module(link) in ("requests", "urllib3") for link in chain):
        return Failure.TRANSIENT
    if any(isinstance(link, FileNotFoundError | IsADirectoryError) for link in chain):
        return Failure.PERMANENT
    return Failure.DECODE


def is_retryable_status(status: int) -> bool:
    """Returns whether a request with this HTTP status may succeed when it is sent again."""
    return status < 400 or status in _RETRYABLE_STATUS


def _module(error: BaseException) -> str:
    return type(error).__module__.split(".")[0]


class Retries:
    """The consecutive failures of one read.

    Args:
        retry_policy: waits and deadline.
        what: what is read, for the log.
    """

    _jitter = random.Random()

    def __init__(self, retry_policy: RetryPolicy, what: str):
        self._retry_policy = retry_policy
        self._what = what
        self.succeeded()

    def succeeded(self) -> None:
        """Resets deadline and waits, because new data has arrived."""
        self._since: float | None = None
        self._tries = 0
        self._wait = self._retry_policy.first_wait_seconds

    def failed(self, error: BaseException | str, *, retry_after: float = 0.0) -> None:
        """Waits until it is time to try again.

        Args:
            error: the failure.
            retry_after: seconds that the server asks to wait; the deadline limits them.

        Raises:
            RetriesExhaustedError: the deadline has passed, or the data could not be decoded several times.
            The error itself: it is permanent.
        """
        failure = Failure.TRANSIENT
        if isinstance(error, BaseException):
            failure = classify_error(error)
            if failure is Failure.EXHAUSTED:
                raise RetriesExhaustedError(str(error)) from None
            if failure is Failure.PERMANENT:
                raise error
        now = time.monotonic()
        self._since = self._since or now
        self._tries += 1
        seconds_left = self._since + self._retry_policy.deadline_seconds - now
        message = " ".join(str(error).split()) or type(error).__name__
        if seconds_left <= 0 or (failure is Failure.DECODE and self._tries >= _MAX_DECODE_TRIES):
            raise RetriesExhaustedError(f"{message} (tried {self._tries} times in {now - self._since:.0f} s)") from None
        wait = min(seconds_left, max(retry_after, self._wait * self._jitter.uniform(0.5, 1.0)))
        self._wait = min(2 * self._wait, self._retry_policy.max_wait_seconds)
        logging.warning("%s: %s; retrying in %.1f s, giving up in %.0f s", self._what, message, wait, seconds_left)
        time.sleep(wait)


class RetryingClient(httpx.Client):
    """An HTTP client that retries requests, redirects included.

    It retries GET and HEAD, and the POST with which huggingface_hub asks for paths, but no other method. If the body is
    streamed, only the failures before the body are retried.

    Args:
        retry_policy: waits and deadline.
        home: "host:port". If given, only requests to this host and to hosts that it redirects to are retried.
    """

    # Hosts that have answered this process: shared, because huggingface_hub creates new clients now and then.
    _answered: set[str] = set()  # noqa: RUF012

    def __init__(self, retry_policy: RetryPolicy, *, home: str = "", **options):
        super().__init__(follow_redirects=True, timeout=retry_policy.timeout_seconds, **options)
        self._retry_policy = retry_policy
        self._homes = {home} - {""}

    def send(self, request: httpx.Request, **options) -> httpx.Response:
        """Sends a request like httpx.Client.send.

        Raises:
            RetriesExhaustedError: there was no valid response within the deadline.
            HostUnreachableError: there is no connection to the host, and never was.
        """
        host = request.url.netloc.decode("ascii")
        repeatable = request.method in ("GET", "HEAD") or "/paths-info/" in request.url.path
        if not repeatable or (self._homes and host not in self._homes):
            return super().send(request, **options)
        request.extensions["timeout"] = httpx.Timeout(self._retry_policy.timeout_seconds).as_dict()
        retries = Retries(self._retry_policy, f"{request.url.host}{request.url.path}")
        failed_connections = 0
        while True:
            try:
                response = super().send(request, **options)
            except (httpx.UnsupportedProtocol, httpx.LocalProtocolError):
                raise
            except httpx.TransportError as error:
                failed_connections += 1
                never_answered = (
                    isinstance(error, httpx.ConnectError | httpx.ConnectTimeout) and host not in self._answered
                )
                if never_answered and failed_connections >= _MAX_FIRST_CONTACT_TRIES:
                    raise HostUnreachableError(f"{host} cannot be reached ({error})", request=request) from None
                retries.failed(error)
                continue
            self._answered.add(host)
            if self._homes and response.next_request is not None:
                self._homes.add(response.next_request.url.netloc.decode("ascii"))
            if response.status_code not in _RETRYABLE_STATUS:
                return response
            response.close()
            retries.failed(
                f"the server answers {response.status_code} {response.reason_phrase}".strip(),
                retry_after=_retry_after(response.headers),
            )


def _retry_after(headers: httpx.Headers) -> float:
    """Returns the seconds that a server asks to wait, 0 if it does not.

    They come from Retry-After, in seconds or as a date (RFC 9110, 10.2.3), or from the hub's `ratelimit:
    "api";r=0;t=55` (draft-ietf-httpapi-ratelimit-headers-09).
    """
    if limited := re.search(r";\s*r=0\s*;\s*t=(\d+)", headers.get("ratelimit", "")):
        return float(limited[1])
    value = headers.get("retry-after", "").strip()
    if value.isdigit():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0


@functools.cache
def client(retry_policy: RetryPolicy) -> RetryingClient:
    """Returns the client that all URLs with this policy use."""
    return RetryingClient(retry_policy)


_hub_lock = threading.Lock()


def configure_hub_retries(retry_policy: RetryPolicy) -> None:
    """Makes all reads of this process from the Hugging Face hub follow a retry policy, but not its uploads."""
    # Imported here: it takes a second, and most runs read no dataset from the hub.
    import datasets

    with _hub_lock:
        home = httpx.URL(huggingface_hub.constants.ENDPOINT).netloc.decode("ascii")
        event_hooks = huggingface_hub.get_session().event_hooks
        huggingface_hub.set_client_factory(lambda: RetryingClient(retry_policy, home=home, event_hooks=event_hooks))
        # No retries by `datasets`: RetryingClient has already retried.
        datasets.config.STREAMING_READ_MAX_RETRIES = datasets.config.STREAMING_OPEN_MAX_RETRIES = 1
        datasets.config.STREAMING_READ_RETRY_INTERVAL = datasets.config.STREAMING_OPEN_RETRY_INTERVAL = 0
        datasets.config.STREAMING_READ_SERVER_UNAVAILABLE_RETRY_INTERVAL = 0
        datasets.config.STREAMING_READ_RATE_LIMIT_RETRY_INTERVAL = 0
