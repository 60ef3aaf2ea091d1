"""RoBERTa-large from scratch on streamed English web text, with the paper's recipe.

Command:   python main.py --config=configs/roberta_large.py --workdir=runs/roberta_large
Hardware:  TPU v4-64 (32 chips x 32 sequences x 8 microbatches x 512 tokens = 4.2 million tokens per step)
Time:      about 14 days; an estimate from 2.01 GFLOP per token (mlm/models/flops.py) x 2.1 trillion tokens at 40 % of
           the chips' peak
Expected:  not measured; the paper's model reaches 90.2 on MNLI-m and 96.4 on SST-2 after fine-tuning (table 4)

The recipe is from Liu et al., arXiv:1907.11692, table 9: batches of 8,192 sequences of 512 tokens, 500,000 steps, peak
learning rate 4e-4 after 30,000 warm-up steps, linear decay, Adam with betas 0.9 and 0.98 and epsilon 1e-6, weight decay
0.01, no clipping. Only part of their 160 GB of text is available; `allenai/c4`, `en`, is the most similar open dataset.
On another number of devices, change gradient_accumulation_steps so that a step still has 8,192 sequences.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    """Returns the configuration."""
    config = default.get_config()
    config.num_train_steps = 500_000
    config.per_device_train_batch_size = 32
    config.per_device_eval_batch_size = 32
    config.gradient_accumulation_steps = 8
    config.logging_steps = 100
    config.eval_steps = 5_000
    config.save_steps = 1_000

    config.data.dataset_name = "allenai/c4"
    config.data.dataset_config_name = "en"
    config.data.max_seq_length = 512

    config.tokenizer.tokenizer_name = "FacebookAI/roberta-large"
    config.model.model_type = "roberta"
    config.model.config_name = "FacebookAI/roberta-large"
    config.model.dtype = "bfloat16"

    config.optimizer.learning_rate = 4e-4
    config.optimizer.warmup_steps = 30_000
    config.optimizer.adam_beta1 = 0.9
    config.optimizer.adam_beta2 = 0.98
    config.optimizer.adam_epsilon = 1e-6
    config.optimizer.weight_decay = 0.01
    return config
