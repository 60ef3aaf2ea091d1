"""Reading over a network that is bad: what is tried again, for how long, and what is given up.

What is promised. A request that is reset, times out, is cut short or is answered with 408, 425, 429 or 5xx is made
again after a growing wait, no sooner than a Retry-After says, until nothing has come for `deadline_seconds`; a body
goes on at the byte where it broke off. So the bytes, and the rows made of them, are those of a healthy server, each
once and in order. After the deadline it is `GaveUpError`. Other answers of 4xx are refusals, which waiting does not
mend. The waits have a jitter, drawn from a generator of its own: it has no part in the data.

The same holds for the Hugging Face hub, through `be_patient`. Left alone, huggingface_hub 2.4 tries a request 6 times
and sleeps as long as a Retry-After says; `datasets` 5.2 tries each read 20 times on top; a body that is cut twice
ends a read; a README that fails for a moment is taken for one that is not there, and with it the data set's
configuration. Rate limits, time-outs and deadlines of the two are the constants here instead.

What cannot be noticed: a body that ends early, at the end of a line, from a server that does not say how long it
is. What does not decode is fetched again a few times, for it may have been cut. A server that sends a byte now and
then keeps within the time-out for ever.
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
import datasets
import huggingface_hub
from absl import logging
from huggingface_hub.utils import httpx

# Too early, too many, or the server's own trouble.
_TRY_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504, 507, 509, 520, 521, 522, 523, 524, 529, 530})
# A host that never answered is more likely misspelt than down.
_FIRST_CONTACT_TRIES = 3
# What does not decode is fetched this often: it was cut, or it is broken, and then stays so.
_UNREADABLE_TRIES = 5
# Everything the clients raise that is no OSError.
ERRORS = (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, aiohttp.ClientError)


@dataclasses.dataclass(frozen=True)
class RetryPolicy:
    """How long to try.

    Attributes:
        deadline_seconds: of failing, with nothing new in between, after which a read is given up.
        timeout_seconds: of silence on a connection, after which it counts as broken.
        first_wait_seconds, max_wait_seconds: the waits double from the one to the other; a jitter takes up to half
            of them away.
    """

    deadline_seconds: float = 300.0
    timeout_seconds: float = 30.0
    first_wait_seconds: float = 1.0
    max_wait_seconds: float = 30.0


class RetriesExhaustedError(OSError):
    """The network was bad for longer than the deadline.

    None of httpx's errors, nor a time-out: on those huggingface_hub and `datasets` would start over.
    """


class RefusedError(OSError):
    """An answer that will be the same next time."""


class UnknownHostError(httpx.ConnectError):
    """No connection to a host that has not answered this process yet."""


class Failure(enum.Enum):
    """What an exception of a read means."""

    PERMANENT = "the same next time"
    TRANSIENT = "the network's"
    DECODE = "what came does not decode"
    GAVE_UP = "tried long enough"


def classify_error(error: BaseException) -> Failure:
    """What an exception of a read from a network means, also where another one was raised from it."""
    chain = [error]
    while (before := chain[-1].__cause__ or chain[-1].__context__) is not None and before not in chain:
        chain.append(before)
    if any(isinstance(link, RetriesExhaustedError) for link in chain):
        return Failure.GAVE_UP
    for link in chain:
        status = getattr(link, "status", None) or getattr(getattr(link, "response", None), "status_code", None)
        if isinstance(status, int) and status >= 400:
            return Failure.TRANSIENT if status in _TRY_AGAIN else Failure.PERMANENT
    final = (
        UnknownHostError,
        RefusedError,
        ImportError,
        PermissionError,
        ssl.SSLCertVerificationError,
        httpx.InvalidURL,
        httpx.UnsupportedProtocol,
        aiohttp.InvalidURL,
        huggingface_hub.errors.OfflineModeIsEnabled,
    )
    if any(isinstance(link, final) for link in chain):
        return Failure.PERMANENT
    broken = (httpx.HTTPError, httpx.StreamError, aiohttp.ClientError, ConnectionError, TimeoutError, socket.gaierror)
    if any(isinstance(link, (*broken, ssl.SSLError)) or _module(link) in ("requests", "urllib3") for link in chain):
        return Failure.TRANSIENT
    if any(isinstance(link, FileNotFoundError | IsADirectoryError) for link in chain):
        return Failure.PERMANENT
    return Failure.DECODE


def is_retryable_status(status: int) -> bool:
    """Whether an HTTP status may be another the next time."""
    return status < 400 or status in _TRY_AGAIN


def _module(error: BaseException) -> str:
    return type(error).__module__.split(".")[0]


class Retries:
    """The failures of one read since it last got on."""

    _jitter = random.Random()

    def __init__(self, retry_policy: RetryPolicy, what: str):
        self._retry_policy = retry_policy
        self._what = what
        self.succeeded()

    def succeeded(self) -> None:
        """Something new has come: the next failure is a first one."""
        self._since: float | None = None
        self._tries = 0
        self._wait = self._retry_policy.first_wait_seconds

    def failed(self, error: BaseException | str, *, retry_after: float = 0.0) -> None:
        """Waits until it is time to try again.

        Args:
            error: what went wrong.
            retry_after: seconds the server asks for; past the deadline is tried once more at the deadline.

        Raises:
            GaveUpError: the deadline is over, or what comes does not decode, however often it is fetched.
            The error itself: it is final.
        """
        failure = classify_error(error) if isinstance(error, BaseException) else Failure.TRANSIENT
        if failure is Failure.GAVE_UP:
            raise RetriesExhaustedError(str(error)) from None
        if failure is Failure.PERMANENT:
            raise error
        now = time.monotonic()
        self._since = self._since or now
        self._tries += 1
        left = self._since + self._retry_policy.deadline_seconds - now
        message = " ".join(str(error).split()) or type(error).__name__
        if left <= 0 or (failure is Failure.DECODE and self._tries >= _UNREADABLE_TRIES):
            raise RetriesExhaustedError(f"{message} (tried {self._tries} times in {now - self._since:.0f} s)") from None
        wait = min(left, max(retry_after, self._wait * self._jitter.uniform(0.5, 1.0)))
        self._wait = min(2 * self._wait, self._retry_policy.max_wait_seconds)
        logging.warning("%s: %s; trying again in %.1f s, for %.0f s more", self._what, message, wait, left)
        time.sleep(wait)


class RetryingClient(httpx.Client):
    """An HTTP client that makes requests again, redirects included, as the head of this file says.

    A GET or HEAD, and the hub's question for paths, which is a POST; no other. Where a body is streamed, it covers
    all that is before the body. With a `home`, only requests of that host, "example.org:443", and of those that it
    sends its callers on to.
    """

    # Hosts that have answered this process; huggingface_hub makes new clients now and then.
    _answered: set[str] = set()  # noqa: RUF012

    def __init__(self, retry_policy: RetryPolicy, *, home: str = "", **options):
        super().__init__(follow_redirects=True, timeout=retry_policy.timeout_seconds, **options)
        self._retry_policy = retry_policy
        self._homes = {home} - {""}

    def send(self, request: httpx.Request, **options) -> httpx.Response:
        """As httpx.Client.send.

        Raises:
            GaveUpError: no proper answer within the deadline.
            UnknownHostError: no connection, and never was one.
        """
        host = request.url.netloc.decode("ascii")
        repeatable = request.method in ("GET", "HEAD") or "/paths-info/" in request.url.path
        if not repeatable or (self._homes and host not in self._homes):
            return super().send(request, **options)
        request.extensions["timeout"] = httpx.Timeout(self._retry_policy.timeout_seconds).as_dict()
        retries = Retries(self._retry_policy, f"{request.url.host}{request.url.path}")
        contacts = 0
        while True:
            try:
                response = super().send(request, **options)
            except (httpx.UnsupportedProtocol, httpx.LocalProtocolError):
                raise
            except httpx.TransportError as error:
                contacts += 1
                unknown = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout) and host not in self._answered
                if unknown and contacts >= _FIRST_CONTACT_TRIES:
                    raise UnknownHostError(f"{host} cannot be reached ({error})", request=request) from None
                retries.failed(error)
                continue
            self._answered.add(host)
            if self._homes and response.next_request is not None:
                self._homes.add(response.next_request.url.netloc.decode("ascii"))
            if response.status_code not in _TRY_AGAIN:
                return response
            response.close()
            retries.failed(
                f"the server answers {response.status_code} {response.reason_phrase}".strip(),
                retry_after=_retry_after(response.headers),
            )


def _retry_after(headers: httpx.Headers) -> float:
    """Seconds that a server asks to wait: Retry-After, in seconds or as a date (RFC 9110, 10.2.3), or the hub's
    `ratelimit: "api";r=0;t=55` (draft-ietf-httpapi-ratelimit-headers-09)."""
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
    """The one for all URLs that are read with such a patience."""
    return RetryingClient(retry_policy)


_hub_lock = threading.Lock()


def configure_hub_retries(retry_policy: RetryPolicy) -> None:
    """Makes all that this process reads from the Hugging Face hub follow `patience`.

    Uploads stay as they are.
    """
    with _hub_lock:
        options = {
            "home": httpx.URL(huggingface_hub.constants.ENDPOINT).netloc.decode("ascii"),
            "event_hooks": huggingface_hub.get_session().event_hooks,
        }
        huggingface_hub.set_client_factory(lambda: RetryingClient(retry_policy, **options))
        # One try, for ours are behind it.
        datasets.config.STREAMING_READ_MAX_RETRIES = datasets.config.STREAMING_OPEN_MAX_RETRIES = 1
        datasets.config.STREAMING_READ_RETRY_INTERVAL = datasets.config.STREAMING_OPEN_RETRY_INTERVAL = 0
        datasets.config.STREAMING_READ_SERVER_UNAVAILABLE_RETRY_INTERVAL = 0
        datasets.config.STREAMING_READ_RATE_LIMIT_RETRY_INTERVAL = 0
