"""Do other versions of transformers load the exported models, with the same token ids and logits?

    python benchmarks/export_compatibility.py --python=/tmp/transformers4/bin/python

Exports a small random model with its tokenizer for each family, and one with a tokenizer without begin and end tokens.
Then the other interpreter, which needs torch and transformers, loads each with the Auto classes, and prints a table:

    ids         the ids of the texts are those of training
    logits      largest difference of the logits, relative to the largest logit
    bfloat16    the same for the model exported in bfloat16, the larger of eager attention and SDPA
    fill-mask   pipeline("fill-mask", model=DIR) works
    truncation  number of tokens of a long text with truncation=True

The texts are one padded batch. It exits with 1 if ids or the number of tokens differ, logits differ by more than 1e-4
(BFLOAT16_TOLERANCE in bfloat16), or if any logit in bfloat16 is not finite, those of padding included.
"""

import argparse
import itertools
import json
import pathlib
import subprocess
import sys
import tempfile

import numpy as np

TEXTS = ["the cat sees a dog", "Déjà vu: the river, the tree and the house!", "12.5 \ufb01sh  don't \U0001f642", ""]
MAX_TOKENS = 40
TOLERANCE = 1e-4
BFLOAT16_TOLERANCE = 0.1
# Fields with other values than the family's defaults, where a family has the field.
FIELDS = {
    "hidden_size": 16, "num_hidden_layers": 5, "num_attention_heads": 2, "intermediate_size": 24, "embedding_size": 8,
    "max_position_embeddings": MAX_TOKENS, "layer_norm_eps": 1e-3, "hidden_act": "relu", "num_hidden_groups": 2,
    "inner_group_num": 2, "rotary_value": True, "global_rope_theta": 20_000.0, "local_rope_theta": 5_000.0,
    "global_attn_every_n_layers": 2, "local_attention": 6, "classifier_activation": "relu", "norm_bias": True,
}  # fmt: skip


def export_all(folder: pathlib.Path) -> None:
    from mlm.data.tokenizer import load_tokenizer
    from mlm.data.train_tokenizer import train_tokenizer
    from mlm.models.families import FAMILIES

    corpus = TEXTS * 50
    for family in FAMILIES:
        options = {"vocab_size": 340, "max_seq_length": 1000}
        export(folder / family, family, train_tokenizer(iter(corpus), model_type=family, **options))
    export(folder / "named", "roberta", load_tokenizer(tokenizer_without_post_processor(folder)))


def tokenizer_without_post_processor(folder: pathlib.Path) -> str:
    import tokenizers
    import transformers

    words = sorted({word for text in TEXTS for word in text.split()})
    names = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "<entity>", *words]
    model = tokenizers.models.WordLevel({name: id for id, name in enumerate(names)}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token", "mask_token"), names, strict=False))
    path = str(folder / "named_tokenizer")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, extra_special_tokens=["<entity>"], **special
    ).save_pretrained(path)
    return path


def export(folder: pathlib.Path, family: str, tokenizer) -> None:
    import jax
    import pyarrow as pa

    from configs import default
    from mlm.export.model_card import build_card
    from mlm.export.model_directory import export_model
    from mlm.models.config import default_config
    from mlm.models.encoder import MaskedLM
    from mlm.settings import RunSettings

    config = default_config(family)
    fields = {name: value for name, value in FIELDS.items() if name in config.family.fields}
    if family == "roformer":
        fields.pop("global_rope_theta", None)
    if config.max_seq_length < config.max_position_embeddings:  # RoBERTa has rows before the first position.
        fields["max_position_embeddings"] += tokenizer.pad_id + 1
    ids = {"pad_token_id": tokenizer.pad_id}
    if config.bos_token_id is not None:
        ids |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    config = config.replace(vocab_size=tokenizer.num_ids, **fields, **ids)

    token_ids, offsets = tokenizer.encode(pa.array(TEXTS))
    rows = [
        [tokenizer.bos_id, *token_ids[start:stop].tolist(), tokenizer.eos_id]
        for start, stop in itertools.pairwise(offsets)
    ]
    inputs_BxL = np.full((len(rows), max(map(len, rows))), tokenizer.pad_id, np.int32)
    for inputs_L, row in zip(inputs_BxL, rows, strict=True):
        inputs_L[: len(row)] = row
    model = MaskedLM(config)
    params = jax.jit(model.init)(jax.random.key(0), inputs_BxL)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: np.asarray(leaf + rng.normal(0, 0.2, leaf.shape), np.float32), params)
    logits_BxLxV = np.asarray(jax.jit(model.apply)({"params": params}, inputs_BxL))
    folder.mkdir()
    np.savez(folder / "expected.npz", logits=logits_BxLxV, ids=json.dumps(rows))
    card = build_card(
        RunSettings.from_dict(default.get_config().to_dict()), title=family, model_type=family, step=0,
        sequences_per_step=1, tokens_seen=0, hardware="",
    )  # fmt: skip
    for name, dtype in (("model", "float32"), ("model_bfloat16", "bfloat16")):
        export_model(
            str(folder / name), step=0, params=params, config=config, tokenizer=tokenizer, card=card, metrics={},
            predictions=[], metrics_path=str(folder / "metrics.jsonl"), dtype=dtype,
        )  # fmt: skip


def check_all(folder: pathlib.Path) -> bool:
    """Prints a line for each model, in the other interpreter; returns True if all are as expected."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print(f"transformers {transformers.__version__}, torch {torch.__version__}, Python {sys.version.split()[0]}\n")
    print("| model | tokenizer | ids | logits | bfloat16 | fill-mask | truncation |\n|---|---|---|---|---|---|---|")
    all_good = True
    for path in sorted(folder.glob("*/expected.npz")):
        model_path = path.parent / "model"
        with np.load(path) as file:
            expected, rows = file["logits"], json.loads(str(file["ids"]))
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(model_path)
            model = transformers.AutoModelForMaskedLM.from_pretrained(model_path).eval()
            same_ids = tokenizer(TEXTS)["input_ids"] == rows
            with torch.no_grad():
                batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
                logits = model(**batch).logits.numpy() if same_ids else np.full_like(expected, np.nan)
            is_token = batch["attention_mask"].numpy() > 0
            difference = np.abs(logits - expected)[is_token].max() / np.abs(expected).max() if same_ids else np.nan
            half = bfloat16_difference(f"{model_path}_bfloat16", batch, expected, is_token) if same_ids else np.nan
            fill_mask = transformers.pipeline("fill-mask", model=str(model_path))
            filled = len(fill_mask(f"the {fill_mask.tokenizer.mask_token} sees")) == 5
            length = len(tokenizer("the " * 1000, truncation=True)["input_ids"])
        except Exception as error:  # Any class: the table has all models.
            print(f"| {path.parent.name} | {type(error).__name__}: {' '.join(str(error).split())[:100]} |")
            all_good = False
            continue
        good = same_ids and difference <= TOLERANCE and half <= BFLOAT16_TOLERANCE and filled and length == MAX_TOKENS
        all_good = all_good and good
        differences = f"{difference:.1e}", f"{half:.1e}"
        words = ["equal" if same_ids else "DIFFER", *differences, "works" if filled else "FAILS", str(length)]
        print(f"| {path.parent.name} | {type(tokenizer).__name__} | {' | '.join(words)} |")
    return all_good


def bfloat16_difference(model_path: str, batch, expected: np.ndarray, is_token: np.ndarray) -> float:
    """Returns the largest relative difference of the logits in bfloat16; NaN if any logit is not finite."""
    import torch
    import transformers

    differences = []
    for attention in ("eager", "sdpa"):
        try:
            model = transformers.AutoModelForMaskedLM.from_pretrained(
                model_path, torch_dtype="auto", attn_implementation=attention
            ).eval()
        except ValueError:  # Some families have no SDPA in some versions.
            continue
        assert model.dtype == torch.bfloat16
        with torch.no_grad():
            logits = model(**batch).logits.float().numpy()
        difference = np.abs(logits - expected)[is_token].max() / np.abs(expected).max()
        differences.append(difference if np.isfinite(logits).all() else np.nan)
    return float(np.max(differences))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", default=sys.executable, help="interpreter with torch and transformers")
    parser.add_argument("--export", type=pathlib.Path, help="only export to this new directory")
    parser.add_argument(
        "--check", type=pathlib.Path, help="only check the models in this directory, in this interpreter"
    )
    options = parser.parse_args()
    if options.check:
        sys.exit(not check_all(options.check))
    sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
    if options.export:
        options.export.mkdir()
        export_all(options.export)
        return
    with tempfile.TemporaryDirectory() as folder:
        export_all(pathlib.Path(folder))
        sys.exit(subprocess.run([options.python, __file__, f"--check={folder}"], check=False).returncode)


if __name__ == "__main__":
    main()
