"""Makes roberta.npz, the golden file of tests/test_models.py and tests/test_weights.py, with PyTorch.

Run it in a separate environment, because the trainer does not need PyTorch:

    python3.11 -m venv /tmp/torchenv
    /tmp/torchenv/bin/pip install torch==2.13.0 transformers==5.23.0
    /tmp/torchenv/bin/python tests/golden/make_roberta.py

The model is small with odd sizes, and no parameter has a trivial value: biases and padding rows are not zero, norm
scales are not one, and the norms' epsilon is large enough to affect the result. The file contains

    config              config.json as save_pretrained writes it
    default_config      RobertaConfig().to_dict()
    state_dict_shapes   {name: shape} of state_dict()
    saved_shapes        {name: shape} of model.safetensors
    inputs              [B, L] token ids; padding at the end, at the start and in the middle
    labels              [B, L] token ids, -100 where no token is predicted
    logits              [B, L, V] in eval mode
    loss                mean cross-entropy over labels
    initial_zero_rows   {name: rows} of embeddings that are initialized to zero
    tensor/<name>       the tensors of model.safetensors
    gradient/<name>     gradient of the loss, for the same tensors

JSON values are strings. The same seed gives the same file, except for the last digits of logits and gradients.
"""

import json
import pathlib
import tempfile

import numpy as np
import safetensors.numpy
import torch
from transformers import RobertaConfig, RobertaForMaskedLM

_PAD = 3


def _config() -> RobertaConfig:
    return RobertaConfig(
        vocab_size=97,
        hidden_size=36,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=50,
        max_position_embeddings=21,
        type_vocab_size=3,
        layer_norm_eps=1e-3,
        pad_token_id=_PAD,
        bos_token_id=0,
        eos_token_id=2,
    )


def _perturb(model: RobertaForMaskedLM) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = 1.0 if "orm.weight" in name else 0.0  # LayerNorm.weight, layer_norm.weight
            parameter.normal_(mean, 0.25)


def _inputs() -> torch.Tensor:
    inputs = torch.randint(_PAD + 1, 97, (5, 17))
    inputs[1, 11:] = _PAD
    inputs[2, :4] = _PAD
    inputs[3, 5:8] = _PAD
    inputs[4, 1:] = _PAD
    return inputs


def _shapes(tensors: dict) -> str:
    return json.dumps({name: list(tensor.shape) for name, tensor in tensors.items()})


def _initial_zero_rows(model: RobertaForMaskedLM) -> dict[str, list[int]]:
    return {
        name: torch.nonzero((parameter == 0).all(dim=1)).flatten().tolist()
        for name, parameter in model.named_parameters()
        if "embeddings.weight" in name
    }


def main() -> None:
    """Writes roberta.npz beside this file."""
    torch.manual_seed(0)
    model = RobertaForMaskedLM(_config()).eval()
    initial_zero_rows = _initial_zero_rows(model)
    _perturb(model)
    inputs = _inputs()
    predicted = (torch.rand(inputs.shape) < 0.5) & (inputs != _PAD)
    labels = torch.where(predicted, torch.randint(97, inputs.shape), -100)

    output = model(inputs, attention_mask=(inputs != _PAD).long(), labels=labels)
    output.loss.backward()
    gradients = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}

    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        config = pathlib.Path(directory, "config.json").read_text()
        saved = safetensors.numpy.load_file(pathlib.Path(directory, "model.safetensors"))

    path = pathlib.Path(__file__).with_name("roberta.npz")
    np.savez_compressed(
        path,
        config=config,
        default_config=json.dumps(RobertaConfig().to_dict()),
        state_dict_shapes=_shapes(model.state_dict()),
        saved_shapes=_shapes(saved),
        inputs=inputs.numpy().astype(np.int32),
        labels=labels.numpy().astype(np.int32),
        logits=output.logits.detach().numpy(),
        loss=output.loss.detach().numpy(),
        initial_zero_rows=json.dumps(initial_zero_rows),
        **{f"tensor/{name}": tensor for name, tensor in saved.items()},
        **{f"gradient/{name}": gradients[name] for name in saved},
    )
    print(f"{path}: {path.stat().st_size:,} bytes, loss {output.loss.item():.4f}, {len(saved)} tensors")


if __name__ == "__main__":
    main()
