"""ModernBERT-base from scratch on streamed English web text, in the paper's three stages.

Command:   python main.py --config=configs/modernbert_base.py --workdir=runs/modernbert_base
Hardware:  8 x H100 (8 GPUs x 96 sequences x 6 microbatches x 1,024 tokens = 4.7 million tokens per step)
Time:      8 days for the first stage at the authors' rate of 304 thousand tokens per second and GPU; our own was not
           measured
Expected:  not measured; no loss is published

The recipe is from Warner et al., arXiv:2412.13663, table 3. All stages: 30 % masked; StableAdamW with weight decay
1e-5, betas 0.9 and 0.98, epsilon 1e-6; sequences packed from documents that do not attend to each other.

- pretrain: 1.719 trillion tokens in batches of 4,608 sequences of 1,024 tokens, after a ramp from 768 sequences over
  the first 50 billion tokens; learning rate 8e-4, constant after 3 billion tokens of warm-up; RoPE base 10,000.
- extend: 250 billion tokens, 576 sequences of 8,192 tokens; learning rate 3e-4; RoPE base 160,000 in global layers.
- decay: 50 billion tokens, 1-sqrt decay of the learning rate to a thousandth.

Differences: the ramp has five steps, while the paper's batch grows continuously; the text is the same in all stages,
since the paper's is not published. The number of steps assumes 8 GPUs; "pretrain" gets the steps that the others leave.
"""

from ml_collections import ConfigDict

from configs import default
from mlm.stages import batch_ramp


def get_config() -> ConfigDict:
    """Returns the configuration."""
    config = default.get_config()
    config.num_train_steps = 446_320
    config.per_device_train_batch_size = 96
    config.per_device_eval_batch_size = 96
    config.gradient_accumulation_steps = 6
    config.logging_steps = 100
    config.eval_steps = 5_000
    config.save_steps = 1_000

    config.stages = (
        # 768 to 3,840 sequences.
        *batch_ramp((1, 2, 3, 4, 5), duration="50e9 tokens", key="gradient_accumulation_steps"),
        {"name": "pretrain", "gradient_accumulation_steps": 6},
        {
            "name": "extend",
            "steps": "250e9 tokens",
            "data.max_seq_length": 8_192,
            "per_device_train_batch_size": 12,
            "model.overrides.global_rope_theta": 160_000.0,
            "optimizer.learning_rate": 3e-4,
        },
        {
            "name": "decay",
            "steps": "50e9 tokens",
            "optimizer.schedule": "wsd",
            "optimizer.decay_steps": 1.0,
            "optimizer.end_factor": 0.001,
        },
    )

    config.data.dataset_name = "allenai/c4"
    config.data.dataset_config_name = "en"
    config.data.max_seq_length = 1_024
    config.data.packing = "isolate"

    config.tokenizer.tokenizer_name = "answerdotai/ModernBERT-base"
    config.model.model_type = "modernbert"
    config.model.config_name = "answerdotai/ModernBERT-base"
    config.model.dtype = "bfloat16"
    config.model.overrides.global_rope_theta = 10_000.0

    config.masking.mlm_probability = 0.3

    config.optimizer.name = "stable_adamw"
    config.optimizer.learning_rate = 8e-4
    config.optimizer.warmup_steps = "3e9 tokens"
    config.optimizer.schedule = "constant"
    config.optimizer.adam_beta1 = 0.9
    config.optimizer.adam_beta2 = 0.98
    config.optimizer.adam_epsilon = 1e-6
    config.optimizer.weight_decay = 1e-5
    return config
