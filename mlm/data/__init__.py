"""Text -> this host's batches of token ids, with NumPy and Arrow; imports no jax.

A batch goes sources -> reader -> stream (held-out documents, shuffle window, tokenizer, packing) -> mixture ->
prefetch. `shard_assignment` says which process reads what, and `pipeline` builds all of it from the settings.
"""
