"""Does transformers give our evaluation loss? For every family: train a tiny model, and ask PyTorch.

In the trainer's environment, then in one with torch and transformers (see make_families.py):

    python tests/golden/check_families.py train /tmp/families
    /tmp/torchenv/bin/python tests/golden/check_families.py check /tmp/families

The first makes a run a family, and writes the masked rows of its evaluation beside the model. The second loads
`<workdir>/model` with `AutoModelForMaskedLM`, gives it those rows, and compares its mean loss over what was masked
with the run's `eval/loss`. It prints a table, and fails where they differ by more than 1e-4.
"""

import json
import pathlib
import sys

import numpy as np

# Beside the tiny run of the tests.
_CHANGES = {
    "electra": {"embedding_size": 8},
    "albert": {"embedding_size": 8, "num_hidden_groups": 2, "inner_group_num": 2},
    "roformer": {"embedding_size": 8, "rotary_value": True},
    "modernbert": {"num_hidden_layers": 5, "local_attention": 6},
}


def train(folder: pathlib.Path) -> None:
    """Makes `folder`/<family>, a work directory each, with its masked evaluation rows in masked.npz."""
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
        config.data.packing = "pad_lines"  # With padding.
        config.data.max_seq_length = 24
        config.model.overrides.max_position_embeddings = 40
        config.model.model_type = family
        config.model.overrides.update(_CHANGES.get(family, {}))
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
    """Compares, and prints a line a family."""
    import torch
    import transformers

    print("| family | class | train/loss, first and last | eval/loss | transformers' | difference |")
    print("|---|---|---|---|---|---|")
    worst = 0.0
    for path in sorted(folder.glob("*/masked.npz")):
        with np.load(path) as file:
            rows = dict(file)
        model = transformers.AutoModelForMaskedLM.from_pretrained(path.parent / "model").eval()
        inputs = torch.tensor(rows["inputs_BxL"]).long()
        with torch.no_grad():
            logits = model(inputs, attention_mask=(inputs != int(rows["pad_id"])).long()).logits
        positions, targets = (torch.tensor(rows[name]).long() for name in ("positions_BxK", "targets_BxK"))
        at_masks = torch.take_along_dim(torch.log_softmax(logits, dim=-1), positions[:, :, None], dim=1)
        losses = -torch.take_along_dim(at_masks, targets[:, :, None], dim=2)[:, :, 0].numpy()
        theirs, ours = np.average(losses, weights=rows["weights_BxK"]), float(rows["loss"])
        worst = max(worst, abs(theirs - ours))
        fell = f"{rows['first_train_loss']:.2f}, {rows['last_train_loss']:.2f}"
        names = f"{path.parent.name} | {type(model).__name__}"
        print(f"| {names} | {fell} | {ours:.6f} | {theirs:.6f} | {abs(theirs - ours):.1e} |")
    if not worst <= 1e-4:
        sys.exit(f"they differ by {worst:.1e}")


if __name__ == "__main__":
    {"train": train, "check": check}[sys.argv[1]](pathlib.Path(sys.argv[2]))
