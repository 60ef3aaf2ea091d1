"""Shards that the network stops delivering: what the stream skips, and how such a run resumes."""

import filecmp
import json

import pytest

from mlm.data import stream
from mlm.data.prefetch import Prefetcher
from mlm.data.sources import encoding, files
from mlm.errors import UserError
from mlm.train import train_and_evaluate
from tests.bad_server import RETRY_POLICY, SHORT_DEADLINE, Server, encode, open_url
from tests.letters import Letters
from tests.tiny import settings_of, tiny_config, write_corpus


@pytest.fixture
def server():
    """Serves files without failures, until a test adds some."""
    server = Server()
    yield server
    server.close()


SHARDS = [f"{n}.txt" for n in range(4)]
# Documents short enough for a row of 8 tokens; each names its shard and row.
SHARD_TEXTS = {name: [f"{name[0]}.{row}" for row in range(40)] for name in SHARDS}


def serve_shards(server, *, retry_policy=RETRY_POLICY):
    for name in SHARDS:
        server.files[f"/{name}"] = encode(name, SHARD_TEXTS[name])
    return open_url(server, *SHARDS, retry_policy=retry_policy)


def row_stream(source, **options):
    defaults = {"seed": 1, "max_seq_length": 8, "packing": "pad", "shuffle_buffer_size": 6, "batch_rows": 3}
    return stream.RowStream(source, Letters(), **defaults | {"max_failed_shards": 2} | options)


def take(rows, count):
    return [next(rows).tolist() for _ in range(count)]


def fail_from(server, name, row):
    """Makes the shard unreadable from this row on."""
    server.always[f"/{name}"] = ("stop", len(encode(name, SHARD_TEXTS[name][:row])))


@pytest.fixture
def tiny_reads(monkeypatch):
    """Reads of a few rows each."""
    monkeypatch.setattr(files, "_HTTP_BUFFER_BYTES", 16)
    monkeypatch.setattr(files, "_BLOCK_BYTES", 16)
    monkeypatch.setattr(encoding, "HEAD_BYTES", 16)


def end_of(state, shard):
    """The row from which a shard is skipped; None if it is not."""
    return next((end for number, *_, end in state["slices"] or () if number == shard), None)


@pytest.mark.slow
@pytest.mark.parametrize(("process_count", "readers", "interleave"), [(1, 1, 1), (1, 1, 3), (3, 1, 2), (6, 2, 1)])
def test_a_failed_shard_is_skipped_for_the_rest_of_the_epoch(
    server, tiny_reads, monkeypatch, process_count, readers, interleave
):
    """Resuming from any batch after it gives the same batches, although the network works again."""
    impatient, patient = serve_shards(server, retry_policy=SHORT_DEADLINE), serve_shards(server)
    fail_from(server, "0.txt", 17)
    runs = []
    for index in range(process_count):
        process = {"process_index": index, "process_count": process_count, "batch_rows": 1}
        rows = row_stream(impatient, **process, interleave_shards=interleave)
        batches, used, states = [], [], [rows.state_dict()]
        while True:
            batches.append(next(rows).tolist())
            if rows.epoch:
                break
            used += rows.documents()
            states.append(json.loads(json.dumps(rows.state_dict())))
        runs.append((index, batches[:-1], [(document.shard, document.row) for document in used], states))
    server.heal()
    monkeypatch.setattr(files, "_BLOCK_BYTES", 1000)  # Other arrays, the same rows.
    num_failed = 0
    for index, batches, used, states in runs:
        process = {"process_index": index, "process_count": process_count, "batch_rows": 1}
        process["interleave_shards"] = interleave
        end = end_of(states[-1], 0)
        num_failed += end is not None
        assert end is None or 10 < end <= 17
        assignment = row_stream(patient, **process).assignment()
        mine = [(part.shard, row) for part in assignment for row in range(part.offset, 40, part.stride)]
        assert sorted(used) == sorted((shard, row) for shard, row in mine if end is None or shard or row < end)
        for n in range(len(states) - 1, -1, -7):
            if end_of(states[n], 0) == end:
                resumed = row_stream(patient, **process)
                resumed.restore([states[n]] * process_count)
                assert take(resumed, len(batches) - n) == batches[n:]
                assert resumed.counters["failed_shards"] == (end is not None)
    assert num_failed == readers


@pytest.mark.parametrize("interleave", [1, 4])
def test_the_next_epoch_reads_the_complete_shard(server, tiny_reads, interleave):
    source = serve_shards(server, retry_policy=SHORT_DEADLINE)
    rows = row_stream(source, batch_rows=1, interleave_shards=interleave)
    fail_from(server, "0.txt", 17)
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


@pytest.mark.parametrize("interleave", [1, 2])
def test_skipped_rows_stay_skipped_on_another_number_of_processes(server, tiny_reads, interleave):
    """All other documents are used exactly once."""
    options = {"batch_rows": 1, "interleave_shards": interleave}
    impatient, patient = serve_shards(server, retry_policy=SHORT_DEADLINE), serve_shards(server)
    broken = row_stream(patient, process_index=0, process_count=2).assignment()[0].shard
    fail_from(server, SHARDS[broken], 17)
    used, states, ends = [], [], []
    for index in range(2):
        rows = row_stream(impatient, process_index=index, process_count=2, **options)
        for _ in range(30):
            next(rows)
            used += rows.documents()
        states.append(json.loads(json.dumps(rows.state_dict())))
        ends.append(end_of(states[-1], broken))
    server.heal()
    [end] = [end for end in ends if end is not None]
    for index in range(3):
        rows = row_stream(patient, process_index=index, process_count=3, **options)
        rows.restore(states)
        while True:
            next(rows)
            if rows.epoch:
                break
            used += rows.documents()
    locations = [(document.shard, document.row) for document in used if document.epoch == 0]
    expected = {(shard, row) for shard in range(4) for row in range(40) if shard != broken or row < end}
    assert sorted(locations) == sorted(expected)


@pytest.mark.parametrize("interleave", [1, 4])
def test_a_partly_used_window_must_be_read_completely_on_resuming(server, tiny_reads, interleave):
    source = serve_shards(server, retry_policy=SHORT_DEADLINE)
    rows = row_stream(source, interleave_shards=interleave)
    next(rows)
    state = rows.state_dict()
    for name in SHARDS:
        server.always[f"/{name}"] = 503
    resumed = row_stream(source, interleave_shards=interleave)
    resumed.restore([state])
    with pytest.raises(UserError, match=r"^cannot resume the data stream: cannot read '.*txt' from row 0 on: .* 503"):
        next(resumed)
    server.heal()
    resumed = row_stream(source, interleave_shards=interleave)
    resumed.restore([state])
    assert take(resumed, 30) == take(rows, 30)


def test_with_too_many_failed_shards_the_stream_ends_after_its_batches(server, tiny_reads):
    healthy = take(row_stream(serve_shards(server)), 40)
    source = serve_shards(server, retry_policy=SHORT_DEADLINE)
    for name in ("0.txt", "3.txt"):
        fail_from(server, name, 17)
    with Prefetcher(row_stream(source, max_failed_shards=1), depth=2) as batches:
        found = []

        def run():
            for batch in batches:
                found.append(batch)

        with pytest.raises(
            UserError, match=r"^cannot read '.*[03].txt' from row .*data.max_failed_shards=1\)$"
        ) as error:
            run()
    assert "\n" not in str(error.value)
    assert found[-1].counters["failed_shards"] == 1
    first_failure = next(n for n, batch in enumerate(found) if batch.counters["failed_shards"])
    assert [batch.tokens.tolist() for batch in found[:first_failure]] == healthy[:first_failure]


@pytest.mark.parametrize(("count", "interleave"), [(1, 1), (4, 1), (4, 4)])
def test_a_server_that_stops_answering_ends_the_stream(server, tiny_reads, count, interleave):
    serve_shards(server)
    names = SHARDS[:count]
    source = open_url(server, *names, retry_policy=SHORT_DEADLINE)
    rows = row_stream(source, max_failed_shards=5, interleave_shards=interleave)
    next(rows)
    for name in names:
        server.always[f"/{name}"] = 500

    def run():
        while True:
            next(rows)

    with pytest.raises(UserError, match=r"failed shard 6, data.max_failed_shards=5"):
        run()


@pytest.mark.slow
def test_a_run_stopped_by_the_network_resumes_bitwise_identical(server, tmp_path):
    (tmp_path / "corpus").mkdir()
    write_corpus(tmp_path / "corpus", documents=150)
    names = [f"part-{n}.jsonl" for n in range(3)]
    for name in names:
        server.files[f"/{name}"] = (tmp_path / "corpus" / name).read_bytes()
    config = tiny_config([f"{server.url}/{name}" for name in names])
    config.save_steps = 2
    config.data.prefetch_batches = 1
    config.data.network_deadline_seconds = 0.2
    config.data.max_failed_shards = 0
    config.num_train_steps = 12
    config.logging_steps = config.eval_steps = 12
    train_and_evaluate(settings_of(config), str(tmp_path / "straight"))
    # A shard is one request. The last two are for batches of the second epoch.
    server.limit = len(server.requests) - 2
    server.requests.clear()
    with pytest.raises(UserError, match=r"cannot read '.*jsonl' from row .*data.max_failed_shards=0"):
        train_and_evaluate(settings_of(config), str(tmp_path / "stopped"))
    saved = {path.name for path in (tmp_path / "stopped" / "checkpoints").iterdir()}
    assert saved & {"4", "6", "8", "10"}
    server.limit = None
    train_and_evaluate(settings_of(config), str(tmp_path / "stopped"))
    for name in ("model.safetensors", "trainer_state.json"):
        assert filecmp.cmp(tmp_path / "straight" / "model" / name, tmp_path / "stopped" / "model" / name, shallow=False)
