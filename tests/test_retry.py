"""Failing servers, over real sockets: the rows are those of a healthy server, once each, or there is an error."""

import dataclasses
import itertools
import threading
import time

import aiohttp
import datasets
import fsspec.exceptions
import httpx2
import huggingface_hub
import numpy as np
import pyarrow as pa
import pytest
import requests

from mlm.data.sources import files, retry
from mlm.data.sources.retry import Failure, RetryPolicy
from mlm.data.sources.source import _READ_ERRORS, ShardUnavailableError, open_source
from mlm.errors import UserError
from tests.bad_server import (
    LONG_TIMEOUT,
    RETRY_POLICY,
    SHORT_DEADLINE,
    TEXTS,
    TRANSIENT_FAULTS,
    Server,
    encode,
    http_date,
    open_url,
    rows_of,
)

NAMES = ["a.jsonl", "a.txt", "a.csv", "a.parquet", "a.jsonl.gz", "a.txt.zst", "a.csv.xz", "a.txt.bz2"]
# Formats whose decoder notices a truncated file.
DECODED_NAMES = ["a.jsonl.gz", "a.txt.zst", "a.csv.xz", "a.txt.bz2", "a.parquet"]


@pytest.fixture
def server():
    """A server without faults; tests add them."""
    server = Server()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def small_reads(monkeypatch):
    """Makes reads so small that a test's files need many."""
    monkeypatch.setattr(files, "_HTTP_BUFFER_BYTES", 3000)
    monkeypatch.setattr(files, "_BLOCK_BYTES", 7000)


def serve(server, name, texts=TEXTS, retry_policy=RETRY_POLICY):
    """Opens a source of one file."""
    server.files[f"/{name}"] = encode(name, texts)
    source = open_url(server, name, retry_policy=retry_policy)
    server.requests.clear()
    return source


@pytest.mark.slow
@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_rows_are_those_of_a_healthy_server(server, name, ranges):
    source = serve(server, name)
    server.ranges = ranges or name.endswith(".parquet")
    server.faults[f"/{name}"].extend(TRANSIENT_FAULTS)
    start = 123 if ranges else 0
    assert rows_of(source, start_row=start) == TEXTS[start:]
    assert not server.faults[f"/{name}"]  # All have happened.


@pytest.mark.parametrize("fault", TRANSIENT_FAULTS, ids=str)
def test_a_source_opens_despite_transient_faults(server, fault):
    server.files["/a.txt"] = encode("a.txt", TEXTS)
    server.faults["/a.txt"].extend([fault, None, fault])
    assert rows_of(open_url(server, "a.txt")) == TEXTS


@pytest.mark.parametrize("name", NAMES)
def test_a_body_that_is_always_interrupted_continues_from_there(server, name):
    source = serve(server, name, retry_policy=LONG_TIMEOUT)
    server.always[f"/{name}"] = "cut"
    assert rows_of(source) == TEXTS
    if not name.endswith(".parquet"):
        # Each response has half of the rest: no byte is requested twice.
        size = len(server.files[f"/{name}"])
        ranges = [bytes_range for _, _, bytes_range in server.requests if bytes_range]
        starts = [int(bytes_range.removeprefix("bytes=").removesuffix("-")) for bytes_range in ranges]
        left = [size - start for start in starts]
        assert left[0] == size // 2
        assert all(after == before // 2 for before, after in itertools.pairwise(left))


@pytest.mark.parametrize("fault", ["cut, no length", "garbled"])
@pytest.mark.parametrize("name", DECODED_NAMES)
def test_data_that_does_not_decode_is_fetched_again(server, name, fault):
    source = serve(server, name)
    server.faults[f"/{name}"].extend([fault] * (retry._MAX_DECODE_TRIES - 1))
    assert rows_of(source) == TEXTS


@pytest.mark.parametrize("name", DECODED_NAMES)
def test_data_that_can_never_be_decoded_is_an_error_before_the_deadline(server, name):
    source = serve(server, name, retry_policy=LONG_TIMEOUT)
    server.always[f"/{name}"] = "garbled"
    with pytest.raises(ShardUnavailableError, match=f"cannot read '.*/{name}' from row 0 on: .*tried 5 times"):
        rows_of(source)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fault", [500, "reset", "hang"])
def test_after_the_deadline_the_error_names_the_row(server, name, fault):
    timeout = RETRY_POLICY.timeout_seconds if fault == "hang" else SHORT_DEADLINE.timeout_seconds
    source = serve(server, name, retry_policy=dataclasses.replace(SHORT_DEADLINE, timeout_seconds=timeout))
    # Half of the first response arrives, then every request fails.
    server.always[f"/{name}"] = fault
    server.faults[f"/{name}"].extend([None] * 3 if name.endswith(".parquet") else ["cut"])
    found = []

    def read():
        for texts in source.read(0):
            found.extend(texts.to_pylist())

    with pytest.raises(ShardUnavailableError, match=f"cannot read '.*/{name}' from row ") as error:
        read()
    assert f" from row {len(found)} on: " in str(error.value)
    assert "\n" not in str(error.value)
    assert found == TEXTS[: len(found)]
    server.heal()
    assert rows_of(source, start_row=len(found)) == TEXTS[len(found) :]


@pytest.mark.parametrize(
    ("status", "message"), [(404, "not found: "), (410, "not found: "), (403, "403"), (401, "401")]
)
@pytest.mark.parametrize("name", ["a.txt", "a.parquet", "a.jsonl.gz"])
def test_permanent_failures_are_errors_at_once(server, name, status, message):
    source = serve(server, name, retry_policy=LONG_TIMEOUT)
    server.always[f"/{name}"] = status
    for read in (lambda: rows_of(source), lambda: open_url(server, name, retry_policy=LONG_TIMEOUT)):
        server.requests.clear()
        with pytest.raises(UserError, match=f"cannot read '.*/{name}': .*{message}") as error:
            read()
        assert not isinstance(error.value, ShardUnavailableError)
        assert server.count(f"/{name}") == 1


def test_a_permanent_failure_in_the_middle_of_a_file(server):
    source = serve(server, "a.txt", retry_policy=LONG_TIMEOUT)
    server.faults["/a.txt"].extend(["cut", 403])
    with pytest.raises(UserError, match="answers 403"):
        rows_of(source)
    assert server.count("/a.txt") == 2


def test_a_file_that_changes_while_it_is_read_is_an_error(server):
    source = serve(server, "a.txt")
    server.faults["/a.txt"].extend(["cut", "changed"])
    with pytest.raises(UserError, match="changed while it was read"):
        rows_of(source)


def test_parquet_from_a_server_without_range_requests_is_an_error(server):
    server.ranges = False
    with pytest.raises(UserError, match="has no Range support, which parquet needs"):
        serve(server, "a.parquet")


def test_a_host_that_does_not_exist_is_an_error_at_once(server):
    start = time.monotonic()
    for address in ("http://127.0.0.1:9", "http://host.invalid"):
        with pytest.raises(UserError, match="cannot be reached") as error:
            open_source(data_files=f"{address}/a.txt", retry_policy=RETRY_POLICY)
        assert not isinstance(error.value, ShardUnavailableError)
    assert time.monotonic() - start < RETRY_POLICY.deadline_seconds


def test_a_server_that_is_restarted(server):
    source = serve(server, "a.txt")
    server.close()
    restarted = []

    def restart():
        time.sleep(0.3)
        restarted.append(Server(port=server.port, files=server.files))

    thread = threading.Thread(target=restart)
    thread.start()
    try:
        assert rows_of(source) == TEXTS
    finally:
        thread.join()
        restarted[0].close()


@pytest.mark.slow
def test_retry_after_is_respected(server):
    source = serve(server, "a.txt")
    for value in (lambda: "1", lambda: http_date(2.5)):
        server.faults["/a.txt"].append((429, {"Retry-After": value()}))
        start = time.monotonic()
        assert rows_of(source) == TEXTS
        # A date is in whole seconds.
        assert 0.9 < time.monotonic() - start < RETRY_POLICY.deadline_seconds


@pytest.mark.slow
def test_a_retry_after_past_the_deadline_is_retried_at_the_deadline(server):
    source = serve(server, "a.txt", retry_policy=dataclasses.replace(LONG_TIMEOUT, deadline_seconds=0.3))
    server.faults["/a.txt"].append((503, {"Retry-After": "3600"}))
    assert rows_of(source) == TEXTS
    server.always["/a.txt"] = (503, {"Retry-After": "3600"})
    with pytest.raises(ShardUnavailableError, match=r"answers 503 .*\(tried 2 times in 0 s\)"):
        rows_of(source)


def test_waits_double_up_to_a_maximum_and_end_at_the_deadline(monkeypatch):
    now, waits = [1000.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda wait: (waits.append(wait), now.__setitem__(0, now[0] + wait)))
    np.random.seed(0)
    before = np.random.get_state()[1].tolist()
    retries = retry.Retries(RetryPolicy(), "it")

    def fail():
        while True:
            retries.failed("no")

    with pytest.raises(retry.RetriesExhaustedError, match=r"^no \(tried \d+ times in 300 s\)$"):
        fail()
    assert sum(waits) == pytest.approx(300)
    for wait, full in zip(waits[:-1], [1, 2, 4, 8, 16] + [30] * len(waits), strict=False):
        assert full / 2 <= wait <= full
    retries.succeeded()
    waits.clear()
    retries.failed("no", retry_after=70)
    retries.failed("no")
    assert waits[0] == 70
    assert 1 <= waits[1] <= 2
    assert np.random.get_state()[1].tolist() == before
    with pytest.raises(retry.RetriesExhaustedError, match=r"^elsewhere$"):
        retries.failed(retry.RetriesExhaustedError("elsewhere"))
    assert len(waits) == 2


def raised_from(error, cause):
    error.__cause__ = cause
    return error


def response(status):
    request = httpx2.Request("GET", "http://127.0.0.1/")
    return httpx2.Response(status, request=request)


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        (ConnectionResetError("reset"), Failure.TRANSIENT),
        (TimeoutError("late"), Failure.TRANSIENT),
        (httpx2.ReadTimeout("late"), Failure.TRANSIENT),
        (httpx2.RemoteProtocolError("cut"), Failure.TRANSIENT),
        (httpx2.StreamClosed(), Failure.TRANSIENT),
        (aiohttp.ClientPayloadError("cut"), Failure.TRANSIENT),
        (aiohttp.ServerDisconnectedError(), Failure.TRANSIENT),
        (aiohttp.ClientResponseError(None, (), status=503), Failure.TRANSIENT),
        (aiohttp.ClientResponseError(None, (), status=403), Failure.PERMANENT),
        (aiohttp.InvalidURL("nonsense"), Failure.PERMANENT),
        (requests.ConnectionError("reset"), Failure.TRANSIENT),
        (requests.exceptions.ChunkedEncodingError("cut"), Failure.TRANSIENT),
        (fsspec.exceptions.FSTimeoutError(), Failure.TRANSIENT),
        (raised_from(ConnectionError("Server Disconnected"), httpx2.ReadError("reset")), Failure.TRANSIENT),
        (huggingface_hub.errors.HfHubHTTPError("busy", response=response(503)), Failure.TRANSIENT),
        (huggingface_hub.errors.GatedRepoError("ask", response=response(403)), Failure.PERMANENT),
        (huggingface_hub.errors.LocalEntryNotFoundError("offline"), Failure.PERMANENT),
        (
            raised_from(huggingface_hub.errors.LocalEntryNotFoundError("no net"), httpx2.ConnectError("reset")),
            Failure.TRANSIENT,
        ),
        (raised_from(FileNotFoundError("a"), aiohttp.ClientResponseError(None, (), status=404)), Failure.PERMANENT),
        (FileNotFoundError("a"), Failure.PERMANENT),
        (ImportError("s3fs"), Failure.PERMANENT),
        (httpx2.InvalidURL("nonsense"), Failure.PERMANENT),
        (datasets.exceptions.DatasetGenerationError("?"), Failure.DECODE),
        (pa.ArrowInvalid("no magic bytes"), Failure.DECODE),
        (EOFError("ended"), Failure.DECODE),
        (raised_from(OSError("?"), retry.RetriesExhaustedError("busy")), Failure.EXHAUSTED),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_exceptions_of_every_client_are_classified(error, failure):
    assert retry.classify_error(error) is failure
    # So none ends in a traceback: a source that reads with `datasets` adds that package's errors.
    assert isinstance(error, (*_READ_ERRORS, datasets.exceptions.DatasetsError))
