"""Floating-point operations of a training step, computed from the encoder's config."""

from mlm.models.config import EncoderConfig


def flops_per_token(config: EncoderConfig, *, length: int, max_predictions_per_seq: int) -> float:
    """Returns the floating-point operations of forward and backward pass per token of a row.

    Only matrix products are counted: a multiply-add as two operations, the backward pass as twice the forward pass. The
    head, and all of the last layer but its keys and values, run on the predicted tokens only. Attention in a window
    counts 2 * window + 1 keys per query, even if the implementation computes more.

    Args:
      config: the model's config.
      length: tokens per row.
      max_predictions_per_seq: predicted tokens per row.
    """
    hidden, embedding, inner = config.hidden_size, config.embedding_width, config.intermediate_size
    predicted_fraction = max_predictions_per_seq / length
    feed_forward = (3 if config.family.gated else 2) * hidden * inner
    keys_and_values = 2 * hidden**2
    # Queries, attention, its output projection and the feed-forward network.
    rest: list[float] = [
        2 * hidden**2 + 2 * hidden * _num_keys(layer.window, length) + feed_forward for layer in config.layers
    ]
    rest[-1] *= predicted_fraction
    layers = len(rest) * keys_and_values + sum(rest)
    project = embedding * hidden if config.has_projection else 0
    head = hidden * embedding + embedding * config.vocab_size
    return 6.0 * (project + layers + head * predicted_fraction)


def _num_keys(window: int | None, length: int) -> int:
    return length if window is None else min(length, 2 * window + 1)
