"""Uploads to the hub: the real client against a server on 127.0.0.1 that accepts models or fails on demand."""

import dataclasses
import json
import os
import threading
import time

import numpy as np
import pytest
import safetensors.numpy

from mlm import build
from mlm.data.sources.retry import RetryPolicy
from mlm.errors import UserError
from mlm.export import hub as hub_lib
from mlm.export.hub import Hub, check_token, is_pushed
from mlm.train import train_and_evaluate
from tests import hub_server
from tests.hub_server import READ, WRITE, HubServer, fine_grained
from tests.tiny import settings_of, tiny_config, write_corpus

RETRY_POLICY = RetryPolicy(deadline_seconds=0.05, timeout_seconds=0.2, first_wait_seconds=0.001, max_wait_seconds=0.01)
BASE = "/api/models/ann/run"
PREUPLOAD, COMMIT = f"{BASE}/preupload/main", f"{BASE}/commit/main"
BATCH = "/ann/run.git/info/lfs/objects/batch"
# Faults of a server that are worth a retry.
FAULTS = [500, 503, 429, "reset", "hang"]


@pytest.fixture(scope="module")
def shared_server():
    server = HubServer()
    yield server
    server.close()


@pytest.fixture
def server(shared_server, monkeypatch, tmp_path):
    """A server without faults that huggingface_hub uses as the hub."""
    shared_server.heal()
    hub_server.use(shared_server, monkeypatch, tmp_path)
    return shared_server


@pytest.fixture
def workdir(tmp_path):
    """A work directory after one export."""
    path = tmp_path / "run"
    export(path, step=1)
    (path / "events.out.tfevents.1.host").write_bytes(b"\x00traces")
    return path


def export(workdir, *, step):
    """Writes a model in a temporary directory and renames it, like the real export."""
    new = workdir / "model.tmp"
    new.mkdir(parents=True)
    safetensors.numpy.save_file({"w": np.full(1000, step, np.float32)}, new / "model.safetensors")
    (new / "README.md").write_text(f"---\ntags:\n- jax\n---\n# step {step}\n")
    (new / "tokenizer.json").write_text("{}")
    if (workdir / "model").exists():
        os.rename(workdir / "model", workdir / f"old{step}")
    os.rename(new, workdir / "model")


def contents(workdir):
    model = workdir / "model"
    files = {str(path.relative_to(model)): path.read_bytes() for path in model.rglob("*") if path.is_file()}
    return files | {f"runs/{path.name}": path.read_bytes() for path in workdir.glob("events.*")}


def open_hub(workdir, **kwargs):
    options = {"private": False, "retry_policy": RETRY_POLICY, "first_wait_seconds": 0.01}
    return Hub("run", workdir=str(workdir), **options | kwargs)


def leftovers(workdir):
    return [path.name for path in workdir.glob("push.*")]


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.slow
def test_uploaded_files_arrive_byte_for_byte(server, workdir):
    hub = open_hub(workdir, private=True)
    assert hub.repo_id == "ann/run"
    [made] = server.created
    assert (made["name"], made["organization"], made["visibility"]) == ("run", "ann", "private")
    first = contents(workdir)
    hub.push(step=1)
    wait_for(lambda: is_pushed(str(workdir), name="run", step=1))
    export(workdir, step=2)
    (workdir / "model" / "1_Pooling").mkdir()  # As export.sentence_transformers does.
    (workdir / "model" / "1_Pooling" / "config.json").write_text("{}")
    hub.finish(step=2)
    assert [message for message, _ in server.commits] == ["Step 1", "Step 2"]
    assert [files for _, files in server.commits] == [first, contents(workdir)]
    assert server.lfs == {"model.safetensors", "runs/events.out.tfevents.1.host"}
    assert server.card_checks == [[], []]
    assert is_pushed(str(workdir), name="run", step=2)
    assert not is_pushed(str(workdir), name="other", step=2)
    assert not is_pushed(str(workdir), name="run", step=3)
    assert leftovers(workdir) == []


def test_repositories_that_are_there_are_used(server, workdir):
    server.faults["/api/repos/create"].append(409)
    assert open_hub(workdir).repo_id == "ann/run"
    open_hub(workdir, private=False)
    assert server.created[-1].get("visibility") in (None, "public")


@pytest.mark.slow
@pytest.mark.parametrize("path", [PREUPLOAD, COMMIT, BATCH, "/api/validate-yaml"])
def test_an_upload_is_retried_until_it_succeeds(server, workdir, path, caplog):
    server.faults[path].extend(FAULTS)
    hub = open_hub(workdir)
    hub.finish(step=1)
    assert server.commits == [("Step 1", contents(workdir))]
    assert not server.faults[path]
    assert leftovers(workdir) == []


@pytest.mark.slow
def test_a_file_upload_that_breaks_is_retried(server, workdir):
    with pytest.MonkeyPatch.context() as patch:
        seen = []

        def next_fault(asked):
            if asked.startswith("/upload/") and len(seen) < len(FAULTS):
                seen.append(asked)
                return FAULTS[len(seen) - 1]
            return None

        patch.setattr(server, "next_fault", next_fault)
        open_hub(workdir).finish(step=1)
    assert len(seen) == len(FAULTS)
    assert server.commits == [("Step 1", contents(workdir))]


@pytest.mark.slow
def test_training_does_not_wait_and_the_newest_model_is_uploaded(server, workdir, caplog):
    """The server does not answer while four models are exported."""
    held = threading.Event()
    real = server.hub_answer

    def slow(handler, path, content):
        if path == COMMIT:
            held.wait(20)
        return real(handler, path, content)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "hub_answer", slow)
        hub = open_hub(workdir, retry_policy=dataclasses.replace(RETRY_POLICY, timeout_seconds=20.0))
        before = time.monotonic()
        first = contents(workdir)
        hub.push(step=1)
        wait_for(lambda: server.count(COMMIT) == 1)
        for step in (2, 3, 4):
            export(workdir, step=step)
            hub.push(step=step)
        assert time.monotonic() - before < 5
        assert len(leftovers(workdir)) == 2
        held.set()
        hub.finish(step=4)
    assert [message for message, _ in server.commits] == ["Step 1", "Step 4"]
    assert server.commits[0][1] == first
    assert server.commits[1][1] == contents(workdir)
    assert "step 2: not uploaded to the hub, a newer model replaces it" in caplog.text
    assert leftovers(workdir) == []


@pytest.mark.slow
def test_waits_grow_and_the_end_of_the_run_cuts_them_short(server, workdir, monkeypatch):
    waits = []
    real = threading.Condition.wait_for

    def wait_for_less(self, predicate, timeout=None):
        if timeout is not None:
            waits.append(timeout)
        return real(self, predicate, timeout and timeout / 1000)

    monkeypatch.setattr(threading.Condition, "wait_for", wait_for_less)
    server.always[PREUPLOAD] = "reset"
    hub = open_hub(workdir, first_wait_seconds=5.0)
    hub.push(step=1)
    wait_for(lambda: len(waits) >= 8)
    assert waits[:8] == [5, 10, 20, 40, 80, 160, 300, 300]
    server.always.clear()
    hub.finish(step=1)
    assert [message for message, _ in server.commits] == ["Step 1"]


@pytest.mark.slow
def test_waits_after_the_run_begin_again_and_the_last_failure_is_not_waited_for(server, workdir, monkeypatch):
    waits = []

    def end_run(self, seconds, *, until_closing):
        waits.append((seconds, until_closing))
        if until_closing and len(waits) == 3:
            run_ends.set()
            return threading.Condition.wait_for(self._changed, lambda: self._closing)
        return False

    run_ends = threading.Event()
    monkeypatch.setattr(Hub, "_wait", end_run)
    server.always[PREUPLOAD] = "reset"
    hub = open_hub(workdir, first_wait_seconds=5.0)
    hub.push(step=1)
    run_ends.wait(20)
    with pytest.raises(UserError, match="uploading the model to ann/run failed"):
        hub.finish(step=1)
    # Six tries, with waits between them only.
    during, after = (
        [(5, True), (10, True), (20, True)],
        [(5, False), (10, False), (20, False), (40, False), (80, False)],
    )
    assert waits == during + after
    server.always.clear()
    server.always[COMMIT] = 403
    waits.clear()
    with pytest.raises(UserError, match="uploading the model to ann/run failed"):
        open_hub(workdir).finish(step=1)
    assert waits == []


def test_the_upload_command_for_a_model_in_a_bucket(server, workdir):
    hub = open_hub(workdir, download_command="gcloud storage cp --recursive 'gs://bucket/runs/it'\"'\"'s/model' .")
    server.always[COMMIT] = 403
    with pytest.raises(UserError) as error:
        hub.finish(step=1)
    assert "gcloud storage cp --recursive 'gs://bucket/runs/it'\"'\"'s/model' . && hf upload ann/run model" in str(
        error.value
    )


@pytest.mark.slow
@pytest.mark.parametrize("fault", [500, "reset", 403])
def test_a_final_upload_that_fails_is_an_error_with_a_command(server, workdir, fault):
    hub = open_hub(workdir)
    server.always[COMMIT] = fault
    with pytest.raises(UserError, match="the run is finished, but uploading the model to ann/run failed") as error:
        hub.finish(step=1)
    assert f"hf upload ann/run {workdir / 'model'}" in str(error.value)
    assert "\n" not in str(error.value)
    # A permanent error is not retried.
    tries = server.count(PREUPLOAD)
    assert tries == 1 if fault == 403 else tries == hub_lib._LAST_TRIES
    assert leftovers(workdir) == []
    assert not is_pushed(str(workdir), name="run", step=1)


@pytest.mark.slow
def test_a_rejected_upload_does_not_prevent_the_next(server, workdir):
    server.faults[COMMIT].append(403)
    hub = open_hub(workdir)
    hub.push(step=1)
    wait_for(lambda: server.count(COMMIT) == 1)
    export(workdir, step=2)
    hub.finish(step=2)
    assert server.commits == [("Step 2", contents(workdir))]


def test_a_card_that_the_hub_rejects_is_an_error(server, workdir):
    (workdir / "model" / "README.md").write_text("---\ntags: 3\n---\n")
    with pytest.raises(UserError, match=r"tags is 3"):
        open_hub(workdir).finish(step=1)


@pytest.mark.parametrize(
    ("token", "can_write"),
    [
        (WRITE, True),
        ({"role": "something new"}, True),
        (READ, False),
        (fine_grained("ann", "repo.content.read", "repo.write"), True),
        (fine_grained("ann/run", "repo.write"), True),
        (fine_grained("ann", "repo.content.read"), False),
        (fine_grained("bob", "repo.write"), False),
        (fine_grained("ann/other", "repo.write"), False),
        (fine_grained("bob", "repo.content.read", everywhere=["discussion.write"]), False),
        ({"role": "fineGrained", "fineGrained": {"global": ["discussion.write"], "scoped": []}}, False),
    ],
)
def test_write_access_of_tokens(server, token, can_write):
    server.token = token
    if can_write:
        assert check_token("run", retry_policy=RETRY_POLICY) == "ann/run"
    else:
        with pytest.raises(UserError, match="the token of ann cannot write to ann/run"):
            check_token("run", retry_policy=RETRY_POLICY)
    assert server.created == []


@pytest.mark.slow
def test_missing_or_invalid_tokens_and_unreachable_hubs(server, monkeypatch, workdir):
    server.always["/api/whoami-v2"] = 401
    with pytest.raises(UserError, match=r"cannot check the token .*Invalid user token") as error:
        check_token("run", retry_policy=RETRY_POLICY)
    assert "\n" not in str(error.value)
    assert server.count("/api/whoami-v2") == 1
    for fault in (500, "reset", "hang"):
        server.heal()
        server.always["/api/whoami-v2"] = fault
        with pytest.raises(UserError, match="cannot check the token"):
            check_token("run", retry_policy=RETRY_POLICY)
    for fault, tries in ((403, 1), (500, 2)):
        server.heal()
        server.always["/api/repos/create"] = fault
        with pytest.raises(UserError, match=r"hub.hub_model_id='run': cannot create the repository"):
            open_hub(workdir)
        assert server.count("/api/repos/create") >= tries
    server.heal()
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match=r"hub.push_to_hub=True: needs a token"):
        check_token("run", retry_policy=RETRY_POLICY)
    assert server.requests == []


@pytest.fixture
def config(tmp_path):
    (tmp_path / "data").mkdir()
    config = tiny_config(write_corpus(tmp_path / "data"))
    config.hub.push_to_hub = True
    config.data.network_timeout_seconds = 0.5
    config.data.network_deadline_seconds = 0.05
    return config


def test_a_read_only_token_is_an_error_before_anything_is_created(server, config, tmp_path):
    server.token = READ
    with pytest.raises(UserError, match="cannot write to"):
        train_and_evaluate(settings_of(config), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    assert server.created == []


@pytest.mark.slow
def test_a_finished_run_uploads_its_model_and_a_restart_makes_up_for_a_failed_upload(
    server, config, tmp_path, monkeypatch
):
    """The hub accepts the card as well."""
    server.always[COMMIT] = 403
    workdir = tmp_path / "run"
    with pytest.raises(UserError, match="the run is finished, but uploading"):
        train_and_evaluate(settings_of(config), str(workdir))
    assert json.loads((workdir / "model" / "trainer_state.json").read_text())["global_step"] == 8
    assert server.card_checks
    assert not any(server.card_checks)

    server.heal()
    with monkeypatch.context() as patch:
        # The upload needs no model and no data.
        patch.setattr(build, "build", None)
        train_and_evaluate(settings_of(config), str(workdir))
        [(message, files)] = server.commits
        assert message == "Step 8"
        assert files == contents(workdir)
        assert {"README.md", "model.safetensors", "tokenizer.json", "curves.png"} <= set(files)
        train_and_evaluate(settings_of(config), str(workdir))
        config.hub.hub_model_id = "ann/elsewhere"
        train_and_evaluate(settings_of(config), str(workdir))
    assert len(server.commits) == 2
    assert server.created[-1]["name"] == "elsewhere"
