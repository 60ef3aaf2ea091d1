"""BERT-base, uncased, from scratch, with masked language modelling alone, on English Wikipedia.

Command:   python main.py --config=configs/bert_base.py --workdir=runs/bert_base
Hardware:  TPU v4-16 (8 chips x 32 rows x 512 tokens = 131,072 tokens an update)
Time:      about 25 hours, estimated, not measured: 0.59 GFLOP a token (mlm/models/flops.py) x 131 billion tokens at
           40 % of the chips' peak
Expected:  not measured; the paper's held-out masked perplexity is 3.99 (its table 6), a loss of 1.38 nats, on its
           own data and with its second objective

The recipe is that of Devlin et al., arXiv:1810.04805, appendix A.2: 256 rows of 512 tokens, 1,000,000 updates, Adam at
1e-4 with betas of 0.9 and 0.999, weight decay 0.01, 10,000 updates of warm-up, linear decay, dropout 0.1, GELU. What is
different: no next-sentence prediction, which RoBERTa found to be of no use; rows of 512 from the start, where the
paper's first nine tenths have 128; masks that are new at every pass; Wikipedia without the books, for BooksCorpus is
not distributed any more.
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
    # That of BERT's published code.
    config.optimizer.adam_epsilon = 1e-6
    config.optimizer.weight_decay = 0.01
    config.optimizer.max_grad_norm = 1.0
    return config
