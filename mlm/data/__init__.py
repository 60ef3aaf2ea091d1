"""Text -> this host's rows of token ids. NumPy and Arrow only; knows no device.

sources (files, docstrings) -> reader -> stream (tokenizer, packing) -> prefetch
"""
