"""The ledger shows what the training loop used."""

import glob
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from mlm import steps
from mlm.errors import UserError
from mlm.masking import mask_tokens
from mlm.modes import show_data
from mlm.reporting import reporter
from mlm.train import train_and_evaluate
from tests.tiny import settings_of, tiny_config, write_corpus

STEPS = 8
REPO = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(config, work directory, rows by step, inputs and targets by row number and step) of a run that was cut off."""
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

    def masked(tokens_BxL, *, rows_B, key, spec):
        batch = mask_tokens(tokens_BxL, rows_B=rows_B, key=key, spec=spec)

        def record(key, numbers, *masked):
            for n, number in enumerate(numbers.tolist()):
                inputs[tuple(key.tolist()), number] = [np.asarray(part)[n] for part in masked]

        data = (jax.random.key_data(key), rows_B, *jax.tree.leaves(batch))
        jax.debug.callback(record, *data)
        return batch

    real_update = reporter.Reporter.update
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reporter.Reporter, "update", update)
        patch.setattr(steps, "mask_tokens", masked)
        train_and_evaluate(settings_of(config), workdir)
    return config, workdir, rows, inputs


@pytest.mark.slow
@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_the_rows_shown_are_those_the_loop_used(run, step):
    """Steps before the first checkpoint kept, right after one, and between."""
    config, workdir, rows, inputs = run
    update = show_data.replay(settings_of(config), workdir, step=step)
    assert update.tokens_RxL.tolist() == rows[step].tolist()
    assert update.number == (step if step < 5 else step + 2)
    key = jax.random.fold_in(steps.random_key(config.seed, steps.TRAIN_MASKS), step - 1)
    key = tuple(jax.random.key_data(key).tolist())
    for n in range(len(update.tokens_RxL)):
        used = inputs[key, n]
        shown = [leaf[n] for leaf in jax.tree.leaves(update.masked)]
        assert all(np.array_equal(a, b) for a, b in zip(used, shown, strict=True))


def test_documents_are_those_of_the_rows(run):
    config, workdir, *_ = run
    paths = sorted(glob.glob(config.data.data_files))
    lines = [[json.loads(line)["text"] for line in Path(path).read_text().splitlines()] for path in paths]
    for step in (1, 5, STEPS):
        update = show_data.replay(settings_of(config), workdir, step=step)
        hf = update.text.tokenizer.hf
        texts = [[] for _ in update.tokens_RxL]
        for document in update.documents:
            assert update.text.shard_name(document.source, document.shard) == repr(paths[document.shard])
            for row in document.batch_rows:
                texts[row].append(lines[document.shard][document.row])
        for tokens, parts in zip(update.tokens_RxL.tolist(), texts, strict=True):
            # The row is a stretch of its documents, and of no fewer.
            whole = "".join(f"<s>{text}</s>" for text in parts)
            shown = hf.decode(tokens)
            assert shown in whole
            assert all(shown not in "".join(f"<s>{text}</s>" for text in part) for part in (parts[1:], parts[:-1]))


def test_a_run_on_two_processes_that_went_on_as_three(run, tmp_path, monkeypatch):
    """The history of processes is in the stream's state: any update of any process is made again."""
    config, _, *_ = run
    config = config.copy_and_resolve_references()
    config.data.skip_steps = ()
    workdir = str(tmp_path)
    from mlm import build
    from mlm.run import workdir as workdirs

    place = workdirs.WorkDir(workdir)
    built = build.build(settings_of(config), place)
    text = built.text
    place.create(config.to_dict(), save_tokenizer=built.tokenizer.save, processes=3, rows_per_process=8, step=0)
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
    monkeypatch.setattr(show_data.Checkpointer, "streams", lambda self, step: checkpoints[step])
    for kept in ([6], [4, 6]):
        monkeypatch.setattr(show_data.Checkpointer, "steps", lambda self, kept=kept: kept)
        for step, process in [(2, 1), (4, 0), (5, 2), (6, 0), (8, 1)] if len(kept) == 1 else [(3, 0), (5, 1)]:
            rows = used[step, process]
            update = show_data.replay(settings_of(config), workdir, step=step, process_index=process)
            assert update.tokens_RxL.tolist() == rows.tolist()
            assert (update.process_count, update.first_row) == ((2, 12 * process) if step <= 4 else (3, 8 * process))
    with pytest.raises(UserError, match="--process=2: update 4 had processes 0 to 1"):
        show_data.replay(settings_of(config), workdir, step=4, process_index=2)


def test_what_is_printed(run, capsys):
    config, workdir, *_ = run
    show_data.run(settings_of(config), workdir, step=5, sequences=2, process=0)
    shown = capsys.readouterr().out
    total = config.per_device_train_batch_size * 2 * jax.local_device_count()
    update = show_data.replay(settings_of(config), workdir, step=5)
    assert f"step 5: batch 7 of the data, epoch {update.epoch}; 2 of the {total} sequences of process 0 of 1\n" in shown
    assert "\nsequence 1\n" in shown
    assert "\nsequence 2\n" not in shown
    assert ".jsonl', row " in shown
    tokenizer = update.text.tokenizer
    assert show_data.decode_masked(tokenizer, update.masked, 0) in shown
    # With its targets in place it is the row.
    text = show_data.decode_masked(tokenizer, update.masked, 1)
    assert "[<mask>=" in "".join(show_data.decode_masked(tokenizer, update.masked, n) for n in range(8))
    masked = update.masked
    places = sorted(masked.masked_positions_BxK[1][masked.label_weights_BxK[1] > 0].tolist())
    for place in places:
        word, was = (tokenizer.hf.decode([ids[1, place]]) for ids in (masked.inputs_BxL, update.tokens_RxL))
        text = text.replace(f"[{word}={was}]", was, 1)
    assert text == tokenizer.hf.decode(update.tokens_RxL[1])


@pytest.mark.slow
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
    result = subprocess.run([*command, "--step=7", "--rows=3"], cwd=REPO, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    show_data.run(settings_of(config), workdir, step=7, sequences=3, process=0)
    assert result.stdout == capsys.readouterr().out
    result = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (
        2,
        "error: --mode=show_data needs the update to show, such as --step=100\n",
    )


def test_what_cannot_be_shown_is_told(run, tmp_path):
    config, workdir, *_ = run
    with pytest.raises(UserError, match="there is no run"):
        show_data.replay(settings_of(config), str(tmp_path / "none"), step=1)
    with pytest.raises(UserError, match="updates are numbered from 1"):
        show_data.replay(settings_of(config), workdir, step=0)
    with pytest.raises(UserError, match="--process=1: update 2 had processes 0 to 0"):
        show_data.replay(settings_of(config), workdir, step=2, process_index=1)
    other = config.copy_and_resolve_references()
    other.seed = 7
    with pytest.raises(UserError, match="holds a run with another config: seed"):
        show_data.replay(settings_of(other), workdir, step=2)
