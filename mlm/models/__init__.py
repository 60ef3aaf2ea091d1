"""The encoder and its configuration. Nothing here reads data or knows devices.

config     `EncoderConfig`, a model's `config.json`; families  the differences between the ten families
encoder    `MaskedLM`: embeddings, layers (block), head; ops  the operations of a layer
flops      operations of a training step; hf  conversion from and to transformers' checkpoints
"""
