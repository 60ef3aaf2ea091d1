"""ModernBERT-base from scratch on streamed English web text: the first and longest stage of the paper's training.

Command:   python main.py --config=configs/modernbert_base.py --workdir=runs/modernbert_base
Hardware:  8 x H100 (8 GPUs x 96 rows x 6 passes x 1,024 tokens = 4.7 million tokens an update)
Time:      about 5 days, estimated, not measured: 0.82 GFLOP a token (mlm/models/flops.py) x 1.7 trillion tokens at 40 %
           of the GPUs' peak
Expected:  not measured; no loss is published

From Warner et al., arXiv:2412.13663: rows of 1,024 tokens of packed documents that do not see each other, 30 % masked,
1.7 trillion tokens at a constant 8e-4 after 3 billion tokens of warm-up, 4,608 rows an update, weight decay 1e-5, betas
of 0.9 and 0.98, an epsilon of 1e-6. What is different: AdamW with its gradient clipped, where theirs clips update by
update (StableAdamW); as many rows from the start, where theirs grow; the text, for theirs is not published. Both kinds
of layers begin with a base of 10,000. For rows of 8,192 tokens start again from the result, the paper's second stage:

    --config.model.model_name_or_path=runs/modernbert_base/model --config.data.max_seq_length=8192
    --config.model.overrides.global_rope_theta=160000.0 --config.optimizer.learning_rate=3e-4
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

    config.optimizer.learning_rate = 8e-4
    # 3 billion tokens.
    config.optimizer.warmup_steps = 640
    config.optimizer.schedule = "constant"
    config.optimizer.adam_beta1 = 0.9
    config.optimizer.adam_beta2 = 0.98
    config.optimizer.adam_epsilon = 1e-6
    config.optimizer.weight_decay = 1e-5
    config.optimizer.max_grad_norm = 1.0
    return config
