"""A base-sized encoder from scratch, with the recipe that we recommend today, at the token budget of the reference run.

Command:   python main.py --config=configs/encoder_base.py --workdir=runs/encoder_base
Hardware:  TPU v3-8 (8 cores x 128 sequences x 128 tokens = 131,072 tokens per step), or 8 GPUs
Time:      about 1.5 hours, if it reaches 40 % of the peak rate (9.8e17 FLOP for the model, 5 % more for Muon)
Memory:    8.6 of 17.2 GB of a v3 core, in the second stage 11.5 GB
Expected:  not known: compiled for a TPU v3-8, but not trained yet

ModernBERT's layers; attention within documents; 30 % of the tokens masked, falling to 15 %; Muon with updates scaled to
AdamW's, so that it can use AdamW's learning rates; warm-up, a constant rate, then a decay over the last tenth, which
has sequences of 512 tokens. The quickstart has the same parts at a small size, and docs/recipes.md shows how much each
contributes there.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    """Returns the configuration."""
    config = default.get_config()
    config.num_train_steps = 10_000
    config.per_device_train_batch_size = 128
    config.per_device_eval_batch_size = 128
    config.logging_steps = 250
    config.eval_steps = 1_000
    config.save_steps = 1_000

    config.stages = (
        {"name": "pretrain", "steps": 0.9},
        {"name": "extend", "data.max_seq_length": 512, "per_device_train_batch_size": 32},
    )

    config.data.dataset_name = "allenai/c4"
    config.data.dataset_config_name = "en"
    config.data.max_seq_length = 128
    config.data.packing = "best_fit"
    # Documents of one crawl file are in random order already; a larger window costs host memory.
    config.data.shuffle_buffer_size = 10_000

    config.tokenizer.tokenizer_name = "answerdotai/ModernBERT-base"
    config.model.model_type = "modernbert"
    config.model.config_name = "answerdotai/ModernBERT-base"
    config.model.dtype = "bfloat16"
    config.model.overrides.global_rope_theta = 10_000.0

    config.masking.mlm_probability = (0.3, 0.15)

    config.optimizer.name = "muon"
    config.optimizer.muon_scale = "rms"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.adam_learning_rate = 1e-3
    config.optimizer.adam_beta2 = 0.98
    config.optimizer.warmup_steps = 0.05
    config.optimizer.schedule = "wsd"
    config.optimizer.decay_steps = 0.1
    config.optimizer.weight_decay = 0.01
    config.optimizer.max_grad_norm = 1.0
    return config
