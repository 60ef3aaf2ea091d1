"""A small encoder on the docstrings of the installed packages: no network, no accelerator, minutes.

Command:   python main.py --config=configs/quickstart.py --workdir=runs/quickstart
Hardware:  two CPU cores, 3 GiB of memory
Time:      under 5 minutes
Expected:  eval/loss about 0.8 nats under eval/unigram_loss (5.58 against 6.41; it depends on what is installed)
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    """Returns the quickstart's configuration."""
    config = default.get_config()
    config.num_train_steps = 1_300
    # Small batches: at this size many updates teach more than smooth ones.
    config.per_device_train_batch_size = 32
    config.per_device_eval_batch_size = 64
    config.logging_steps = 50
    config.eval_steps = 325
    config.save_steps = 325

    config.data.dataset_name = "docstrings"
    config.data.max_seq_length = 64
    config.data.shuffle_buffer_size = 2_000
    config.data.num_eval_samples = 1_024

    config.tokenizer.vocab_size = 2_048
    config.tokenizer.train_documents = 5_000

    config.model.overrides.hidden_size = 128
    config.model.overrides.num_hidden_layers = 2
    config.model.overrides.num_attention_heads = 4
    config.model.overrides.intermediate_size = 256
    config.model.overrides.max_position_embeddings = 66
    config.model.overrides.type_vocab_size = 1
    config.model.overrides.layer_norm_eps = 1e-5
    # Wider than 0.02, which is for hundreds of dimensions: attention would begin too flat to learn from.
    config.model.overrides.initializer_range = 0.05
    # A run this short sees no text twice: nothing to regularize.
    config.model.overrides.hidden_dropout_prob = 0.0
    config.model.overrides.attention_probs_dropout_prob = 0.0

    config.report.sentences = (
        "Returns the <mask> of the two arrays.",
        "If <mask> is not given, the default value is used.",
        "Raises a <mask> if the file does not exist.",
        "A list of <mask> to be used by the model.",
    )

    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 100
    config.optimizer.adam_beta2 = 0.98
    config.optimizer.weight_decay = 0.01
    config.optimizer.max_grad_norm = 1.0
    return config
