"""Makes the golden files of tests/test_families.py with PyTorch, one per case.

Run it in a separate environment, because the trainer does not need PyTorch:

    python3.11 -m venv /tmp/torchenv
    /tmp/torchenv/bin/pip install torch==2.13.0 transformers==5.23.0
    /tmp/torchenv/bin/python tests/golden/make_families.py

As in make_roberta.py the models are small with odd sizes, no parameter has a trivial value, and the epsilon of the
norms, where it can be set, is large enough to affect the result. A file contains

    config             config.json as save_pretrained writes it
    default_config     to_dict() of the config class's defaults
    state_dict_shapes  {name: shape} of state_dict()
    inputs             [B, L] token ids; padding at the end, at the start and in the middle
    token_types        [B, L] in families that have them, in segments of several tokens
    labels             [B, L] token ids, -100 where no token is predicted
    logits             [B, L, V] in eval mode
    loss               mean cross-entropy over labels
    initial_zero_rows  {name: rows} of matrices that are initialized to zero
    initial_deviation  {name: standard deviation} of the matrices of a new model
    tensor/<name>      the tensors of model.safetensors
    gradient/<name>    gradient of the loss, for some of the tensors

JSON values are strings. The same seed gives the same files, except for the last digits of logits and gradients.
"""

import json
import pathlib
import tempfile

import numpy as np
import safetensors.numpy
import torch
import transformers

_BERT = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "max_position_embeddings": 23,
    "type_vocab_size": 3,
    "layer_norm_eps": 1e-3,
    "pad_token_id": 3,
}
_WITHOUT_TYPES = {name: _BERT[name] for name in _BERT if name not in ("type_vocab_size", "layer_norm_eps")}
_MODERN = {**_WITHOUT_TYPES, "num_hidden_layers": 5, "norm_eps": 1e-3, "bos_token_id": 0, "eos_token_id": 2}
# Case -> model_type and overrides of its defaults.
_CASES = {
    "xlm_roberta": ("xlm-roberta", {**_BERT, "num_hidden_layers": 1}),
    "camembert": ("camembert", {**_BERT, "num_hidden_layers": 1, "hidden_act": "relu"}),
    "roberta_prelayernorm": ("roberta-prelayernorm", _BERT),
    "bert": ("bert", {**_BERT, "num_attention_heads": 3, "hidden_act": "gelu_new"}),
    "distilbert": (
        "distilbert",
        {
            "vocab_size": 61,
            "dim": 24,
            "n_layers": 3,
            "n_heads": 8,
            "hidden_dim": 37,
            "max_position_embeddings": 23,
            "pad_token_id": 3,
            "activation": "gelu_pytorch_tanh",
        },
    ),
    "electra": ("electra", {**_BERT, "embedding_size": 10, "hidden_act": "silu"}),
    "electra_one_width": ("electra", {**_BERT, "embedding_size": 24, "num_hidden_layers": 1}),
    "albert": (
        "albert",
        {**_BERT, "embedding_size": 10, "num_hidden_groups": 2, "inner_group_num": 2},
    ),
    "albert_one_width": ("albert", {**_BERT, "embedding_size": 24}),
    "roformer": ("roformer", {**_BERT, "num_attention_heads": 2, "embedding_size": 10, "rotary_value": True}),
    "roformer_one_width": ("roformer", {**_BERT, "num_hidden_layers": 1}),
    "modernbert": ("modernbert", {**_MODERN, "local_attention": 7}),
    "modernbert_otherwise": (
        "modernbert",
        {
            **_MODERN,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "global_attn_every_n_layers": 2,
            "local_attention": 10,
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 500.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
            },
            "attention_bias": True,
            "mlp_bias": True,
            "norm_bias": True,
            "classifier_bias": True,
            "decoder_bias": False,
            "hidden_activation": "silu",
            "classifier_activation": "relu",
            "tie_word_embeddings": False,
        },
    ),
}
_ROWS, _LENGTH = 5, 17


def _perturb(model: transformers.PreTrainedModel) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                *_, module, kind = name.lower().split(".")
                parameter.normal_(1.0 if "norm" in module and kind == "weight" else 0.0, 0.25)


def _inputs(*, pad: int, vocab_size: int) -> torch.Tensor:
    inputs = torch.randint(pad + 1, vocab_size, (_ROWS, _LENGTH))
    inputs[1, 11:] = pad
    inputs[2, :4] = pad
    inputs[3, 5:8] = pad
    inputs[4, 1:] = pad
    return inputs


def _shapes(tensors: dict) -> str:
    return json.dumps({name: list(tensor.shape) for name, tensor in tensors.items()})


def _matrices(model: transformers.PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.ndim == 2 and p.requires_grad}


def _make(case: str, model_type: str, changes: dict) -> None:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **changes)
    model = transformers.AutoModelForMaskedLM.from_config(config, attn_implementation="eager").eval()
    zero_rows = {name: torch.nonzero((p == 0).all(dim=1)).flatten().tolist() for name, p in _matrices(model).items()}
    deviation = {
        name: np.delete(p.numpy(), zero_rows[name], axis=0).std().item() for name, p in _matrices(model).items()
    }
    _perturb(model)
    inputs = _inputs(pad=config.pad_token_id, vocab_size=config.vocab_size)
    token_types = torch.randint(getattr(config, "type_vocab_size", 1), inputs.shape).sort(dim=1).values
    predicted = (torch.rand(inputs.shape) < 0.5) & (inputs != config.pad_token_id)
    labels = torch.where(predicted, torch.randint(config.vocab_size, inputs.shape), -100)

    extra = {"token_type_ids": token_types} if hasattr(config, "type_vocab_size") else {}
    output = model(inputs, attention_mask=(inputs != config.pad_token_id).long(), labels=labels, **extra)
    output.loss.backward()
    gradients = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}

    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        saved_config = pathlib.Path(directory, "config.json").read_text()
        saved = safetensors.numpy.load_file(pathlib.Path(directory, "model.safetensors"))

    names = [name for name in saved if name in gradients]
    shown = {name for i, name in enumerate(names) if i % 5 == 0 or "embeddings.weight" in name}
    path = pathlib.Path(__file__).with_name(f"{case}.npz")
    np.savez_compressed(
        path,
        config=saved_config,
        default_config=json.dumps(type(config)().to_dict()),
        state_dict_shapes=_shapes(model.state_dict()),
        inputs=inputs.numpy().astype(np.int32),
        labels=labels.numpy().astype(np.int32),
        logits=output.logits.detach().numpy(),
        loss=output.loss.detach().numpy(),
        initial_zero_rows=json.dumps(zero_rows),
        initial_deviation=json.dumps(deviation),
        **({"token_types": token_types.numpy().astype(np.int32)} if extra else {}),
        **{f"tensor/{name}": tensor for name, tensor in saved.items()},
        **{f"gradient/{name}": gradients[name] for name in sorted(shown)},
    )
    print(f"{path}: {path.stat().st_size:,} bytes, loss {output.loss.item():.4f}, {len(saved)} tensors")


def main() -> None:
    """Writes the files beside this one."""
    for case, (model_type, changes) in _CASES.items():
        _make(case, model_type, changes)


if __name__ == "__main__":
    main()
