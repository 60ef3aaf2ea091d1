"""How config keys have changed since format version 1, so that later versions of the code resume earlier runs.

- A new key: add it to `ADDED_KEYS` with the value that reproduces the behavior of the code without the key. That value
  and the default in `default.py`, which new runs get, may differ. Entries stay forever.
- A renamed key: add it to `RENAMED_KEYS`. If one of these tables has the old name, replace it with the new one.
- A removed key: add it to `REMOVED_KEYS` with the value whose behavior the code still has. Runs with that value resume;
  others end with an error that names the key. Delete it from the other tables.

`tests/test_formats.py` resumes a stored run of format version 1, and fails if a key is missing here.
"""

from typing import Any

# key -> value (lists as tuples).
ADDED_KEYS: dict[str, Any] = {
    # One line per key.
    "max_hours": 0.0,
    "stages": (),
    "data.max_unknown_fraction": 1.0,
    "data.accept_changed_files": False,
    "data.eval_rows": "first",
    "data.first_shuffle_buffer_size": 0,
    "data.shuffle_buffer_bytes": 64 << 20,
    "data.shuffle_piece_bytes": 0,
    "data.interleave_shards": 1,
    "data.min_shards": 0,
    "masking.strategy": "token",
    "masking.eval_strategy": "token",
    "masking.eval_mlm_probability": None,
    "masking.eval_mask_replace_prob": None,
    "masking.eval_random_replace_prob": None,
    "loss.z_loss": 0.0,
    "loss.label_smoothing": 0.0,
    "optimizer.name": "adamw",
    "optimizer.adam_learning_rate": None,
    "optimizer.decay_steps": None,
    "optimizer.decay_shape": None,
    "optimizer.end_factor": None,
    "optimizer.muon_momentum": None,
    "optimizer.muon_iterations": None,
    "optimizer.muon_scale": None,
    "optimizer.lion_beta1": None,
    "optimizer.lion_beta2": None,
    "optimizer.adafactor_decay_rate": None,
    "optimizer.adafactor_clipping_threshold": None,
    "optimizer.layer_decay": 1.0,
    "optimizer.ema_decay": 0.0,
    "eval.probes": (),
    "eval.pairs": (),
    "checkpoint.init_from": None,
    "checkpoint.init_mode": None,
    "export.sentence_transformers": False,
}
# old key -> new key.
RENAMED_KEYS: dict[str, str] = {}
# key -> the only value with which a run can be resumed (lists as tuples).
REMOVED_KEYS: dict[str, Any] = {}
