"""Floating-point operations of a training step, from the encoder's config alone."""

from mlm.models.config import EncoderConfig


def flops_per_token(config: EncoderConfig, *, length: int, max_predictions_per_seq: int) -> float:
    """Floating-point operations of forward and backward pass that the objective needs, per token of a row.

    Matrix products only, a multiply-add as two, the backward pass as twice the forward pass; the head, and all of the
    last layer but its keys and values, on the `slots` predicted positions of a row of `length` alone. Attention within
    a window counts with what the window holds (at a row's ends it holds less: that is left out), whatever the
    implementation computes besides.
    """
    hidden, embedding, inner = config.hidden_size, config.embedding_width, config.intermediate_size
    feed_forward = (3 if config.family.gated else 2) * hidden * inner
    keys_and_values = 2 * hidden**2
    asking = [2 * hidden**2 + 2 * hidden * _seen(layer.window, length) + feed_forward for layer in config.layers]
    asking[-1] *= max_predictions_per_seq / length
    layers = len(asking) * keys_and_values + sum(asking)
    project = embedding * hidden if config.has_projection else 0
    head = hidden * embedding + embedding * config.vocab_size
    return 6.0 * (project + layers + head * max_predictions_per_seq / length)


def _seen(window: int | None, length: int) -> int:
    return length if window is None else min(length, 2 * window + 1)
