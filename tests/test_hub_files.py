"""Files of datasets on the hub, read by our own readers as hf://datasets/OWNER/NAME@REVISION/PATH."""

import huggingface_hub
import pytest

from mlm.data.sources.source import open_source
from mlm.errors import UserError
from tests import hub_server
from tests.bad_server import COMMIT, LONG_TIMEOUT, TEXTS, Server, encode, rows_of


class RecordingServer(Server):
    """Records the Authorization header of every request of a file."""

    def __init__(self):
        super().__init__()
        self.tokens = []

    def answer(self, handler):
        if not handler.path.startswith("/api/"):
            self.tokens.append(handler.headers.get("Authorization"))
        super().answer(handler)


@pytest.fixture
def server(monkeypatch, tmp_path):
    server = RecordingServer()
    hub_server.use(server, monkeypatch, tmp_path)
    template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    yield server
    server.close()


def open_hub_files(*names):
    files = [f"hf://datasets/owner/set@{COMMIT}/{name}" for name in names]
    return open_source(data_files=files, retry_policy=LONG_TIMEOUT)


@pytest.mark.parametrize("name", ["a b.jsonl", "en/a.jsonl.gz", "a.csv.zst", "a.txt.xz", "a.parquet"])
def test_files_of_the_hub_are_read_from_any_row_with_the_token(server, name):
    server.files[f"/owner/set/{name}"] = encode(name, TEXTS)
    source = open_hub_files(name)
    for start in (0, 1, 250, 400):
        assert rows_of(source, start_row=start) == TEXTS[start:]
    assert server.count(f"/datasets/owner/set/resolve/{COMMIT}/{name}") == len(server.tokens)
    assert set(server.tokens) == {f"Bearer hf_{server.port}"}


def test_the_token_is_not_sent_to_the_host_of_a_redirect(server):
    """The hub redirects to its storage."""
    storage = RecordingServer()
    try:
        storage.files["/a.jsonl"] = encode("a.jsonl", TEXTS)
        server.always[f"/datasets/owner/set/resolve/{COMMIT}/a.jsonl"] = (302, {"Location": f"{storage.url}/a.jsonl"})
        source = open_hub_files("a.jsonl")
        storage.faults["/a.jsonl"].append("cut")
        assert rows_of(source) == TEXTS
        assert storage.tokens == [None] * 3
        # After the interruption the hub is asked for the address again.
        assert [bool(part) for _, _, part in storage.requests] == [False, False, True]
        assert len(server.tokens) == 3
    finally:
        storage.close()


def test_the_reason_why_a_gated_dataset_is_refused_is_shown(server):
    reason = "Access to dataset owner/set is restricted. Visit https://hf.co/owner/set to ask for access."
    path = f"/datasets/owner/set/resolve/{COMMIT}/a.jsonl"
    server.always[path] = (403, {"X-Error-Message": reason})
    with pytest.raises(UserError) as raised:
        open_hub_files("a.jsonl")
    assert str(raised.value) == (
        f"cannot read 'hf://datasets/owner/set/a.jsonl': the server answers 403 {reason}; fix it or remove it"
    )
    assert server.count(path) == 1


def test_nothing_is_requested_offline(server, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        open_hub_files("a.jsonl")
    assert server.requests == []
