"""Compares the evaluation loss of an exported model with transformers', for every family.

In the trainer's environment, then in one with torch and transformers (see make_families.py):

    python tests/golden/check_families.py train /tmp/families
    /tmp/torchenv/bin/python tests/golden/check_families.py check /tmp/families

The first command trains a tiny model of each family and saves the masked evaluation sequences beside it. The second
loads `<workdir>/model` with `AutoModelForMaskedLM` and compares its mean loss on them with the run's `eval/loss`. It
prints a table, and exits with an error if a difference exceeds 1e-4.
"""

import json
import pathlib
import sys

import numpy as np

# Overrides in addition to those of the tests' tiny run.
_OVERRIDES = {
    "electra": {"embedding_size": 8},
    "albert": {"embedding_size": 8, "num_hidden_groups": 2, "inner_group_num": 2},
    "roformer": {"embedding_size": 8, "rotary_value": True},
    "modernbert": {"num_hidden_layers": 5, "local_attention": 6},
}


def train(folder: pathlib.Path) -> None:
    """Trains a model of each family in `folder`/<family> and writes masked.npz there."""
    root = pathlib.Path(__file__).parent.parent.parent
    sys.path[:0] = [str(root), str(root / "tests")]
    import jax
    from tiny import settings_of, tiny_config, write_corpus

    from mlm import build, steps, train
    from mlm.masking import mask_tokens
    from mlm.models.families import FAMILIES
    from mlm.run.workdir import WorkDir

    folder.mkdir(parents=True, exist_ok=True)
    corpus = write_corpus(folder)
    for family in FAMILIES:
        config = tiny_config(corpus)
        config.num_train_steps = config.eval_steps = config.save_steps = 200
        config.logging_steps = 50
        config.data.packing = "pad_lines"  # Rows with padding.
        config.data.max_seq_length = 24
        config.model.overrides.max_position_embeddings = 40
        config.model.model_type = family
        config.model.overrides.update(_OVERRIDES.get(family, {}))
        workdir = folder / family
        train.train_and_evaluate(settings_of(config), str(workdir))

        run = build.build(settings_of(config), WorkDir(str(workdir)))
        rows_RxL = run.text.eval_rows_RxL
        numbers_R = np.arange(len(rows_RxL), dtype=np.int32)
        key = run.step_config.key(steps.EVAL_MASKS)
        batch = mask_tokens(rows_RxL, rows_B=numbers_R, key=key, spec=run.step_config.masking)
        lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        np.savez(
            workdir / "masked.npz",
            pad_id=run.tokenizer.pad_id,
            loss=lines[-1]["eval/loss"],
            first_train_loss=next(line["train/loss"] for line in lines if "train/loss" in line),
            last_train_loss=lines[-1]["train/loss"],
            **{name: jax.device_get(getattr(batch, name)) for name in batch.__dataclass_fields__},
        )


def check(folder: pathlib.Path) -> None:
    """Prints a line for each family."""
    import torch
    import transformers

    print("| family | class | train/loss, first and last | eval/loss | in transformers | difference |")
    print("|---|---|---|---|---|---|")
    worst = 0.0
    for path in sorted(folder.glob("*/masked.npz")):
        with np.load(path) as file:
            rows = dict(file)
        model = transformers.AutoModelForMaskedLM.from_pretrained(path.parent / "model").eval()
        inputs = torch.tensor(rows["inputs_BxL"]).long()
        with torch.no_grad():
            logits = model(inputs, attention_mask=(inputs != int(rows["pad_id"])).long()).logits
        positions, labels = (torch.tensor(rows[name]).long() for name in ("masked_positions_BxK", "labels_BxK"))
        log_probs = torch.take_along_dim(torch.log_softmax(logits, dim=-1), positions[:, :, None], dim=1)
        losses = -torch.take_along_dim(log_probs, labels[:, :, None], dim=2)[:, :, 0].numpy()
        expected, loss = np.average(losses, weights=rows["label_weights_BxK"]), float(rows["loss"])
        worst = max(worst, abs(expected - loss))
        train_losses = f"{rows['first_train_loss']:.2f}, {rows['last_train_loss']:.2f}"
        names = f"{path.parent.name} | {type(model).__name__}"
        print(f"| {names} | {train_losses} | {loss:.6f} | {expected:.6f} | {abs(expected - loss):.1e} |")
    if not worst <= 1e-4:
        sys.exit(f"the losses differ by {worst:.1e}")


if __name__ == "__main__":
    {"train": train, "check": check}[sys.argv[1]](pathlib.Path(sys.argv[2]))
