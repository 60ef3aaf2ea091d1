"""An encoder of 2.3 million parameters on docstrings or your own files, in about an hour on a few cores.

Command:   python main.py --config=configs/laptop.py --workdir=runs/laptop
           (your own text: --config.data.data_files='/path/to/*.txt')
Hardware:  two or more CPU cores, 4 GiB of memory
Time:      about an hour on two cores (3,600 tokens per second)
Expected:  not run to its end yet

The quickstart's recipe with 16 times its compute, 4.7 times the operations per token and 3.3 times the tokens: twice
the layers, one and a half times the width, sequences of 128 tokens, twice the vocabulary.
"""

from ml_collections import ConfigDict

from configs import quickstart


def get_config() -> ConfigDict:
    """Returns the configuration."""
    config = quickstart.get_config()
    config.num_train_steps = 3_000
    config.logging_steps = 50
    config.eval_steps = 500
    config.save_steps = 500
    config.checkpoint.keep_every_steps = 500

    config.data.max_seq_length = 128
    config.tokenizer.vocab_size = 4_096
    config.tokenizer.train_documents = 20_000
    config.model.overrides.update(
        hidden_size=192,
        num_hidden_layers=4,
        num_attention_heads=6,
        intermediate_size=384,
        max_position_embeddings=130,
        # A quarter of the layers attends to all tokens of a document, the others to 32 neighbors on each side.
        global_attn_every_n_layers=4,
    )

    # The quickstart uses 0.05 at a width of 128; this keeps the variance of the activations.
    config.model.overrides.initializer_range = 0.04
    config.optimizer.warmup_steps = 200
    return config
