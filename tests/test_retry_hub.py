"""A failing Hugging Face hub: the rows are those of a healthy one, once each, or there is an error."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest

from tests.bad_server import COMMIT, LONG_TIMEOUT, RETRY_POLICY, SHORT_DEADLINE, TEXTS, TRANSIENT_FAULTS, Server, encode

# Each starts a process.
pytestmark = pytest.mark.slow

HUB_WORKER = """
import json, sys
from mlm.data.sources import retry
from mlm.data.sources.source import open_source
from mlm.errors import UserError
source = None
for line in sys.stdin:
    task = json.loads(line)
    try:
        if "open" in task:
            retry_policy = retry.RetryPolicy(*task["retry_policy"])
            source = open_source(dataset_name=task["open"], cache_dir=task["cache"], retry_policy=retry_policy)
        shards = range(source.num_shards)
        rows = [[t for texts in source.read(n, start_row=task["row"]) for t in texts.to_pylist()] for n in shards]
        answer = {"rows": rows}
    except UserError as error:
        answer = {"error": str(error), "kind": type(error).__name__}
    print(json.dumps(answer), flush=True)
"""


class Hub:
    """A hub server and a process that reads from it, because HF_ENDPOINT is read when the libraries are imported."""

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
        """Adds a dataset with these files."""
        for name, data in contents.items():
            self.server.files[f"/{repository}/{name}"] = data
        self.server.hub[repository] = list(contents)

    def ask(self, repository="", *, row=0, retry_policy=RETRY_POLICY):
        """Returns all rows from `row` on, by shard, or the error.

        An empty `repository` reads the dataset that the last call opened.
        """
        task = {"row": row}
        if repository:
            self._opened += 1
            cache = str(self._folder / f"cache{self._opened}")
            task |= {"open": repository, "cache": cache, "retry_policy": dataclasses.astuple(retry_policy)}
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
    """The hub without faults."""
    shared_hub.server.heal()
    return shared_hub


def hub_rows(row=0):
    return {"rows": [[f"{n} {text}" for text in HUB_TEXTS[row:]] for n in range(2)]}


def resolved(repository, name):
    return f"/datasets/{repository}/resolve/{COMMIT}/{name}"


@pytest.mark.parametrize("kind", [".parquet", ".jsonl", ".jsonl.gz", ".csv", ".txt"])
def test_rows_of_a_hub_dataset_are_those_of_a_healthy_server(hub, kind):
    repository = f"owner/set{kind}"
    assert hub.ask(repository) == hub_rows()
    for n in range(2):
        hub.server.faults[resolved(repository, f"{n}{kind}")].extend(TRANSIENT_FAULTS)
    assert hub.ask(row=21) == hub_rows(21)
    assert not any(hub.server.faults.values())


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
def test_json_of_the_hub_may_change_its_columns(hub, compression):
    """`datasets` casts the rows of all files to the columns that it finds first."""
    cases = {
        # Another column is null first and a string later; a struct gains a field; a list is empty first.
        "null": [{"text": "a", "x": None}, {"text": "b", "x": "s"}],
        "struct": [{"text": "a", "x": {"y": 1}}, {"text": "b", "x": {"y": 1, "z": 2}}],
        "list": [{"text": "a", "x": []}, {"text": "b", "x": ["s"]}],
        # One value of the text column is a number.
        "number": [{"text": '"A quoted sentence."'}, {"text": 42}, {"text": "42"}],
    }
    for name, rows in cases.items():
        files = {
            f"{n}.jsonl{compression}": encode(f"{n}.txt{compression}", list(map(json.dumps, part)))
            for n, part in enumerate([rows[:-1], rows])
        }
        hub.add(f"owner/{name}{compression}", files)
        texts = [row["text"] if isinstance(row["text"], str) else None for row in rows]
        assert hub.ask(f"owner/{name}{compression}") == {"rows": [texts[:-1], texts]}
        assert hub.ask(row=1) == {"rows": [texts[1:-1], texts[1:]]}


def test_a_hub_dataset_opens_despite_transient_faults(hub):
    """`datasets` alone would treat a file that fails once as missing."""
    repository = "owner/configured"
    contents = {f"{n}.jsonl": encode("a.jsonl", [f"{n} {text}" for text in HUB_TEXTS]) for n in range(3)}
    # Without the README there would be three shards.
    readme = "---\nconfigs:\n- config_name: default\n  data_files: [0.jsonl, 1.jsonl]\n---\n"
    hub.add(repository, contents | {"README.md": readme.encode()})
    assert hub.ask(repository) == hub_rows()
    requested = {path for _, path, _ in hub.server.requests if path.startswith(("/api/datasets", "/datasets/"))}
    assert len(requested) > 5
    for path in sorted(requested):
        hub.server.faults[path].extend([500, "reset", (429, {"Retry-After": "0"}), "cut"])
    assert hub.ask(repository) == hub_rows()
    assert not any(hub.server.faults[path] for path in requested if "/resolve/" in path and ".jsonl" in path)


def test_after_the_deadline_a_shard_of_a_hub_dataset_is_unavailable(hub):
    faults = [500, "reset", (429, {"Retry-After": "3600"})]
    for kind, name, more in (
        (".parquet", "'owner/set.parquet' (shard 1 of 2)", ["cut"]),
        # A stream that is cut continues at the byte.
        (".jsonl", "'hf://datasets/owner/set.jsonl/1.jsonl'", []),
    ):
        repository = f"owner/set{kind}"
        assert hub.ask(repository, retry_policy=SHORT_DEADLINE) == hub_rows()
        for fault in faults + more:
            hub.server.heal()
            hub.server.always[resolved(repository, f"1{kind}")] = fault
            answer = hub.ask()
            assert answer["kind"] == "ShardUnavailableError"
            assert answer["error"].startswith(f"cannot read {name} from row 0 on: ")
            assert "\n" not in answer["error"]


def test_permanent_failures_of_the_hub_are_errors_at_once(hub):
    repository = "owner/set.parquet"
    assert hub.ask(repository, retry_policy=LONG_TIMEOUT) == hub_rows()
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
    assert answer["error"].startswith("data.dataset_name='owner/none': cannot be opened (")


def test_a_hub_that_resets_the_first_request_gets_it_again(hub):
    hub.server.faults["/"].append("reset")
    assert hub.ask("owner/set.parquet") == hub_rows()
    hub.server.always["/"] = "reset"
    answer = hub.ask("owner/set.parquet")
    assert answer["error"].startswith("data.dataset_name='owner/set.parquet': is not a local directory, and http")


def test_a_hub_that_always_fails_is_an_error_when_the_dataset_is_opened(hub):
    hub.server.always["/api/datasets/owner/set.parquet"] = 503
    answer = hub.ask("owner/set.parquet", retry_policy=SHORT_DEADLINE)
    assert answer["kind"] == "UserError"
    assert answer["error"].startswith("data.dataset_name='owner/set.parquet': cannot be opened (")
    assert "503" in answer["error"]
    assert "\n" not in answer["error"]
