"""Work directories and checkpoints at gs://..., against a bucket on this machine."""

import gc
import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm.errors import UserError
from mlm.run import gcs
from mlm.run.checkpoint import Checkpointer, CorruptCheckpointError, DiskFullError, SaveError
from mlm.run.workdir import WorkDir
from mlm.train import _require_room
from tests.gcs_server import GcsServer


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = GcsServer()
    with pytest.MonkeyPatch.context() as patch:
        # One for all: clients read it once.
        for name, value in server.environment.items():
            patch.setenv(name, value)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(gcs, "_DEADLINE", 1.0)
        yield server
    server.close()


@pytest.fixture
def url(server, request):
    """A path that nobody else has; the server is as it should be before and after."""
    server.refuse = lambda method, name: None
    yield f"gs://bucket/runs/{request.node.name.replace('[', '-').replace(']', '')}"
    server.refuse = lambda method, name: None


# Past what goes in one request.
HEAVY = "heavy" * 2_000_000


def path_of(url: str) -> str:
    return url.removeprefix("gs://bucket/")


def create(place: WorkDir, seed: int = 1) -> None:
    def save_tokenizer(directory: str) -> None:
        os.makedirs(directory)
        Path(directory, "tokenizer.json").write_text("{}")

    place.create({"seed": seed}, save_tokenizer=save_tokenizer, processes=1, rows_per_process=8, step=0)


@pytest.mark.parametrize(
    ("workdir", "message"),
    [
        ("s3://bucket/run", "of URLs only gs://BUCKET/PATH"),
        ("gs://bucket", "names no path in a bucket"),
        ("gs://bucket/", "names no path in a bucket"),
        ("gs://bucket/runs/a*", "cannot hold checkpoints"),
        ("gs://bucket//run", "cannot hold checkpoints"),
        ("gs://bucket/a/../b", "cannot hold checkpoints"),
        ("gs://nobodys/run", "there is no bucket nobodys; make it"),
    ],
)
def test_what_is_no_work_directory_is_said_in_a_line(server, url, workdir, message):
    with pytest.raises(UserError, match=message) as error:
        WorkDir(workdir)
    assert workdir in str(error.value)
    assert "\n" not in str(error.value)


def test_rights_and_networks_that_are_missing_are_said_in_a_line(server, url):
    server.refuse = lambda method, name: 403
    with pytest.raises(UserError, match=r"may not be read .* roles/storage.objectAdmin"):
        WorkDir(url)
    server.refuse = lambda method, name: 503
    with pytest.raises(UserError, match="cannot be reached"):
        WorkDir(url)
    server.refuse = lambda method, name: 403 if method == "POST" else None
    place = WorkDir(url)  # It may be read.
    with pytest.raises(UserError, match=r"could not be written .* roles/storage.objectAdmin"):
        place.lock()
    with pytest.raises(UserError, match=r"could not be written .* the same command goes on"):
        create(place)
    server.refuse = lambda method, name: None
    place.lock()
    assert server.names(path_of(url)) == []


def test_credentials_that_are_missing_are_said_in_a_line(server, url, monkeypatch, tmp_path):
    monkeypatch.delenv("STORAGE_EMULATOR_HOST")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GCE_METADATA_HOST", "127.0.0.1:9")
    monkeypatch.setenv("GCE_METADATA_IP", "127.0.0.1:9")
    monkeypatch.setenv("GCE_METADATA_TIMEOUT", "1")
    with pytest.raises(UserError, match="no Google Cloud credentials here; run `gcloud auth"):
        WorkDir(url)
    account = {"type": "authorized_user", "client_id": "a", "client_secret": "b", "refresh_token": "c"}
    (tmp_path / "account.json").write_text(json.dumps(account))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "account.json"))
    with pytest.raises(UserError, match="no Google Cloud project here; set GOOGLE_CLOUD_PROJECT"):
        WorkDir(url)


def test_what_is_written_here_is_there_and_for_the_next_machine(server, url):
    place = WorkDir(url)
    assert (place.display_path, place.checkpoints) == (url, f"{url}/checkpoints")
    assert os.path.basename(place.path) == os.path.basename(url)
    create(place)
    Path(place.metrics).write_text('{"step": 1}\n')
    for name, content in {"config.json": "{}", "model.safetensors": HEAVY, "trainer_state.json": "{}"}.items():
        Path(place.model).mkdir(exist_ok=True)
        Path(place.model, name).write_text(content)
    for half in ("model.tmp", "model.old", "push.abc"):
        shutil.copytree(place.model, os.path.join(place.path, half))
    Path(place.metrics + ".tmp").write_text("half")
    asked = len(server.asked)
    place.push()
    names = [name.removeprefix(path_of(url) + "/") for name in server.names(path_of(url) + "/")]
    model = ["model/config.json", "model/model.safetensors", "model/trainer_state.json"]
    assert names == ["config.json", "metrics.jsonl", *model, "tokenizer/tokenizer.json"]
    # What says that a model is whole comes after it.
    assert [name for method, name in server.asked[asked:] if method == "POST"][-1].endswith("/trainer_state.json")

    asked = len(server.asked)
    place.push()
    assert len(server.asked) == asked  # Nothing has changed.
    Path(place.metrics).write_text('{"step": 2}\n')  # As long as it was.
    os.remove(os.path.join(place.model, "config.json"))
    place.push()
    assert sum(method == "POST" for method, _ in server.asked[asked:]) == 1
    assert server.read(f"{path_of(url)}/metrics.jsonl") == b'{"step": 2}\n'
    assert f"{path_of(url)}/model/config.json" not in server.names()

    other = WorkDir(url)
    assert other.path != place.path
    assert other.last_topology() == (1, 8)
    assert other.has_tokenizer()
    # The weights come when somebody wants them, and are not taken for removed until then.
    assert sorted(os.listdir(other.model)) == ["trainer_state.json"]
    Path(other.metrics).write_text("")
    other.push()
    assert f"{path_of(url)}/model/model.safetensors" in server.names()
    other.fetch_weights()
    assert Path(other.model, "model.safetensors").read_text() == HEAVY


def test_a_double_goes_with_its_owner_and_with_the_next_start_after_a_kill(server, url):
    place = WorkDir(url)
    home = Path(place.path).parent
    killed = home.parent / "killed"
    (killed / "run").mkdir(parents=True)
    other = WorkDir(url)
    assert home.exists()
    assert not killed.exists()
    del other, place
    gc.collect()
    assert not home.exists()


def test_what_could_not_be_written_is_the_next_time(server, url):
    place = WorkDir(url)
    create(place)
    Path(place.metrics).write_text("line\n")
    for status in (403, 503):
        server.refuse = lambda method, name, status=status: status if "metrics" in name else None
        with pytest.raises(OSError, match=r"metrics.jsonl could not be written \("):
            place.push()
    server.refuse = lambda method, name: None
    place.push()
    assert server.read(f"{path_of(url)}/metrics.jsonl") == b"line\n"


def test_a_run_that_was_started_again_elsewhere_ends(server, url):
    one, other = WorkDir(url), WorkDir(url)
    create(one)
    # It has seen none, and there is one by now.
    with pytest.raises(UserError, match="started again elsewhere"):
        create(other)
    other = WorkDir(url)
    create(other)
    Path(one.metrics).write_text("mine")
    with pytest.raises(UserError, match="started again elsewhere"):
        one.push()
    one.close()  # Leaves quietly.
    assert f"{path_of(url)}/metrics.jsonl" not in server.names()
    assert [start["event"] for start in WorkDir(url).read_history()] == ["start", "restart"]


def test_two_starts_at_the_same_moment_are_one(server, url, monkeypatch):
    one, other = WorkDir(url), WorkDir(url)
    generation = gcs.GcsPrefix.generation

    def before_the_other(folder, name):
        monkeypatch.setattr(gcs.GcsPrefix, "generation", generation)
        found = folder.generation(name)
        create(other)
        return found

    monkeypatch.setattr(gcs.GcsPrefix, "generation", before_the_other)
    with pytest.raises(UserError, match="started again elsewhere"):
        create(one)


def test_moving_aside_keeps_everything(server, url):
    place = WorkDir(url)
    assert place.move_aside() is None
    for number in (1, 2):
        create(place, seed=number)
        server.write(f"{path_of(url)}/checkpoints/4/state/d/1", b"array")
        assert place.move_aside() == f"{url}.old-{number}"
        assert os.listdir(place.path) == []
    for number in (1, 2):
        old = f"{path_of(url)}.old-{number}"
        assert json.loads(server.read(f"{old}/config.json"))["config"] == {"seed": number}
        assert server.read(f"{old}/checkpoints/4/state/d/1") == b"array"
    assert server.names(path_of(url) + "/") == []


STATE = {"a": jnp.arange(10.0), "b": jnp.ones((64, 64), jnp.bfloat16)}
LIKE = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), STATE)


def save(checkpointer: Checkpointer, step: int) -> None:
    state = jax.tree.map(lambda leaf: leaf + step, STATE)
    checkpointer.save(step, state=state, loop={"step": step}, stream={"row": step})
    checkpointer.wait()


def test_checkpoints_go_there_and_come_back(server, url):
    with Checkpointer(f"{url}/checkpoints", keep_checkpoints=2) as checkpointer:
        assert checkpointer.latest_step() is None
        for step in (1, 2, 3):
            save(checkpointer, step)
        assert checkpointer.steps() == [2, 3]
    folders = {name.removeprefix(f"{path_of(url)}/checkpoints/").split("/")[0] for name in server.names(path_of(url))}
    assert folders == {"2", "3"}
    with Checkpointer(f"{url}/checkpoints", keep_checkpoints=2) as checkpointer:
        restored = checkpointer.restore(3, like=LIKE)
        assert (restored.loop, restored.streams) == ({"step": 3}, [{"row": 3}])
        jax.tree.map(lambda there, here: np.testing.assert_array_equal(there, here + 3), restored.state, STATE)


def test_a_save_that_was_cut_off_is_none_and_goes(server, url):
    with Checkpointer(f"{url}/checkpoints", keep_checkpoints=2) as checkpointer:
        save(checkpointer, 1)
        save(checkpointer, 2)
    server.storage.delete_file("bucket", f"{path_of(url)}/checkpoints/2/commit_success.txt")
    with Checkpointer(f"{url}/checkpoints", keep_checkpoints=2) as checkpointer:
        assert checkpointer.latest_step() == 1
        checkpointer.remove_partial()
        assert server.names(f"{path_of(url)}/checkpoints/2") == []
        save(checkpointer, 2)
        assert checkpointer.steps() == [1, 2]


def test_a_checkpoint_that_is_damaged_is_set_aside_and_one_that_is_out_of_reach_is_not(server, url):
    with Checkpointer(f"{url}/checkpoints", keep_checkpoints=2) as checkpointer:
        save(checkpointer, 1)
        save(checkpointer, 2)
    server.refuse = lambda method, name: 403 if "state" in name else None
    with Checkpointer(f"{url}/checkpoints", keep_checkpoints=2) as checkpointer:
        with pytest.raises(UserError, match=r"cannot be read now .* mend the network or the rights"):
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


@pytest.mark.parametrize("part", ["manifest", "stream", "commit_success", "_CHECKPOINT_METADATA"])
def test_a_save_that_the_bucket_refuses_is_told_and_the_next_one_is_good(server, url, part):
    with Checkpointer(f"{url}/checkpoints", keep_checkpoints=2) as checkpointer:
        save(checkpointer, 1)
        server.refuse = lambda method, name: 403 if method in ("POST", "PUT") and part in name else None
        with pytest.raises(SaveError, match="a checkpoint could not be written"):
            save(checkpointer, 2)
        server.refuse = lambda method, name: None
        save(checkpointer, 3)
        assert checkpointer.steps() == [1, 3]
        assert checkpointer.restore(3, like=LIKE).loop == {"step": 3}


def test_a_bucket_that_is_gone_for_a_while_takes_the_save_after_that(server, url):
    with Checkpointer(f"{url}/checkpoints", keep_checkpoints=2) as checkpointer:
        save(checkpointer, 1)
        server.refuse = lambda method, name: 403
        for step in (2, 3):
            with pytest.raises(SaveError):
                save(checkpointer, step)
        server.refuse = lambda method, name: None
        save(checkpointer, 4)
        assert checkpointer.steps() == [1, 4]


def test_no_save_is_begun_before_its_lines_are_there(server, url):
    place = WorkDir(url)
    create(place)
    Path(place.metrics).write_text("line\n")
    with Checkpointer(place.checkpoints, keep_checkpoints=1) as checkpointer:
        server.refuse = lambda method, name: 403 if "metrics" in name else None
        with pytest.raises(DiskFullError, match=r"could not be written: .*metrics.jsonl could not be written"):
            _require_room(checkpointer, STATE, before_save=place.push)
        server.refuse = lambda method, name: None
        _require_room(checkpointer, STATE, before_save=place.push)
    assert server.read(f"{path_of(url)}/metrics.jsonl") == b"line\n"
