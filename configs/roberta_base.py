"""The reference run: roberta-base from scratch on streamed English web text.

Command:   python main.py --config=configs/roberta_base.py --workdir=runs/roberta_base
Hardware:  TPU v3-8 (8 cores x 128 sequences x 128 tokens = 131,072 tokens per step)
Time:      not measured yet; 10,000 steps are 1.3 billion tokens
Expected:  not measured yet

The values are those of the reference command, from Hugging Face's Flax example `run_mlm_flax_stream.py`. It streamed
`oscar`, `unshuffled_deduplicated_en`, which is a loading script and no longer supported by `datasets`. `allenai/c4`,
`en`, is the most similar open dataset: English Common Crawl text.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    """Returns the values of the reference command, including those that are defaults."""
    config = default.get_config()
    config.seed = 42
    config.num_train_steps = 10_000
    config.per_device_train_batch_size = 128
    config.per_device_eval_batch_size = 128
    config.gradient_accumulation_steps = 1
    config.logging_steps = 250
    config.eval_steps = 1_000
    config.save_steps = 1_000

    config.data.dataset_name = "allenai/c4"
    config.data.dataset_config_name = "en"
    config.data.split = "train"
    config.data.text_column_name = "text"
    config.data.max_seq_length = 128
    config.data.packing = "concatenate"
    config.data.shuffle_buffer_size = 10_000
    config.data.interleave_shards = 1
    config.data.min_shards = 0
    config.data.shuffle_piece_bytes = 0
    config.data.num_eval_samples = 5_000
    config.data.eval_rows = "first"

    # The tokenizer and the model config of an existing model, as in the reference command; weights are random. Both
    # also take a local directory. Without a network, set both to None: a tokenizer is trained, and the family's
    # defaults are used.
    config.tokenizer.tokenizer_name = "FacebookAI/roberta-base"
    config.model.model_type = "roberta"
    config.model.config_name = "FacebookAI/roberta-base"
    config.model.dtype = "float32"

    config.masking.mlm_probability = 0.15

    config.optimizer.learning_rate = 3e-4
    config.optimizer.warmup_steps = 1_000
    config.optimizer.schedule = "linear"
    config.optimizer.adam_beta1 = 0.9
    config.optimizer.adam_beta2 = 0.98
    config.optimizer.adam_epsilon = 1e-8
    config.optimizer.weight_decay = 0.0
    # The reference script never reads its flag.
    config.optimizer.max_grad_norm = 0.0

    config.hub.push_to_hub = True

    config.profile.first_step = 10
    config.profile.num_steps = 5
    return config
