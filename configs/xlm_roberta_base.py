"""XLM-RoBERTa-base from scratch on streamed web text in the fifteen languages of XNLI.

Command:   python main.py --config=configs/xlm_roberta_base.py --workdir=runs/xlm_roberta_base
Hardware:  TPU v4-64 (32 chips x 32 sequences x 8 microbatches x 512 tokens = 4.2 million tokens per step)
Time:      about 15 days; an estimate from 0.74 GFLOP per token (mlm/models/flops.py) x 6.3 trillion tokens at 40 % of
           the chips' peak
Expected:  not measured; the paper's base model, trained on 100 languages, reaches 76.2 on XNLI after fine-tuning on
           English only

The recipe is from Conneau et al., arXiv:1911.02116: batches of 8,192 sequences, 1,500,000 steps, languages sampled with
probabilities proportional to size^0.3. The paper does not give its optimizer's hyperparameters; those here are
RoBERTa-base's (Liu et al., arXiv:1907.11692, table 9). CC-100 is a loading script, which `datasets` no longer supports;
`allenai/c4` has one configuration per language. Add lines to `SIZES` to add languages.
"""

from ml_collections import ConfigDict

from configs import default

# GiB of text per language in CC-100, from the paper's table 6.
SIZES = {
    "ar": 28.0,
    "bg": 57.5,
    "de": 66.6,
    "el": 46.9,
    "en": 300.8,
    "es": 53.3,
    "fr": 56.8,
    "hi": 20.2,
    "ru": 278.0,
    "sw": 1.6,
    "th": 71.7,
    "tr": 20.9,
    "ur": 5.7,
    "vi": 137.3,
    "zh": 46.9,
}


def get_config() -> ConfigDict:
    """Returns the configuration."""
    config = default.get_config()
    config.num_train_steps = 1_500_000
    config.per_device_train_batch_size = 32
    config.per_device_eval_batch_size = 32
    config.gradient_accumulation_steps = 8
    config.logging_steps = 100
    config.eval_steps = 10_000
    config.save_steps = 1_000

    config.data.dataset_name = "allenai/c4"
    config.data.mixture = tuple(
        (language, size**0.3, {"dataset_name": "allenai/c4", "dataset_config_name": language})
        for language, size in SIZES.items()
    )
    config.data.max_seq_length = 512
    # 500 per language on average: the mixture's weights apply to evaluation, too.
    config.data.num_eval_samples = 500 * len(SIZES)

    config.tokenizer.tokenizer_name = "FacebookAI/xlm-roberta-base"
    config.model.model_type = "xlm-roberta"
    config.model.config_name = "FacebookAI/xlm-roberta-base"
    config.model.dtype = "bfloat16"

    config.report.sentences = (
        "Paris est la capitale de la <mask>.",
        "Sie öffnete die <mask> und ging ins Haus.",
        "La <mask> es la capital de España.",
    )

    config.optimizer.learning_rate = 6e-4
    config.optimizer.warmup_steps = 24_000
    config.optimizer.adam_beta1 = 0.9
    config.optimizer.adam_beta2 = 0.98
    config.optimizer.adam_epsilon = 1e-6
    config.optimizer.weight_decay = 0.01
    return config
