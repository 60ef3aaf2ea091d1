"""BERT-base, uncased, from scratch on English Wikipedia, with masked language modeling only.

Command:   python main.py --config=configs/bert_base.py --workdir=runs/bert_base
Hardware:  TPU v4-16 (8 chips x 32 sequences x 512 tokens = 131,072 tokens per step)
Time:      about 25 hours; an estimate from 0.59 GFLOP per token (mlm/models/flops.py) x 131 billion tokens at 40 % of
           the chips' peak
Expected:  not measured; the paper reports a held-out masked perplexity of 3.99 (table 6), a loss of 1.38 nats, on
           different data and with next-sentence prediction

The recipe is from Devlin et al., arXiv:1810.04805, appendix A.2: batches of 256 sequences of 512 tokens, 1,000,000
steps, Adam with learning rate 1e-4 and betas 0.9 and 0.999, weight decay 0.01, 10,000 warm-up steps, linear decay,
dropout 0.1, GELU. Differences:

- no next-sentence prediction, which RoBERTa found useless;
- sequences of 512 tokens throughout, while the paper uses 128 for the first 90 % of the steps;
- dynamic masking: new masks in every epoch;
- Wikipedia only, since BooksCorpus is no longer distributed.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    """Returns the configuration."""
    config = default.get_config()
    config.num_train_steps = 1_000_000
    config.per_device_train_batch_size = 32
    config.per_device_eval_batch_size = 32
    config.logging_steps = 500
    config.eval_steps = 10_000
    config.save_steps = 10_000

    config.data.dataset_name = "wikimedia/wikipedia"
    config.data.dataset_config_name = "20231101.en"
    config.data.max_seq_length = 512

    config.tokenizer.tokenizer_name = "google-bert/bert-base-uncased"
    config.model.model_type = "bert"
    config.model.config_name = "google-bert/bert-base-uncased"
    config.model.dtype = "bfloat16"

    config.optimizer.learning_rate = 1e-4
    config.optimizer.warmup_steps = 10_000
    config.optimizer.adam_beta1 = 0.9
    config.optimizer.adam_beta2 = 0.999
    # As in BERT's published code.
    config.optimizer.adam_epsilon = 1e-6
    config.optimizer.weight_decay = 0.01
    config.optimizer.max_grad_norm = 1.0
    return config
