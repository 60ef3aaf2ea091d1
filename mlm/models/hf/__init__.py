"""Hugging Face checkpoints: tensor names, conversion of weights, loading of pretrained models."""
