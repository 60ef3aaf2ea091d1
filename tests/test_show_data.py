"""--mode=show_data recomputes what the training loop used."""

import glob
import json
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from mlm import build, steps
from mlm.errors import UserError
from mlm.masking import mask_tokens
from mlm.modes import show_data
from mlm.reporting import reporter
from mlm.run.checkpoint import Checkpointer
from mlm.run.workdir import WorkDir
from mlm.train import train_and_evaluate
from tests import fork_server
from tests.tiny import settings_of, tiny_config, write_corpus

STEPS = 8
REPO = Path(__file__).parent.parent


# All of them read a complete run.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(config, work directory, rows by step, masked rows by key and row number) of a run of 8 steps."""
    corpus = write_corpus(tmp_path_factory.mktemp("corpus"), documents=160)
    config = tiny_config(corpus)
    config.gradient_accumulation_steps = 2
    config.save_steps = 3
    config.eval_steps = STEPS
    config.data.skip_steps = ((5, 6),)
    workdir = str(tmp_path_factory.mktemp("runs") / "run")
    rows, inputs = {}, {}

    def update(self, step, metrics, batch, *, wait_seconds):
        rows[step] = batch.tokens
        real_update(self, step, metrics, batch, wait_seconds=wait_seconds)

    def masked(tokens_BxL, *, rows_B, key, **options):
        batch = mask_tokens(tokens_BxL, rows_B=rows_B, key=key, **options)

        def record(key, numbers, *masked):
            for n, number in enumerate(numbers.tolist()):
                inputs[tuple(key.tolist()), number] = [np.asarray(part)[n] for part in masked]

        data = (jax.random.key_data(key), rows_B, *jax.tree.leaves(batch))
        jax.debug.callback(record, *data)
        return batch

    real_update = reporter.Reporter.add_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reporter.Reporter, "add_step", update)
        patch.setattr(steps, "mask_tokens", masked)
        train_and_evaluate(settings_of(config), workdir)
    return config, workdir, rows, inputs


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_recomputed_rows_and_masks_equal_those_of_the_loop(run, step):
    """For steps before the first checkpoint that is still there, right after one, and in between."""
    config, workdir, rows, inputs = run
    data = show_data.replay(settings_of(config), workdir, step=step)
    assert data.tokens_BxL.tolist() == rows[step].tolist()
    assert data.batch_number == (step if step < 5 else step + 2)
    key = jax.random.fold_in(steps.random_key(config.seed, steps.TRAIN_MASKS), step - 1)
    key = tuple(jax.random.key_data(key).tolist())
    for n in range(len(data.tokens_BxL)):
        used = inputs[key, n]
        shown = [leaf[n] for leaf in jax.tree.leaves(data.masked)]
        assert all(np.array_equal(a, b) for a, b in zip(used, shown, strict=True))


def test_documents_contain_the_text_of_the_rows(run):
    config, workdir, *_ = run
    paths = sorted(glob.glob(config.data.data_files))
    lines = [[json.loads(line)["text"] for line in Path(path).read_text().splitlines()] for path in paths]
    for step in (1, 5, STEPS):
        data = show_data.replay(settings_of(config), workdir, step=step)
        hf = data.text.tokenizer.hf
        texts = [[] for _ in data.tokens_BxL]
        for document in data.documents:
            assert data.text.shard_name(document.source, document.shard) == repr(paths[document.shard])
            for row in document.batch_rows:
                texts[row].append(lines[document.shard][document.row])
        for tokens, parts in zip(data.tokens_BxL.tolist(), texts, strict=True):
            # The row is part of its documents, and needs every one of them.
            whole = "".join(f"<s>{text}</s>" for text in parts)
            shown = hf.decode(tokens)
            assert shown in whole
            assert all(shown not in "".join(f"<s>{text}</s>" for text in part) for part in (parts[1:], parts[:-1]))


def test_a_run_of_two_processes_that_resumed_with_three(run, tmp_path, monkeypatch):
    """The stream state records the numbers of processes: any step of any process is recomputed."""
    config, _, *_ = run
    config = config.copy_and_resolve_references()
    config.data.skip_steps = ()
    workdir = WorkDir(str(tmp_path))
    built = build.build(settings_of(config), workdir)
    text = built.text
    workdir.create(settings_of(config), save_tokenizer=built.tokenizer.save, processes=3, rows_per_process=8, step=0)
    used = {}

    def make(streams, first, last):
        for step in range(first, last + 1):
            for process, stream in enumerate(streams):
                used[step, process] = next(stream)

    two = [text.batches(process_index=n, process_count=2, batch_rows=12) for n in range(2)]
    make(two, 1, 4)
    three = [text.batches(process_index=n, process_count=3, batch_rows=8) for n in range(3)]
    for stream in three:
        stream.restore([stream.state_dict() for stream in two])
    checkpoints = {4: [stream.state_dict() for stream in two]}
    make(three, 5, 6)
    checkpoints[6] = json.loads(json.dumps([stream.state_dict() for stream in three]))
    make(three, 7, 8)
    monkeypatch.setattr(Checkpointer, "streams", lambda self, step: checkpoints[step])
    for kept in ([6], [4, 6]):
        monkeypatch.setattr(Checkpointer, "steps", lambda self, kept=kept: kept)
        for step, process in [(2, 1), (4, 0), (5, 2), (6, 0), (8, 1)] if len(kept) == 1 else [(3, 0), (5, 1)]:
            rows = used[step, process]
            data = show_data.replay(settings_of(config), str(tmp_path), step=step, process_index=process)
            assert data.tokens_BxL.tolist() == rows.tolist()
            assert (data.process_count, data.first_row) == ((2, 12 * process) if step <= 4 else (3, 8 * process))
    with pytest.raises(UserError, match="--process=2: step 4 had processes 0 to 1"):
        show_data.replay(settings_of(config), str(tmp_path), step=4, process_index=2)


def test_the_printed_sequences(run, capsys):
    config, workdir, *_ = run
    show_data.run(settings_of(config), workdir, step=5, sequences=2, process=0)
    shown = capsys.readouterr().out
    total = config.per_device_train_batch_size * 2 * jax.local_device_count()
    data = show_data.replay(settings_of(config), workdir, step=5)
    assert f"step 5: batch 7 of the data, epoch {data.epoch}; 2 of the {total} sequences of process 0 of 1\n" in shown
    assert "\nsequence 1\n" in shown
    assert "\nsequence 2\n" not in shown
    assert ".jsonl', document " in shown
    tokenizer = data.text.tokenizer
    assert show_data.decode_masked(tokenizer, data.masked, 0) in shown
    # With the labels in place of [input=label] it is the row.
    text = show_data.decode_masked(tokenizer, data.masked, 1)
    assert "[<mask>=" in "".join(show_data.decode_masked(tokenizer, data.masked, n) for n in range(8))
    masked = data.masked
    positions = sorted(masked.masked_positions_BxK[1][masked.label_weights_BxK[1] > 0].tolist())
    for position in positions:
        token, label = (tokenizer.hf.decode([ids[1, position]]) for ids in (masked.inputs_BxL, data.tokens_BxL))
        text = text.replace(f"[{token}={label}]", label, 1)
    assert text == tokenizer.hf.decode(data.tokens_BxL[1])


def test_the_command_line(run, tmp_path, capsys):
    config, workdir, *_ = run
    (tmp_path / "config.py").write_text(
        "from tests.tiny import tiny_config\n\n\ndef get_config():\n"
        f"    config = tiny_config({config.data.data_files!r})\n"
        "    config.gradient_accumulation_steps = 2\n"
        "    return config\n"
    )
    command = [sys.executable, "main.py", f"--config={tmp_path / 'config.py'}", f"--workdir={workdir}"]
    command += ["--config.data.skip_steps=((5, 6),)", "--mode=show_data"]
    result = fork_server.run([*command, "--step=7", "--sequences=3"], cwd=REPO)
    assert result.returncode == 0, result.stderr
    show_data.run(settings_of(config), workdir, step=7, sequences=3, process=0)
    assert result.stdout == capsys.readouterr().out
    result = fork_server.run(command, cwd=REPO)
    assert (result.returncode, result.stderr) == (
        2,
        "error: --step: missing; --mode=show_data needs it, such as --step=100\n",
    )


def test_errors(run, tmp_path):
    config, workdir, *_ = run
    with pytest.raises(UserError, match="contains no run"):
        show_data.replay(settings_of(config), str(tmp_path / "none"), step=1)
    with pytest.raises(UserError, match="--step=0: must be at least 1"):
        show_data.replay(settings_of(config), workdir, step=0)
    with pytest.raises(UserError, match="--process=1: step 2 had processes 0 to 0"):
        show_data.replay(settings_of(config), workdir, step=2, process_index=1)
    other = config.copy_and_resolve_references()
    other.seed = 7
    with pytest.raises(UserError, match="holds a run with another config: seed"):
        show_data.replay(settings_of(other), workdir, step=2)
    copy = shutil.copytree(workdir, tmp_path / "run")
    shutil.rmtree(copy / "checkpoints" / str(STEPS) / "stream")
    with pytest.raises(UserError, match=rf"cannot read checkpoint {STEPS} \(.*\); rerun the run's command"):
        show_data.replay(settings_of(config), str(copy), step=2)
