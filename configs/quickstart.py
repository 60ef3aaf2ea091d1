"""A small encoder trained on the docstrings of the installed Python packages: no network, no accelerator, minutes.

Command:   python main.py --config=configs/quickstart.py --workdir=runs/quickstart
           (another model family: --config=configs/quickstart.py:roberta)
Hardware:  two CPU cores, 3 GiB of memory
Time:      under 5 minutes
Expected:  eval/loss 3.7 nats below eval/unigram_loss (2.84 and 6.51; with more installed packages 3.8)

docs/recipes.md shows what each part of this recipe is worth.
"""

from ml_collections import ConfigDict

from configs import default
from mlm.models.families import FAMILIES


def get_config(family: str = "modernbert") -> ConfigDict:
    """Returns the configuration; `family` is what follows the colon in --config=configs/quickstart.py:roberta."""
    config = default.get_config()
    config.num_train_steps = 1_800
    # Small batches: a model of this size learns more from many steps than from smooth gradients.
    config.per_device_train_batch_size = 32
    config.per_device_eval_batch_size = 64
    config.logging_steps = 50
    config.eval_steps = 450
    config.save_steps = 450
    # A longer run branches off one before the decay of the learning rate.
    config.checkpoint.keep_every_steps = 450

    config.data.dataset_name = "docstrings"
    config.data.max_seq_length = 64
    # Hundreds of packages: the documents of one must not fill a batch. Training starts with the first 5,000 documents.
    config.data.shuffle_buffer_size = 20_000
    config.data.first_shuffle_buffer_size = 5_000
    # Ten seconds of training, in which the next documents are read.
    config.data.prefetch_batches = 100
    # Complete documents, with attention within each only: other documents do not help to predict a token.
    config.data.packing = "best_fit"
    config.data.num_eval_samples = 1_024

    config.tokenizer.vocab_size = 2_048
    config.tokenizer.train_documents = 2_500

    config.model.model_type = family
    overrides = {
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 256,
        "embedding_size": 128,
        # The window of local attention, which is every token's 32 neighbors on each side.
        "local_attention": 64,
        # RoBERTa's position ids start at 2.
        "max_position_embeddings": 66,
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-5,
        # More than the usual 0.02, which suits widths of 768: attention would start too uniform to learn.
        "initializer_range": 0.05,
        # No text is repeated in a run this short, so there is nothing to regularize.
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    # Each family has some of these fields. settings.py reports a family that does not exist.
    fields = FAMILIES[family].fields if family in FAMILIES else ()
    config.model.overrides.update({name: value for name, value in overrides.items() if name in fields})

    config.report.sentences = (
        "Returns the <mask> of the two arrays.",
        "axis : int, <mask>",
        "Return a <mask> of the object as a string.",
        "Raises ValueError if the input is not <mask>.",
    )

    # Twice BERT's rate teaches more per step; evaluation still masks 15 %.
    config.masking.mlm_probability = 0.3

    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 0.02
    config.optimizer.adam_learning_rate = 4e-3
    # Constant, then a decay over the last 30 % of the steps: lower than with a linear decay over all of them, by 0.02
    # nats in this run and by more in shorter ones.
    config.optimizer.schedule = "wsd"
    config.optimizer.decay_steps = 0.3
    config.optimizer.warmup_steps = 100
    config.optimizer.adam_beta2 = 0.98
    config.optimizer.weight_decay = 0.01
    config.optimizer.max_grad_norm = 1.0
    return config
