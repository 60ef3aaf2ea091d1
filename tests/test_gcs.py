"""Work directories and checkpoints in Google Cloud Storage, against an emulated bucket."""

import gc
import json
import os
import shutil
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm.errors import UserError
from mlm.run import gcs
from mlm.run.checkpoint import Checkpointer, CorruptCheckpointError, DiskFullError, SaveError
from mlm.run.gcs import GcsStorage
from mlm.run.workdir import WorkDir
from mlm.train import _prepare_save
from tests.gcs_server import GcsServer
from tests.tiny import settings_of, tiny_config

SETTINGS = settings_of(tiny_config("*.jsonl"))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = GcsServer()
    with pytest.MonkeyPatch.context() as patch:
        # One server for all tests: clients read the variables once.
        for name, value in server.environment.items():
            patch.setenv(name, value)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(gcs, "_RETRY_DEADLINE_SECONDS", 1.0)
        yield server
    server.close()


@pytest.fixture
def url(server, request):
    """The URL of a new work directory; the server accepts all requests before and after the test."""
    server.refuse = lambda method, name: None
    yield f"gs://bucket/runs/{request.node.name.replace('[', '-').replace(']', '')}"
    server.refuse = lambda method, name: None


# Too large for one request.
LARGE = "large" * 2_000_000


def path_of(url: str) -> str:
    return url.removeprefix("gs://bucket/")


def create(workdir: WorkDir, seed: int = 1) -> None:
    def save_tokenizer(directory: str) -> None:
        os.makedirs(directory)
        Path(directory, "tokenizer.json").write_text("{}")

    settings = SETTINGS.replace({"seed": seed})
    workdir.create(settings, save_tokenizer=save_tokenizer, processes=1, rows_per_process=8, step=0)


@pytest.mark.parametrize(
    ("workdir", "message"),
    [
        ("s3://bucket/run", "is not a supported URL; use gs://BUCKET/PATH"),
        ("gs://bucket", ": has no path after the bucket name"),
        ("gs://bucket/", ": has no path after the bucket name"),
        ("gs://bucket/runs/a*", "are not supported in checkpoint paths"),
        ("gs://bucket//run", "are not supported in checkpoint paths"),
        ("gs://bucket/a/../b", "are not supported in checkpoint paths"),
        ("gs://nobodys/run", "there is no bucket nobodys; create it"),
    ],
)
def test_an_invalid_url_is_an_error_of_one_line(server, url, workdir, message):
    with pytest.raises(UserError, match=message) as error:
        WorkDir(workdir)
    assert workdir in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_missing_permissions_and_network_are_errors_of_one_line(server, url):
    server.refuse = lambda method, name: 403
    with pytest.raises(UserError, match=r"no permission to read the bucket .* roles/storage.objectAdmin"):
        WorkDir(url)
    server.refuse = lambda method, name: 503
    with pytest.raises(UserError, match="cannot be reached"):
        WorkDir(url)
    server.refuse = lambda method, name: 403 if method == "POST" else None
    workdir = WorkDir(url)  # Reading is allowed.
    with pytest.raises(UserError, match=r"could not be written .* roles/storage.objectAdmin"):
        workdir.lock()
    with pytest.raises(UserError, match=r"could not be written .* rerun the same command"):
        create(workdir)
    server.refuse = lambda method, name: None
    workdir.lock()
    assert server.names(path_of(url)) == []


@pytest.mark.slow
def test_missing_credentials_are_an_error_of_one_line(server, url, monkeypatch, tmp_path):
    monkeypatch.delenv("STORAGE_EMULATOR_HOST")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GCE_METADATA_HOST", "127.0.0.1:9")
    monkeypatch.setenv("GCE_METADATA_IP", "127.0.0.1:9")
    monkeypatch.setenv("GCE_METADATA_TIMEOUT", "1")
    with pytest.raises(UserError, match="found no Google Cloud credentials; run `gcloud auth"):
        WorkDir(url)
    account = {"type": "authorized_user", "client_id": "a", "client_secret": "b", "refresh_token": "c"}
    (tmp_path / "account.json").write_text(json.dumps(account))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "account.json"))
    with pytest.raises(UserError, match="found no Google Cloud project; set GOOGLE_CLOUD_PROJECT"):
        WorkDir(url)


def test_files_are_uploaded_when_they_change_and_downloaded_on_the_next_machine(server, url):
    workdir = WorkDir(url)
    assert (workdir.display_path, workdir.storage.checkpoints) == (url, f"{url}/checkpoints")
    assert os.path.basename(workdir.path) == os.path.basename(url)
    create(workdir)
    Path(workdir.metrics).write_text('{"step": 1}\n')
    for name, content in {"config.json": "{}", "model.safetensors": LARGE, "trainer_state.json": "{}"}.items():
        Path(workdir.model).mkdir(exist_ok=True)
        Path(workdir.model, name).write_text(content)
    for partial in ("model.tmp", "model.old", "push.abc"):
        shutil.copytree(workdir.model, os.path.join(workdir.path, partial))
    Path(workdir.metrics + ".tmp").write_text("half")
    asked = len(server.asked)
    workdir.push()
    names = [name.removeprefix(path_of(url) + "/") for name in server.names(path_of(url) + "/")]
    model = ["model/config.json", "model/model.safetensors", "model/trainer_state.json"]
    assert names == ["config.json", "metrics.jsonl", *model, "tokenizer/tokenizer.json"]
    # The file that marks a model as complete comes last.
    assert [name for method, name in server.asked[asked:] if method == "POST"][-1].endswith("/trainer_state.json")

    asked = len(server.asked)
    workdir.push()
    assert len(server.asked) == asked  # Nothing has changed.
    Path(workdir.metrics).write_text('{"step": 2}\n')  # Of the same length as before.
    os.remove(os.path.join(workdir.model, "config.json"))
    workdir.push()
    assert sum(method == "POST" for method, _ in server.asked[asked:]) == 1
    assert server.read(f"{path_of(url)}/metrics.jsonl") == b'{"step": 2}\n'
    assert f"{path_of(url)}/model/config.json" not in server.names()

    other = WorkDir(url)
    assert other.path != workdir.path
    assert other.last_topology() == (1, 8)
    assert other.has_tokenizer()
    # Weights are downloaded on request, and do not count as deleted until then.
    assert sorted(os.listdir(other.model)) == ["trainer_state.json"]
    Path(other.metrics).write_text("")
    other.push()
    assert f"{path_of(url)}/model/model.safetensors" in server.names()
    other.fetch_weights()
    assert Path(other.model, "model.safetensors").read_text() == LARGE


@pytest.mark.slow
def test_a_mirror_is_deleted_with_its_owner_and_after_a_kill_by_the_next_start(server, url):
    workdir = WorkDir(url)
    home = Path(workdir.path).parent
    killed = home.parent / "killed"
    (killed / "run").mkdir(parents=True)
    other = WorkDir(url)
    assert home.exists()
    assert not killed.exists()
    # Another process removes its mirror between the listing and the look at its lock.
    real = os.listdir
    with mock.patch.object(os, "listdir", lambda path: [*real(path), "gone"]):
        WorkDir(url)
    del other, workdir
    gc.collect()
    assert not home.exists()


@pytest.mark.slow
def test_a_failed_upload_is_repeated_by_the_next_push(server, url):
    workdir = WorkDir(url)
    create(workdir)
    Path(workdir.metrics).write_text("line\n")
    for status in (403, 503):
        server.refuse = lambda method, name, status=status: status if "metrics" in name else None
        with pytest.raises(OSError, match=r"metrics.jsonl could not be written \("):
            workdir.push()
    server.refuse = lambda method, name: None
    workdir.push()
    assert server.read(f"{path_of(url)}/metrics.jsonl") == b"line\n"


def test_a_run_that_was_restarted_elsewhere_ends(server, url):
    one, other = WorkDir(url), WorkDir(url)
    create(one)
    # There was no run when it was opened, and there is one now.
    with pytest.raises(UserError, match="was restarted or removed elsewhere"):
        create(other)
    other = WorkDir(url)
    create(other)
    Path(one.metrics).write_text("mine")
    with pytest.raises(UserError, match="was restarted or removed elsewhere"):
        one.push()
    one.close()  # No exception.
    assert f"{path_of(url)}/metrics.jsonl" not in server.names()
    assert [start["event"] for start in WorkDir(url).read_history()] == ["start", "restart"]


def test_of_two_starts_at_the_same_moment_one_ends(server, url, monkeypatch):
    one, other = WorkDir(url), WorkDir(url)
    generation = gcs.GcsPrefix.generation

    def before_the_other(folder, name):
        monkeypatch.setattr(gcs.GcsPrefix, "generation", generation)
        found = folder.generation(name)
        create(other)
        return found

    monkeypatch.setattr(gcs.GcsPrefix, "generation", before_the_other)
    with pytest.raises(UserError, match="was restarted or removed elsewhere"):
        create(one)


def test_moving_aside_keeps_everything(server, url):
    workdir = WorkDir(url)
    assert workdir.move_aside() is None
    for number in (1, 2):
        create(workdir, seed=number)
        server.write(f"{path_of(url)}/checkpoints/4/state/d/1", b"array")
        assert workdir.move_aside() == f"{url}.old-{number}"
        assert os.listdir(workdir.path) == []
    for number in (1, 2):
        old = f"{path_of(url)}.old-{number}"
        assert json.loads(server.read(f"{old}/config.json"))["config"]["seed"] == number
        assert server.read(f"{old}/checkpoints/4/state/d/1") == b"array"
    assert server.names(path_of(url) + "/") == []


STATE = {"a": jnp.arange(10.0), "b": jnp.ones((64, 64), jnp.bfloat16)}
LIKE = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), STATE)


def save(checkpointer: Checkpointer, step: int) -> None:
    state = jax.tree.map(lambda leaf: leaf + step, STATE)
    checkpointer.save(step, state=state, loop={"step": step}, stream={"row": step})
    checkpointer.wait()


@pytest.mark.slow
def test_checkpoints_are_saved_and_restored(server, url):
    with Checkpointer(GcsStorage(url), keep_checkpoints=2) as checkpointer:
        assert checkpointer.latest_step() is None
        for step in (1, 2, 3):
            save(checkpointer, step)
        assert checkpointer.steps() == [2, 3]
    folders = {name.removeprefix(f"{path_of(url)}/checkpoints/").split("/")[0] for name in server.names(path_of(url))}
    assert folders == {"2", "3"}
    with Checkpointer(GcsStorage(url), keep_checkpoints=2) as checkpointer:
        restored = checkpointer.restore(3, like=LIKE)
        assert (restored.loop, restored.streams) == ({"step": 3}, [{"row": 3}])
        jax.tree.map(lambda read, first: np.testing.assert_array_equal(read, first + 3), restored.state, STATE)


@pytest.mark.slow
def test_a_partial_checkpoint_is_ignored_and_removed(server, url):
    with Checkpointer(GcsStorage(url), keep_checkpoints=2) as checkpointer:
        save(checkpointer, 1)
        save(checkpointer, 2)
    server.storage.delete_file("bucket", f"{path_of(url)}/checkpoints/2/commit_success.txt")
    with Checkpointer(GcsStorage(url), keep_checkpoints=2) as checkpointer:
        assert checkpointer.latest_step() == 1
        checkpointer.remove_partial()
        assert server.names(f"{path_of(url)}/checkpoints/2") == []
        save(checkpointer, 2)
        assert checkpointer.steps() == [1, 2]


@pytest.mark.slow
def test_a_corrupt_checkpoint_is_quarantined_and_an_unreachable_one_is_not(server, url):
    with Checkpointer(GcsStorage(url), keep_checkpoints=2) as checkpointer:
        save(checkpointer, 1)
        save(checkpointer, 2)
    server.refuse = lambda method, name: 403 if "state" in name else None
    with Checkpointer(GcsStorage(url), keep_checkpoints=2) as checkpointer:
        with pytest.raises(UserError, match=r"checkpoints/2: cannot be read now .* check the network and"):
            checkpointer.restore(2, like=LIKE)
        server.refuse = lambda method, name: 403 if "stream" in name else None
        with pytest.raises(UserError, match="cannot be read now"):
            checkpointer.restore(2, like=LIKE)
        server.refuse = lambda method, name: None
        for name in server.names(f"{path_of(url)}/checkpoints/2/state/"):
            if "/d/" in name:
                server.write(name, b"x" + server.read(name)[1:])
        with pytest.raises(CorruptCheckpointError):
            checkpointer.restore(2, like=LIKE)
        assert checkpointer.quarantine(2) == f"{url}/damaged/2"
        checkpointer.reload()
        assert checkpointer.latest_step() == 1
        assert checkpointer.restore(1, like=LIKE).loop == {"step": 1}
        save(checkpointer, 2)
        assert checkpointer.quarantine(2) == f"{url}/damaged/2.1"


@pytest.mark.slow
@pytest.mark.parametrize("part", ["manifest", "stream", "commit_success", "_CHECKPOINT_METADATA"])
def test_a_refused_save_is_reported_and_the_next_one_succeeds(server, url, part):
    with Checkpointer(GcsStorage(url), keep_checkpoints=2) as checkpointer:
        save(checkpointer, 1)
        server.refuse = lambda method, name: 403 if method in ("POST", "PUT") and part in name else None
        with pytest.raises(SaveError, match="a checkpoint could not be written"):
            save(checkpointer, 2)
        server.refuse = lambda method, name: None
        save(checkpointer, 3)
        assert checkpointer.steps() == [1, 3]
        assert checkpointer.restore(3, like=LIKE).loop == {"step": 3}


@pytest.mark.slow
def test_saves_succeed_again_after_an_outage(server, url):
    with Checkpointer(GcsStorage(url), keep_checkpoints=2) as checkpointer:
        save(checkpointer, 1)
        server.refuse = lambda method, name: 403
        for step in (2, 3):
            with pytest.raises(SaveError):
                save(checkpointer, step)
        server.refuse = lambda method, name: None
        save(checkpointer, 4)
        assert checkpointer.steps() == [1, 4]


@pytest.mark.slow
def test_no_save_starts_before_its_metrics_are_uploaded(server, url):
    workdir = WorkDir(url)
    create(workdir)
    Path(workdir.metrics).write_text("line\n")
    with Checkpointer(workdir.storage, keep_checkpoints=1) as checkpointer:
        server.refuse = lambda method, name: 403 if name.endswith("metrics.jsonl") else None
        with pytest.raises(DiskFullError, match=r"could not be written: .*metrics.jsonl could not be written"):
            _prepare_save(checkpointer, STATE, before_save=workdir.push)
        server.refuse = lambda method, name: None
        _prepare_save(checkpointer, STATE, before_save=workdir.push)
    assert server.read(f"{path_of(url)}/metrics.jsonl") == b"line\n"
