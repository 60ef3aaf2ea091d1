"""Pushing to the hub: the real client against a server on 127.0.0.1 that takes models in, or does not."""

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

PATIENCE = RetryPolicy(deadline_seconds=0.05, timeout_seconds=0.2, first_wait_seconds=0.001, max_wait_seconds=0.01)
BASE = "/api/models/ann/run"
PREUPLOAD, COMMIT = f"{BASE}/preupload/main", f"{BASE}/commit/main"
BATCH = "/ann/run.git/info/lfs/objects/batch"
# What a server may do to each question of a push, where trying again is the cure.
FAULTS = [500, 503, 429, "reset", "hang"]


@pytest.fixture(scope="module")
def shared_server():
    server = HubServer()
    yield server
    server.close()


@pytest.fixture
def server(shared_server, monkeypatch, tmp_path):
    """In good health, and this process's hub."""
    shared_server.heal()
    hub_server.use(shared_server, monkeypatch, tmp_path)
    return shared_server


@pytest.fixture
def workdir(tmp_path):
    """What a run of one export leaves."""
    path = tmp_path / "run"
    export(path, step=1)
    (path / "events.out.tfevents.1.host").write_bytes(b"\x00traces")
    return path


def export(workdir, *, step):
    """As the real one: beside, then in place."""
    new = workdir / "model.tmp"
    new.mkdir(parents=True)
    safetensors.numpy.save_file({"w": np.full(1000, step, np.float32)}, new / "model.safetensors")
    (new / "README.md").write_text(f"---\ntags:\n- jax\n---\n# step {step}\n")
    (new / "tokenizer.json").write_text("{}")
    if (workdir / "model").exists():
        os.rename(workdir / "model", workdir / f"old{step}")
    os.rename(new, workdir / "model")


def contents(workdir):
    files = {path.name: path.read_bytes() for path in (workdir / "model").iterdir()}
    return files | {f"runs/{path.name}": path.read_bytes() for path in workdir.glob("events.*")}


def open_hub(workdir, **kwargs):
    options = {"private": False, "retry_policy": PATIENCE, "first_wait_seconds": 0.01}
    return Hub("run", workdir=str(workdir), **options | kwargs)


def left_over(workdir):
    return [path.name for path in workdir.glob("push.*")]


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_what_is_pushed_arrives_byte_for_byte(server, workdir):
    hub = open_hub(workdir, private=True)
    assert hub.repo_id == "ann/run"
    [made] = server.created
    assert (made["name"], made["organization"], made["visibility"]) == ("run", "ann", "private")
    first = contents(workdir)
    hub.push(step=1)
    wait_for(lambda: is_pushed(str(workdir), name="run", step=1))
    export(workdir, step=2)
    hub.finish(step=2)
    assert [message for message, _ in server.commits] == ["Update 1", "Update 2"]
    assert [files for _, files in server.commits] == [first, contents(workdir)]
    assert server.lfs == {"model.safetensors", "runs/events.out.tfevents.1.host"}
    assert server.questions == [[], []]
    assert is_pushed(str(workdir), name="run", step=2)
    assert not is_pushed(str(workdir), name="other", step=2)
    assert not is_pushed(str(workdir), name="run", step=3)
    assert left_over(workdir) == []


def test_repositories_that_are_there_are_used(server, workdir):
    server.faults["/api/repos/create"].append(409)
    assert open_hub(workdir).repo_id == "ann/run"
    open_hub(workdir, private=False)
    assert server.created[-1].get("visibility") in (None, "public")


@pytest.mark.parametrize("path", [PREUPLOAD, COMMIT, BATCH, "/api/validate-yaml"])
def test_a_push_is_tried_until_it_works(server, workdir, path, caplog):
    server.faults[path].extend(FAULTS)
    hub = open_hub(workdir)
    hub.finish(step=1)
    assert server.commits == [("Update 1", contents(workdir))]
    assert not server.faults[path]
    assert left_over(workdir) == []


def test_an_upload_that_breaks_is_tried_again(server, workdir):
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
    assert server.commits == [("Update 1", contents(workdir))]


def test_training_is_not_held_up_and_the_newest_model_is_pushed(server, workdir, caplog):
    """While the server is silent, models come and go."""
    held = threading.Event()
    real = server.hub_answer

    def slow(handler, path, content):
        if path == COMMIT:
            held.wait(20)
        return real(handler, path, content)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "hub_answer", slow)
        hub = open_hub(workdir, retry_policy=dataclasses.replace(PATIENCE, timeout_seconds=20.0))
        before = time.monotonic()
        first = contents(workdir)
        hub.push(step=1)
        wait_for(lambda: server.count(COMMIT) == 1)
        for step in (2, 3, 4):
            export(workdir, step=step)
            hub.push(step=step)
        assert time.monotonic() - before < 5
        assert len(left_over(workdir)) == 2
        held.set()
        hub.finish(step=4)
    assert [message for message, _ in server.commits] == ["Update 1", "Update 4"]
    assert server.commits[0][1] == first
    assert server.commits[1][1] == contents(workdir)
    assert "step 2: not pushed before there is a newer model" in caplog.text
    assert left_over(workdir) == []


def test_waits_grow_and_the_runs_end_does_not_wait_for_them(server, workdir, monkeypatch):
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
    assert [message for message, _ in server.commits] == ["Update 1"]


def test_the_command_for_a_model_in_a_bucket(server, workdir):
    hub = open_hub(workdir, url="gs://bucket/runs/it's")
    server.always[COMMIT] = 403
    with pytest.raises(UserError) as error:
        hub.finish(step=1)
    assert "gcloud storage cp --recursive 'gs://bucket/runs/it'\"'\"'s/model' . && hf upload ann/run model" in str(
        error.value
    )


@pytest.mark.parametrize("fault", [500, "reset", 403])
def test_a_push_that_fails_to_the_end_is_an_error_with_the_command(server, workdir, fault):
    hub = open_hub(workdir)
    server.always[COMMIT] = fault
    with pytest.raises(UserError, match="the run is finished, but pushing it to ann/run failed") as error:
        hub.finish(step=1)
    assert f"hf upload ann/run {workdir / 'model'}" in str(error.value)
    assert "\n" not in str(error.value)
    # No hope, no second try.
    tries = server.count(PREUPLOAD)
    assert tries == 1 if fault == 403 else tries == hub_lib._LAST_TRIES
    assert left_over(workdir) == []
    assert not is_pushed(str(workdir), name="run", step=1)


def test_a_refused_push_does_not_keep_the_next_from_being_tried(server, workdir):
    server.faults[COMMIT].append(403)
    hub = open_hub(workdir)
    hub.push(step=1)
    wait_for(lambda: server.count(COMMIT) == 1)
    export(workdir, step=2)
    hub.finish(step=2)
    assert server.commits == [("Update 2", contents(workdir))]


def test_a_card_that_the_hub_does_not_take_is_told(server, workdir):
    (workdir / "model" / "README.md").write_text("---\ntags: 3\n---\n")
    with pytest.raises(UserError, match=r"tags is 3"):
        open_hub(workdir).finish(step=1)


@pytest.mark.parametrize(
    ("token", "fine"),
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
def test_a_token_that_may_not_write_is_found_out(server, token, fine):
    server.token = token
    if fine:
        assert check_token("run", retry_policy=PATIENCE) == "ann/run"
    else:
        with pytest.raises(UserError, match="the token of ann may only read, not write to ann/run"):
            check_token("run", retry_policy=PATIENCE)
    assert server.created == []


def test_tokens_and_hubs_that_are_not_there(server, monkeypatch, workdir):
    server.always["/api/whoami-v2"] = 401
    with pytest.raises(UserError, match=r"does not say whose token this is .*Invalid user token") as error:
        check_token("run", retry_policy=PATIENCE)
    assert "\n" not in str(error.value)
    assert server.count("/api/whoami-v2") == 1
    for fault in (500, "reset", "hang"):
        server.heal()
        server.always["/api/whoami-v2"] = fault
        with pytest.raises(UserError, match="does not say whose token this is"):
            check_token("run", retry_policy=PATIENCE)
    for fault, tries in ((403, 1), (500, 2)):
        server.heal()
        server.always["/api/repos/create"] = fault
        with pytest.raises(UserError, match=r"hub.hub_model_id='run': the repository cannot be made"):
            open_hub(workdir)
        assert server.count("/api/repos/create") >= tries
    server.heal()
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match=r"hub.push_to_hub=True needs a token"):
        check_token("run", retry_policy=PATIENCE)
    assert server.requests == []


@pytest.fixture
def config(tmp_path):
    (tmp_path / "data").mkdir()
    config = tiny_config(write_corpus(tmp_path / "data"))
    config.hub.push_to_hub = True
    config.data.network_timeout_seconds = 0.5
    config.data.network_deadline_seconds = 0.05
    return config


def test_a_token_that_may_only_read_is_told_before_anything_is_made(server, config, tmp_path):
    server.token = READ
    with pytest.raises(UserError, match="may only read"):
        train_and_evaluate(settings_of(config), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    assert server.created == []


@pytest.mark.slow
def test_a_run_pushes_and_one_that_was_cut_off_pushes_when_started_again(server, config, tmp_path, monkeypatch):
    """The card, too, is one that the hub takes."""
    server.always[COMMIT] = 403
    workdir = tmp_path / "run"
    with pytest.raises(UserError, match="the run is finished, but pushing"):
        train_and_evaluate(settings_of(config), str(workdir))
    assert json.loads((workdir / "model" / "trainer_state.json").read_text())["global_step"] == 8
    assert server.questions
    assert not any(server.questions)

    server.heal()
    with monkeypatch.context() as patch:
        # Nothing is made again for it.
        patch.setattr(build, "build", None)
        train_and_evaluate(settings_of(config), str(workdir))
        [(message, files)] = server.commits
        assert message == "Update 8"
        assert files == contents(workdir)
        assert {"README.md", "model.safetensors", "tokenizer.json", "curves.png"} <= set(files)
        train_and_evaluate(settings_of(config), str(workdir))
        config.hub.hub_model_id = "ann/elsewhere"
        train_and_evaluate(settings_of(config), str(workdir))
    assert len(server.commits) == 2
    assert server.created[-1]["name"] == "elsewhere"
