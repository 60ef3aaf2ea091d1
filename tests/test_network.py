"""A bad network, over real sockets: the rows are those of a healthy server, once each, or the user is told."""

import bz2
import dataclasses
import gzip
import io
import json
import lzma
import os
import subprocess
import sys
import threading
import time

import aiohttp
import datasets
import fsspec.exceptions
import httpx2
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
import requests
import zstandard

from mlm.data import files, network, sources, stream
from mlm.data.network import Failure, Patience
from mlm.data.prefetch import Prefetcher
from mlm.errors import UserError
from tests.bad_server import COMMIT, Server, http_date

# Long enough for a busy machine, where nothing is really wrong; the server is silent for 0.5 s.
PATIENCE = Patience(deadline_seconds=30.0, timeout_seconds=0.2, first_wait_seconds=0.001, max_wait_seconds=0.01)
# For what is wrong for good; what is well may take its time.
IMPATIENCE = dataclasses.replace(PATIENCE, deadline_seconds=0.05, timeout_seconds=5.0)
# Random letters, so that compressed files are large, too.
TEXTS = [
    f"{n} " + "".join(map(chr, letters))
    for n, letters in enumerate(np.random.default_rng(0).integers(97, 123, (400, 200)))
]
COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard.compress}
KINDS = ["a.jsonl", "a.txt", "a.csv", "a.parquet", "a.jsonl.gz", "a.txt.zst", "a.csv.xz", "a.txt.bz2"]
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
# What no length tells, but a decoder.
DECODED = ["a.jsonl.gz", "a.txt.zst", "a.csv.xz", "a.txt.bz2", "a.parquet"]


@pytest.fixture
def server():
    """Behaves well until told otherwise."""
    server = Server()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def small_reads(monkeypatch):
    """Files of this size take many."""
    monkeypatch.setattr(files, "_NETWORK_BYTES", 3000)
    monkeypatch.setattr(files, "_BLOCK_BYTES", 7000)


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


def open_url(server, *names, patience=PATIENCE):
    return sources.open_source(
        dataset_name=None, data_files=[f"{server.url}/{name}" for name in names], patience=patience
    )


def rows_of(source, shard=0, start_row=0):
    return [text for texts in source.read(shard, start_row=start_row) for text in texts.to_pylist()]


def serve(server, name, texts=TEXTS, patience=PATIENCE):
    """The source of one file."""
    server.files[f"/{name}"] = encode(name, texts)
    source = open_url(server, name, patience=patience)
    server.requests.clear()
    return source


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("name", KINDS)
def test_rows_are_those_of_a_healthy_server(server, name, ranges):
    source = serve(server, name)
    server.ranges = ranges or name.endswith(".parquet")
    server.faults[f"/{name}"].extend(TRANSIENT)
    start = 123 if ranges else 0
    assert rows_of(source, start_row=start) == TEXTS[start:]
    assert not server.faults[f"/{name}"]  # all of them were met


@pytest.mark.parametrize("fault", TRANSIENT, ids=str)
def test_a_start_goes_through_every_failure(server, fault):
    server.files["/a.txt"] = encode("a.txt", TEXTS)
    server.faults["/a.txt"].extend([fault, None, fault])
    assert rows_of(open_url(server, "a.txt")) == TEXTS


@pytest.mark.parametrize("name", KINDS)
def test_a_body_that_always_breaks_off_is_read_on_from_there(server, name):
    source = serve(server, name)
    server.always[f"/{name}"] = "cut"
    assert rows_of(source) == TEXTS
    if not name.endswith(".parquet"):
        # Halves of what was left: no byte is asked for twice.
        size = len(server.files[f"/{name}"])
        starts = [int(wanted.removeprefix("bytes=").removesuffix("-")) for _, _, wanted in server.requests if wanted]
        left = [size - start for start in starts]
        assert left[0] == size // 2
        assert all(after == before // 2 for before, after in zip(left, left[1:], strict=False))


@pytest.mark.parametrize("fault", ["cut unsaid", "garbled"])
@pytest.mark.parametrize("name", DECODED)
def test_what_does_not_decode_is_fetched_again(server, name, fault):
    source = serve(server, name)
    server.faults[f"/{name}"].extend([fault] * (network._UNREADABLE_TRIES - 1))
    assert rows_of(source) == TEXTS


@pytest.mark.parametrize("name", DECODED)
def test_what_never_decodes_is_given_up_before_the_deadline(server, name):
    source = serve(server, name)
    server.always[f"/{name}"] = "garbled"
    with pytest.raises(sources.ShardLostError, match=f"cannot read '.*/{name}' from row 0 on: .*tried 5 times"):
        rows_of(source)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("fault", [500, "reset", "hang"])
def test_past_the_deadline_the_shard_is_lost_with_its_row(server, name, fault):
    timeout = PATIENCE.timeout_seconds if fault == "hang" else IMPATIENCE.timeout_seconds
    source = serve(server, name, patience=dataclasses.replace(IMPATIENCE, timeout_seconds=timeout))
    # The first answer ends halfway, then nothing comes any more.
    server.always[f"/{name}"] = fault
    server.faults[f"/{name}"].extend([None] * 3 if name.endswith(".parquet") else ["cut"])
    found = []

    def read():
        for texts in source.read(0):
            found.extend(texts.to_pylist())

    with pytest.raises(sources.ShardLostError, match=f"cannot read '.*/{name}' from row ") as error:
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
def test_refusals_are_told_at_once(server, name, status, message):
    source = serve(server, name)
    server.always[f"/{name}"] = status
    for read in (lambda: rows_of(source), lambda: open_url(server, name)):
        server.requests.clear()
        with pytest.raises(UserError, match=f"cannot read '.*/{name}': .*{message}") as error:
            read()
        assert not isinstance(error.value, sources.ShardLostError)
        assert server.count(f"/{name}") == 1


def test_a_refusal_halfway(server):
    source = serve(server, "a.txt")
    server.faults["/a.txt"].extend(["cut", 403])
    with pytest.raises(UserError, match="answers 403"):
        rows_of(source)
    assert server.count("/a.txt") == 2


def test_a_file_that_changes_while_it_is_read(server):
    source = serve(server, "a.txt")
    server.faults["/a.txt"].extend(["cut", "changed"])
    with pytest.raises(UserError, match="changed while it was read"):
        rows_of(source)


def test_parquet_from_a_server_without_ranges_is_told(server):
    server.ranges = False
    with pytest.raises(UserError, match="does not serve parts of files, which parquet needs"):
        serve(server, "a.parquet")


def test_a_host_that_does_not_exist_is_told_at_once(server):
    start = time.monotonic()
    for address in ("http://127.0.0.1:9", "http://host.invalid"):
        with pytest.raises(UserError, match="cannot be reached") as error:
            sources.open_source(dataset_name=None, data_files=f"{address}/a.txt", patience=PATIENCE)
        assert not isinstance(error.value, sources.ShardLostError)
    assert time.monotonic() - start < PATIENCE.deadline_seconds


def test_a_host_that_goes_away_and_comes_back(server):
    source = serve(server, "a.txt")
    server.close()
    again = []

    def come_back():
        time.sleep(0.3)
        again.append(Server(port=server.port))
        again[0].files |= server.files

    thread = threading.Thread(target=come_back)
    thread.start()
    try:
        assert rows_of(source) == TEXTS
    finally:
        thread.join()
        again[0].close()


def test_retry_after_is_waited_for(server):
    source = serve(server, "a.txt")
    for value in (lambda: "1", lambda: http_date(2.5)):
        server.faults["/a.txt"].append((429, {"Retry-After": value()}))
        start = time.monotonic()
        assert rows_of(source) == TEXTS
        # A date is in whole seconds.
        assert 0.9 < time.monotonic() - start < PATIENCE.deadline_seconds


def test_retry_after_past_the_deadline_is_tried_at_the_deadline(server):
    source = serve(server, "a.txt", patience=dataclasses.replace(PATIENCE, deadline_seconds=0.3))
    server.faults["/a.txt"].append((503, {"Retry-After": "3600"}))
    assert rows_of(source) == TEXTS
    server.always["/a.txt"] = (503, {"Retry-After": "3600"})
    with pytest.raises(sources.ShardLostError, match=r"answers 503 .*\(tried 2 times in 0 s\)"):
        rows_of(source)


def test_waits_grow_up_to_the_deadline(monkeypatch):
    now, waits = [1000.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda wait: (waits.append(wait), now.__setitem__(0, now[0] + wait)))
    np.random.seed(0)
    before = np.random.get_state()[1].tolist()
    retries = network.Retries(Patience(), "it")

    def fail():
        while True:
            retries.failed("no")

    with pytest.raises(network.GaveUpError, match=r"^no \(tried \d+ times in 300 s\)$"):
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


def raised_from(error, cause):
    error.__cause__ = cause
    return error


def answered(status):
    request = httpx2.Request("GET", "http://127.0.0.1/")
    return httpx2.Response(status, request=request)


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        (ConnectionResetError("reset"), Failure.BROKEN),
        (TimeoutError("late"), Failure.BROKEN),
        (httpx2.ReadTimeout("late"), Failure.BROKEN),
        (httpx2.RemoteProtocolError("cut"), Failure.BROKEN),
        (httpx2.StreamClosed(), Failure.BROKEN),
        (aiohttp.ClientPayloadError("cut"), Failure.BROKEN),
        (aiohttp.ServerDisconnectedError(), Failure.BROKEN),
        (aiohttp.ClientResponseError(None, (), status=503), Failure.BROKEN),
        (aiohttp.ClientResponseError(None, (), status=403), Failure.FINAL),
        (aiohttp.InvalidURL("nonsense"), Failure.FINAL),
        (requests.ConnectionError("reset"), Failure.BROKEN),
        (requests.exceptions.ChunkedEncodingError("cut"), Failure.BROKEN),
        (fsspec.exceptions.FSTimeoutError(), Failure.BROKEN),
        (raised_from(ConnectionError("Server Disconnected"), httpx2.ReadError("reset")), Failure.BROKEN),
        (huggingface_hub.errors.HfHubHTTPError("busy", response=answered(503)), Failure.BROKEN),
        (huggingface_hub.errors.GatedRepoError("ask", response=answered(403)), Failure.FINAL),
        (huggingface_hub.errors.LocalEntryNotFoundError("offline"), Failure.FINAL),
        (
            raised_from(huggingface_hub.errors.LocalEntryNotFoundError("no net"), httpx2.ConnectError("reset")),
            Failure.BROKEN,
        ),
        (raised_from(FileNotFoundError("a"), aiohttp.ClientResponseError(None, (), status=404)), Failure.FINAL),
        (FileNotFoundError("a"), Failure.FINAL),
        (ImportError("s3fs"), Failure.FINAL),
        (httpx2.InvalidURL("nonsense"), Failure.FINAL),
        (datasets.exceptions.DatasetGenerationError("?"), Failure.UNREADABLE),
        (pa.ArrowInvalid("no magic bytes"), Failure.UNREADABLE),
        (EOFError("ended"), Failure.UNREADABLE),
        (raised_from(OSError("?"), network.GaveUpError("busy")), Failure.GAVE_UP),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_exceptions_of_every_client_are_told_apart(error, failure):
    assert network.failure_of(error) is failure
    assert isinstance(error, sources._READ_ERRORS)  # so that none becomes a traceback


class Letters:
    """A letter is its code point."""

    bos_id, eos_id, pad_id = 1, 2, 0

    def encode(self, texts):
        words = texts.to_pylist()
        offsets = np.cumsum([0] + [len(word) for word in words]).astype(np.int64)
        return np.array([ord(letter) for word in words for letter in word], np.int32), offsets


SHARDS = [f"{n}.txt" for n in range(4)]
# Short documents, so that a row of 8 holds one, and every one of them tells its shard and row.
SHARD_TEXTS = {name: [f"{name[0]}.{row}" for row in range(40)] for name in SHARDS}


def serve_shards(server, *, patience=PATIENCE):
    for name in SHARDS:
        server.files[f"/{name}"] = encode(name, SHARD_TEXTS[name])
    return open_url(server, *SHARDS, patience=patience)


def row_stream(source, **options):
    defaults = {"seed": 1, "max_seq_length": 8, "packing": "pad", "shuffle_buffer_size": 6, "batch_rows": 3}
    return stream.RowStream(source, Letters(), **defaults | {"max_failed_shards": 2} | options)


def take(rows, count):
    return [next(rows).tolist() for _ in range(count)]


def documents(batches):
    return ["".join(chr(token) for token in row if token > 2) for batch in batches for row in batch]


def first_epoch(rows):
    """Its documents and the states after each batch; the last batch reaches into the second epoch."""
    states, batches = [rows.state_dict()], []
    while rows.epoch == 0:
        batches.append(next(rows).tolist())
        states.append(json.loads(json.dumps(rows.state_dict())))
    return batches, states


def break_off(server, name, row):
    """From this row on the shard does not come any more."""
    server.always[f"/{name}"] = ("stop", len(encode(name, SHARD_TEXTS[name][:row])))


@pytest.fixture
def tiny_reads(monkeypatch):
    """A few rows each."""
    monkeypatch.setattr(files, "_NETWORK_BYTES", 16)
    monkeypatch.setattr(files, "_BLOCK_BYTES", 16)


def end_of(state, shard):
    """The row from which a shard was set aside, None where it was not."""
    return next((end for number, *_, end in state["pieces"] or () if number == shard), None)


@pytest.mark.parametrize(("process_count", "readers"), [(1, 1), (3, 1), (6, 2)])
def test_a_failed_shard_is_set_aside_for_the_rest_of_the_epoch(server, tiny_reads, process_count, readers):
    """A resume from any batch after that gives the same batches, though the network is well by then."""
    impatient, patient = serve_shards(server, patience=IMPATIENCE), serve_shards(server)
    healthy, found = [], []
    break_off(server, "0.txt", 17)
    for index in range(process_count):
        place = {"process_index": index, "process_count": process_count}
        batches, states = first_epoch(row_stream(impatient, **place))
        ends = {end_of(state, 0) for state in states if state["epoch"] == 0} - {None}
        assert len(ends) <= 1
        found.append((place, batches, states, ends.pop() if ends else None))
    server.heal()
    ends = [end for *_, end in found]
    assert sum(end is not None for end in ends) == readers
    for place, batches, states, end in found:
        healthy = documents(first_epoch(row_stream(patient, **place))[0][:-1])
        lost = [] if end is None else [f"0.{row}" for row in range(end, 40)]
        expected = [text for text in healthy if text not in lost]
        assert end is None or 10 < end <= 17
        # The last batch of the epoch holds documents of the next.
        assert set(documents(batches[:-1])) <= set(expected)
        assert len(documents(batches[:-1])) == len(set(documents(batches[:-1])))
        assert len(expected) - len(documents(batches[:-1])) < 3
        for n, state in enumerate(states[:-1]):
            if (end_of(state, 0) is not None) == (end is not None):
                resumed = row_stream(patient, **place)
                resumed.load_state_dict(state)
                assert take(resumed, len(batches) - n - 1) == batches[n:-1]
                assert resumed.counters["failed_shards"] == (end is not None)


def test_the_next_epoch_reads_it_whole(server, tiny_reads):
    rows = row_stream(serve_shards(server, patience=IMPATIENCE), batch_rows=1)
    break_off(server, "0.txt", 17)
    seen = {0: [], 1: []}
    while rows.epoch < 2:
        [used] = (next(rows), rows.documents())[1]
        seen.setdefault(used.epoch, []).append((used.shard, used.row))
        if rows.counters["failed_shards"]:
            server.heal()
    everything = {(shard, row) for shard in range(4) for row in range(40)}
    assert {shard for shard, _ in everything - set(seen[0])} == {0}
    assert sorted(seen[1]) == sorted(everything)
    assert rows.counters["failed_shards"] == 1


def test_a_restart_on_another_number_of_processes(server, tiny_reads):
    """What was set aside stays so; of all else nothing is lost and nothing comes twice."""
    impatient, patient = serve_shards(server, patience=IMPATIENCE), serve_shards(server)
    break_off(server, "0.txt", 17)
    used, states, ends = [], [], []
    for index in range(2):
        rows = row_stream(impatient, process_index=index, process_count=2, batch_rows=1)
        # Past the loss in one of the two.
        for _ in range(60):
            next(rows)
            used += rows.documents()
        states.append(json.loads(json.dumps(rows.state_dict())))
        ends.append(end_of(states[-1], 0))
    server.heal()
    [end] = [end for end in ends if end is not None]
    for index in range(3):
        rows = row_stream(patient, process_index=index, process_count=3, batch_rows=1)
        rows.restore(states)
        while True:
            next(rows)
            if rows.epoch:
                break
            used += rows.documents()
    places = [(document.shard, document.row) for document in used if document.epoch == 0]
    kept = {(shard, row) for shard in range(4) for row in range(40) if shard or row < end}
    assert sorted(places) == sorted(kept)


def test_a_window_that_was_begun_must_come_whole(server, tiny_reads):
    source = serve_shards(server, patience=IMPATIENCE)
    rows = row_stream(source)
    next(rows)
    state = rows.state_dict()
    for name in SHARDS:
        server.always[f"/{name}"] = 503
    resumed = row_stream(source)
    resumed.load_state_dict(state)
    with pytest.raises(UserError, match=r"^cannot resume the data stream: cannot read '.*txt' from row 0 on: .* 503"):
        next(resumed)
    server.heal()
    resumed = row_stream(source)
    resumed.load_state_dict(state)
    assert take(resumed, 30) == take(rows, 30)


def test_past_the_budget_the_stream_ends_after_its_batches(server, tiny_reads):
    healthy, _ = first_epoch(row_stream(serve_shards(server)))
    source = serve_shards(server, patience=IMPATIENCE)
    for name in ("0.txt", "3.txt"):
        break_off(server, name, 17)
    with Prefetcher(row_stream(source, max_failed_shards=1), depth=2) as batches:
        found = []

        def run():
            for batch in batches:
                found.append(batch)

        with pytest.raises(
            UserError, match=r"^cannot read '.*[03].txt' from row .*data.max_failed_shards=1: .*"
        ) as error:
            run()
    assert "\n" not in str(error.value)
    assert found[-1].counters["failed_shards"] == 1
    first_loss = next(n for n, batch in enumerate(found) if batch.counters["failed_shards"])
    assert [batch.tokens.tolist() for batch in found[:first_loss]] == healthy[:first_loss]


@pytest.mark.parametrize("count", [1, 4])
def test_a_server_that_is_gone_ends_the_stream(server, tiny_reads, count):
    serve_shards(server)
    names = SHARDS[:count]
    source = open_url(server, *names, patience=IMPATIENCE)
    rows = row_stream(source, max_failed_shards=5)
    next(rows)
    for name in names:
        server.always[f"/{name}"] = 500

    def run():
        while True:
            next(rows)

    with pytest.raises(UserError, match=r"number 6 of the shards to fail and data.max_failed_shards=5"):
        run()


HUB_WORKER = """
import json, sys
from mlm.data import network, sources
from mlm.errors import UserError
source = None
for line in sys.stdin:
    task = json.loads(line)
    try:
        if "open" in task:
            patience = network.Patience(*task["patience"])
            source = sources.open_source(dataset_name=task["open"], cache_dir=task["cache"], patience=patience)
        shards = range(source.num_shards)
        rows = [[t for texts in source.read(n, start_row=task["row"]) for t in texts.to_pylist()] for n in shards]
        answer = {"rows": rows}
    except UserError as error:
        answer = {"error": str(error), "kind": type(error).__name__}
    print(json.dumps(answer), flush=True)
"""


class Hub:
    """A server that is a hub, and a process that reads from it: HF_ENDPOINT is read when libraries are imported."""

    def __init__(self, folder):
        self.server = Server()
        self._folder = folder
        self._opened = 0
        env = os.environ | {"HF_ENDPOINT": self.server.url, "HF_HOME": str(folder), "HF_HUB_OFFLINE": "0"}
        env |= {"HF_DATASETS_OFFLINE": "0", "HF_UPDATE_DOWNLOAD_COUNTS": "0"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", HUB_WORKER], env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def add(self, repository, contents):
        """A data set of files."""
        for name, data in contents.items():
            self.server.files[f"/{repository}/{name}"] = data
        self.server.hub[repository] = list(contents)

    def ask(self, repository="", *, row=0, patience=PATIENCE):
        """All rows from `row` on, by shard, of what is opened now or was before; or the error."""
        task = {"row": row}
        if repository:
            self._opened += 1
            cache = str(self._folder / f"cache{self._opened}")
            task |= {"open": repository, "cache": cache, "patience": dataclasses.astuple(patience)}
        self._process.stdin.write(json.dumps(task) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self):
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self.server.close()


HUB_TEXTS = TEXTS[:50]


@pytest.fixture(scope="module")
def shared_hub(tmp_path_factory):
    hub = Hub(tmp_path_factory.mktemp("hub"))
    for kind in (".parquet", ".jsonl", ".jsonl.gz", ".csv", ".txt"):
        contents = {f"{n}{kind}": encode(f"{n}{kind}", [f"{n} {text}" for text in HUB_TEXTS]) for n in range(2)}
        hub.add(f"owner/set{kind}", contents)
    yield hub
    hub.close()


@pytest.fixture
def hub(shared_hub):
    """In good health."""
    shared_hub.server.heal()
    return shared_hub


def hub_rows(row=0):
    return {"rows": [[f"{n} {text}" for text in HUB_TEXTS[row:]] for n in range(2)]}


def resolved(repository, name):
    return f"/datasets/{repository}/resolve/{COMMIT}/{name}"


@pytest.mark.parametrize("kind", [".parquet", ".jsonl", ".jsonl.gz", ".csv", ".txt"])
def test_rows_of_a_hub_data_set_are_those_of_a_healthy_server(hub, kind):
    repository = f"owner/set{kind}"
    assert hub.ask(repository) == hub_rows()
    for row in (0, 21):
        for n in range(2):
            hub.server.faults[resolved(repository, f"{n}{kind}")].extend(TRANSIENT)
        assert hub.ask(row=row) == hub_rows(row)
        assert not any(hub.server.faults.values())


def test_a_hub_data_set_opens_through_every_failure(hub):
    """Also where `datasets` would take what fails for what is not there."""
    repository = "owner/configured"
    contents = {f"{n}.jsonl": encode("a.jsonl", [f"{n} {text}" for text in HUB_TEXTS]) for n in range(3)}
    # Without it there are three shards.
    readme = "---\nconfigs:\n- config_name: default\n  data_files: [0.jsonl, 1.jsonl]\n---\n"
    hub.add(repository, contents | {"README.md": readme.encode()})
    assert hub.ask(repository) == hub_rows()
    asked = {path for _, path, _ in hub.server.requests if path.startswith(("/api/datasets", "/datasets/"))}
    assert len(asked) > 5
    for path in sorted(asked):
        hub.server.faults[path].extend([500, "reset", (429, {"Retry-After": "0"}), "cut"])
    assert hub.ask(repository) == hub_rows()
    assert not any(hub.server.faults[path] for path in asked if "/resolve/" in path and ".jsonl" in path)


def test_past_the_deadline_a_shard_of_a_hub_data_set_is_lost(hub):
    for kind in (".parquet", ".jsonl"):
        repository = f"owner/set{kind}"
        assert hub.ask(repository, patience=IMPATIENCE) == hub_rows()
        for fault in (500, "reset", "cut", (429, {"Retry-After": "3600"})):
            hub.server.heal()
            hub.server.always[resolved(repository, f"1{kind}")] = fault
            answer = hub.ask()
            assert answer["kind"] == "ShardLostError"
            assert answer["error"].startswith(f"cannot read '{repository}' (shard 1 of 2) from row 0 on: ")
            assert "\n" not in answer["error"]


def test_refusals_of_the_hub_are_told_at_once(hub):
    repository = "owner/set.parquet"
    assert hub.ask(repository) == hub_rows()
    for status in (403, 404):
        hub.server.heal()
        path = resolved(repository, "0.parquet")
        hub.server.always[path] = status
        answer = hub.ask()
        assert answer["kind"] == "UserError"
        assert answer["error"].startswith(f"cannot read '{repository}' (shard 0 of 2): ")
        assert hub.server.count(path) == 1
    answer = hub.ask("owner/none")
    assert answer["kind"] == "UserError"
    assert answer["error"].startswith("cannot open the data set 'owner/none': ")


def test_a_hub_that_stays_ill_is_told_at_the_start(hub):
    hub.server.always["/api/datasets/owner/set.parquet"] = 503
    answer = hub.ask("owner/set.parquet", patience=IMPATIENCE)
    assert answer["kind"] == "UserError"
    assert answer["error"].startswith("cannot open the data set 'owner/set.parquet': ")
    assert "503" in answer["error"]
    assert "\n" not in answer["error"]
