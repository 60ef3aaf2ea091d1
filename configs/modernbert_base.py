"""ModernBERT-base from scratch on streamed English web text: the first and longest of the paper's training stages.

Command:   python main.py --config=configs/modernbert_base.py --workdir=runs/modernbert_base
Hardware:  8 x H100 (8 GPUs x 96 sequences x 6 microbatches x 1,024 tokens = 4.7 million tokens per step)
Time:      8 days at the authors' rate of 304 thousand tokens per second and GPU; our own was not measured
Expected:  not measured; no loss is published

The recipe is from Warner et al., arXiv:2412.13663: batches of 4,608 sequences of 1,024 tokens, packed from documents
that do not attend to each other; 30 % masked; 1.7 trillion tokens; learning rate 8e-4, constant after 3 billion tokens
of warm-up; StableAdamW with weight decay 1e-5, betas 0.9 and 0.98, epsilon 1e-6. Global and local layers both start
with a RoPE base of 10,000. Differences:

- a constant batch size, while the paper's grows during warm-up;
- the text, since the paper's is not published.

The paper's second stage, for sequences of 8,192 tokens, is a new run that starts from the model of this one:

    --config.model.config_name=None --config.model.model_name_or_path=runs/modernbert_base/model
    --config.data.max_seq_length=8192 --config.model.overrides.global_rope_theta=160000.0
    --config.optimizer.learning_rate=3e-4
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    """Returns the configuration."""
    config = default.get_config()
    config.num_train_steps = 360_000
    config.per_device_train_batch_size = 96
    config.per_device_eval_batch_size = 96
    config.gradient_accumulation_steps = 6
    config.logging_steps = 100
    config.eval_steps = 5_000
    config.save_steps = 1_000

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
