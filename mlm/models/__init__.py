"""The encoder, its configuration and its Hugging Face doubles.

`config.EncoderConfig` says which model, `encoder.MaskedLM` is the model, `weights` carries its parameters
from and to PyTorch's names and layouts. Nothing here knows data, devices or files.
"""
