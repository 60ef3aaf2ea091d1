"""Every config key, with its unit and the reason for its default. Other configs start from this one.

Names and defaults are those of the reference script (Hugging Face's `run_mlm_flax_stream.py`) where it has them. Keys
are grouped by the module that reads them. On the command line, `--config.optimizer.learning_rate=1e-4` sets a key,
`None` resets an optional one, and `--mode=explain optimizer.learning_rate` prints the comment above a key.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import FieldReference, placeholder


def get_config() -> ConfigDict:
    """Returns the defaults."""
    config = ConfigDict()

    # Seed of everything random: weight initialization, text order, masks, dropout. 42 as in the reference script.
    config.seed = 42
    # Optimizer steps in the run. The learning-rate schedule ends here. 50,000 as in the reference script.
    config.num_train_steps = 50_000
    # Sequences per device in one microbatch. 0: the largest number that fits in device memory, found by compiling the
    # step at the start of the run and then fixed for the run. 8 as in the reference script.
    config.per_device_train_batch_size = 8
    # Sequences per device in one evaluation batch; changes speed and memory only. 8 as in the reference script.
    config.per_device_eval_batch_size = 8
    # Microbatches per optimizer step; their gradients are summed. The batch size of a step is
    # per_device_train_batch_size x gradient_accumulation_steps x devices. 1: no accumulation.
    config.gradient_accumulation_steps = 1
    # Steps between two log lines of training metrics; each is the mean since the previous line. The last step of
    # the run and of each stage is always logged. 500 as in the reference script.
    config.logging_steps = 500
    # Steps between two evaluations; each also exports `model/`. The last step of the run and of each stage is always
    # evaluated and exported. 500 as in the reference script, where they coincide with checkpoints.
    config.eval_steps = 500
    # Steps between two checkpoints: the most that a crash can cost. The last step of the run and of each stage is
    # always saved. 500 as in the reference script.
    config.save_steps = 500
    # Hours from the start of the process by which a checkpoint must be complete: the run saves and stops with exit code
    # 75 early enough, and the same command resumes it. For machines with a time limit that send no signal before it.
    # 0: no limit.
    config.max_hours = 0.0
    # Parts of the run in which some keys have other values: a list such as ({"name": "pretrain", "steps": 0.9},
    # {"name": "extend", "steps": 0.1, "data.max_seq_length": 512, "per_device_train_batch_size": 32}). "steps" is a
    # number of steps, a fraction of the run, or a string such as "3e9 tokens"; one stage may omit it and gets the
    # remaining steps. A key keeps its value in later stages. docs/config.md lists the keys that a stage may set.
    # Empty: the same values in all steps.
    config.stages = ()

    config.data = data = ConfigDict()
    # "docstrings" (of the installed Python packages; needs no network, hence the default), a dataset name on the
    # Hugging Face hub, a local directory that `datasets.load_dataset` accepts, or "synthetic": random token ids, to
    # measure the training loop without text.
    data.dataset_name = "docstrings"
    # Configuration name of that dataset, such as "en" for allenai/c4. None: the dataset has only one.
    data.dataset_config_name = placeholder(str)
    # Text files (one document per line), JSON lines, CSV or parquet, plain or compressed, all of the same format: a
    # path, a glob, an http(s):// or gs:// URL of one file, or a list of these. Takes precedence over dataset_name.
    data.data_files = placeholder(object)
    # Files to evaluate on, given like data_files: num_eval_samples sequences of them, or all if they have fewer. None:
    # the sequences are held out of the training text instead.
    data.eval_data_files = placeholder(object)
    # Several sources: a list of (name, weight) or (name, weight, {key: value}). The name is a dataset name, or any name
    # if the dict sets dataset_name or data_files; it appears in the metric eval/<name>/loss. The weight is the relative
    # number of sequences. The dict may set dataset_name, dataset_config_name, data_files, eval_data_files, split and
    # text_column_name for this source. Empty: one source, given by the keys above.
    data.mixture = ()
    # Split of a named dataset to train on. "train" is its name in nearly every dataset on the hub.
    data.split = "train"
    # Column that holds the text. Plain text files have one column, named "text".
    data.text_column_name = "text"
    # Sequence length in tokens, including the begin and end tokens. 128 as in the reference run.
    data.max_seq_length = 128
    # How documents become sequences. "concatenate": each between a begin and an end token, joined and cut every
    # max_seq_length tokens, without padding or dropped tokens (what the reference script does, hence the default).
    # "isolate": cut the same way, but attention and position ids do not cross document boundaries. "pad": one document
    # per sequence, truncated or padded (the script's pad_to_max_length). "pad_lines": one line per sequence (its
    # line_by_line). "best_fit": like "isolate", but a document is cut only if it is longer than a sequence, or than
    # shuffle_piece_bytes; 0.1 % is padding.
    data.packing = "concatenate"
    # Shuffle-window size in documents: documents are shuffled within a window only. 0: keep the order of the source.
    # 10,000 as in the reference script.
    data.shuffle_buffer_size = 10_000
    # Documents of the first shuffle window, so that training starts before all of them are read. Every later window of
    # the first epoch has twice as many, up to shuffle_buffer_size. 0: shuffle_buffer_size, as in the reference script.
    data.first_shuffle_buffer_size = 0
    # Shuffle-window size in bytes: a window of large documents ends early. 64 MiB: 10,000 documents of 6 KB.
    data.shuffle_buffer_bytes = 64 << 20
    # Documents longer than this many bytes are cut before whitespace into pieces, which are shuffled like
    # documents, so that one book does not fill a batch. Each piece gets a begin and an end token. Not with "pad".
    # 16 KiB: 4,000 tokens of English, more than most sequences have. 0: complete documents, as in the reference script.
    data.shuffle_piece_bytes = 16 << 10
    # Number of shards (files, or parts of files) that a shuffle window reads in equal parts, because neighboring
    # documents often share a topic. Each open file takes about 5 MB of memory, and a resumed run seeks to its position
    # in each. 1: one shard after the other, as in the reference script.
    data.interleave_shards = 16
    # Local files of text, JSON lines and parquet are divided into parts of at least 4 KB until there are about this
    # many shards: a window then has documents from all of a sorted file, and each process reads its own parts of a
    # large one. Compressed and CSV files stay complete. 0: one file is one shard, as in the reference script.
    data.min_shards = 4_096
    # Sequences in the evaluation set, which are never trained on. 5,000 sequences of 128 tokens have 96,000 masked
    # tokens, enough to compare the losses of two runs.
    data.num_eval_samples = 5_000
    # Documents for the evaluation set and for training a tokenizer. "spread": the first ones of up to 64 evenly
    # spaced shards (files), because one file may have one topic only. "first": the first ones of the source, as in the
    # reference script.
    data.eval_rows = "spread"
    # Step ranges (first, last) whose batches are skipped, e.g. around a loss spike: step `first` then trains on the
    # batch that step last + 1 would have had. Step numbers are those of a run that skips nothing.
    data.skip_steps = ()
    # Seconds for which a failing network read (URLs and the hub) is retried, with growing waits, before its shard is
    # skipped for the rest of the epoch. 300: most servers and routers restart within five minutes.
    data.network_deadline_seconds = 300.0
    # Seconds without any byte received after which a connection counts as broken. 30 is longer than the pauses of a
    # slow but working server.
    data.network_timeout_seconds = 30.0
    # Shards that one process may skip in one epoch of a source before the run stops. Consecutive failures are counted
    # across epochs. 0: the first failure stops the run. 8, with the deadline above: if the server is down, the run
    # stops after about 45 minutes instead of waiting forever.
    data.max_failed_shards = 8
    # Fraction of unknown tokens in the evaluation sequences above which the run stops before training, because the
    # tokenizer does not know the language. A warning is logged above 0.05.
    data.max_unknown_fraction = 0.5
    # True: resume with a warning although the text at the checkpoint's data position has changed, for example because a
    # file was edited. False: that is an error.
    data.accept_changed_files = False
    # Batches prepared in advance by a background thread. 16 cover the pause in which a shuffle window is read; each
    # takes a few hundred KB.
    data.prefetch_batches = 16
    # Directory for downloads of `datasets` and `transformers`. None: their own default, ~/.cache/huggingface.
    data.cache_dir = placeholder(str)

    config.tokenizer = tokenizer = ConfigDict()
    # A hub name or a local directory. None: the tokenizer of model.model_name_or_path if that is set, otherwise one is
    # trained on train_documents documents (see data.eval_rows).
    tokenizer.tokenizer_name = placeholder(str)
    # Must be True: slow tokenizers are not supported. The key exists because the reference script has the flag.
    tokenizer.use_fast_tokenizer = True
    # Algorithm of a tokenizer trained here: "bpe" (byte-level), "wordpiece", "unigram" (SentencePiece), or "auto": the
    # one that the published models of the family use. Special tokens are named as in those models.
    tokenizer.algorithm = "auto"
    # True: a tokenizer trained here lowercases text and strips accents, like the "uncased" BERT models. Only for
    # wordpiece, and for unigram with albert.
    tokenizer.lowercase = False
    # Vocabulary size of a tokenizer trained here, including special tokens. 50,265 is that of RoBERTa.
    tokenizer.vocab_size = 50_265
    # Documents to train a tokenizer on. 100,000: more take longer to read and change little.
    tokenizer.train_documents = 100_000
    # Library that tokenizes: "gigatoken", "tokenizers", or "auto": gigatoken if it gives the same ids as tokenizers
    # (byte-level BPE), because it is more than ten times as fast. "gigatoken" is an error for other kinds of
    # tokenizers; if the ids of the first documents differ, tokenizers is used, and a log line says so.
    tokenizer.backend = "auto"

    config.model = model = ConfigDict()
    # Model family: "roberta", "xlm-roberta", "camembert", "roberta-prelayernorm", "bert", "distilbert", "electra" (the
    # generator), "albert", "roformer" or "modernbert". The family's default shape is used if config_name and
    # model_name_or_path are None. "roberta" as in the reference run.
    model.model_type = "roberta"
    # Hub name or local directory whose config.json is copied; the weights are random. None: the family's default shape.
    model.config_name = placeholder(str)
    # Hub name or local directory, such as a run's model/, whose config.json and weights training starts from. Another
    # vocabulary, longer sequences and a missing head are handled as in docs/models.md. None: random weights.
    model.model_name_or_path = placeholder(str)
    # Dtype of the computation: "float32", or "bfloat16", which is faster on TPUs and GPUs. Parameters, reductions and
    # the optimizer's state are float32 either way; Muon orthogonalizes in bfloat16 on TPUs and GPUs. "float32" as in
    # the reference run.
    model.dtype = "float32"
    # Attention implementation: "plain"; "xla" or "cudnn" of jax.nn.dot_product_attention, the latter a flash kernel for
    # NVIDIA GPUs and bfloat16; "splash", jax's flash kernel for TPUs; or "auto": "cudnn" on GPUs in bfloat16, "splash"
    # on TPUs for sequences of 1,024 tokens or more, else "plain". Only "plain" has attention dropout: training uses it
    # unless attention_probs_dropout_prob is 0. Local attention (ModernBERT) is computed in blocks either way.
    model.attention = "auto"
    # What the backward pass recomputes instead of reading it from memory: "none"; "dots", the feed-forward activations,
    # which saves memory and bandwidth; "full", all of a layer, which saves the most memory and costs another forward
    # pass; or "auto": "none" on CPUs, where computing costs more than memory, else "dots".
    model.remat = "auto"
    # Fields of the model's Hugging Face config to override, with the same names. None, the default of each: the value
    # in the copied config, or the family's default. Without a copied config, vocab_size and the ids of special tokens
    # come from the tokenizer. A field that the family does not have is an error.
    model.overrides = overrides = ConfigDict()
    # Vocabulary size in tokens.
    overrides.vocab_size = placeholder(int)
    # Width of the hidden states.
    overrides.hidden_size = placeholder(int)
    # Number of layers.
    overrides.num_hidden_layers = placeholder(int)
    # Number of attention heads per layer.
    overrides.num_attention_heads = placeholder(int)
    # Width of the inner layer of the feed-forward networks.
    overrides.intermediate_size = placeholder(int)
    # Activation function of the feed-forward networks, such as "gelu".
    overrides.hidden_act = placeholder(str)
    # Dropout rate after the embeddings, the attention and the feed-forward networks.
    overrides.hidden_dropout_prob = placeholder(float)
    # Dropout rate of the attention probabilities.
    overrides.attention_probs_dropout_prob = placeholder(float)
    # Number of position embeddings: at least data.max_seq_length, plus 2 for roberta-like families.
    overrides.max_position_embeddings = placeholder(int)
    # Number of token types. Training uses type 0 only.
    overrides.type_vocab_size = placeholder(int)
    # Standard deviation of the initial weights.
    overrides.initializer_range = placeholder(float)
    # Epsilon of the layer norms, added to the variance.
    overrides.layer_norm_eps = placeholder(float)
    # electra, albert, roformer: width of the embeddings.
    overrides.embedding_size = placeholder(int)
    # albert: number of groups of layers. The layers of a group use the same parameters.
    overrides.num_hidden_groups = placeholder(int)
    # albert: number of blocks with different parameters in one layer of a group.
    overrides.inner_group_num = placeholder(int)
    # roformer: True rotates the values by their position as well.
    overrides.rotary_value = placeholder(bool)
    # modernbert: every n-th layer attends to all tokens, the others to a window around each token.
    overrides.global_attn_every_n_layers = placeholder(int)
    # modernbert: size of that window in tokens, half on each side.
    overrides.local_attention = placeholder(int)
    # modernbert: RoPE base of the layers with global attention, and of those with local attention.
    overrides.global_rope_theta = placeholder(float)
    overrides.local_rope_theta = placeholder(float)
    # modernbert: whether attention, feed-forward networks, norms, head and decoder have biases.
    overrides.attention_bias = placeholder(bool)
    overrides.mlp_bias = placeholder(bool)
    overrides.norm_bias = placeholder(bool)
    overrides.classifier_bias = placeholder(bool)
    overrides.decoder_bias = placeholder(bool)
    # modernbert: activation function of the head.
    overrides.classifier_activation = placeholder(str)
    # modernbert: dropout rate after the embeddings, and in the feed-forward networks.
    overrides.embedding_dropout = placeholder(float)
    overrides.mlp_dropout = placeholder(float)
    # modernbert: the initial weights are cut off at this many standard deviations.
    overrides.initializer_cutoff_factor = placeholder(float)
    # modernbert: False gives the decoder separate weights; True uses the word embeddings.
    overrides.tie_word_embeddings = placeholder(bool)

    config.masking = masking = ConfigDict()
    # Unit of masking: "token", single tokens; "whole_word", all tokens of a word; or "span", up to 10 words in a row,
    # as in SpanBERT. The last two need word boundaries, for which the tokenizer uses the slower backend "tokenizers".
    # "token" as in BERT.
    masking.strategy = "token"
    # Probability that a token is predicted in training; special tokens and padding never are. A pair such as
    # (0.3, 0.15) changes it linearly from the first to the last step. 0.15 as in BERT; 0.3 learns faster.
    masking.mlm_probability = FieldReference(0.15, field_type=object)
    # Probability that a predicted token is replaced by the mask token. 0.8 as in BERT.
    masking.mask_replace_prob = 0.8
    # Probability that a predicted token is replaced by a random token; the rest stay unchanged. 0.1 as in BERT.
    masking.random_replace_prob = 0.1
    # Masking of the evaluation sequences: strategy, and the probabilities of prediction, of the mask token and of a
    # random token. Independent of training, so that losses of different recipes can be compared. A probability of None:
    # that of training, the larger one of a pair.
    masking.eval_strategy = "token"
    masking.eval_mlm_probability = 0.15
    masking.eval_mask_replace_prob = 0.8
    masking.eval_random_replace_prob = 0.1

    config.loss = loss = ConfigDict()
    # Weight of the squared log-normalizer of the softmax in the training loss, which keeps logits from growing.
    # Reported losses exclude it. 0: none; 1e-4 is usual.
    loss.z_loss = 0.0
    # Fraction of the label's probability that is spread over the vocabulary in the training loss. Reported losses
    # exclude it. 0: none.
    loss.label_smoothing = 0.0

    config.optimizer = optimizer = ConfigDict()
    # "adamw"; "muon", which orthogonalizes the updates of the matrices inside layers and leaves everything else to
    # AdamW; "stable_adamw", AdamW whose updates are clipped by their RMS; "lamb", for very large batches; "lion"; or
    # "adafactor", which saves memory. docs/recipes.md compares them. "adamw" as in the reference script.
    optimizer.name = "adamw"
    # Peak learning rate. 5e-5 as in the reference script: right for continued pre-training. From scratch, use 1e-4 to
    # 1e-3 with adamw, 0.01 to 0.05 with muon, a third to a tenth of adamw's with lion.
    optimizer.learning_rate = 5e-5
    # muon: peak learning rate of the parameters that AdamW updates: embeddings, head, norms and biases. None: 3e-4.
    optimizer.adam_learning_rate = placeholder(float)
    # Warm-up, over which the learning rate rises linearly from 0 to its peak: a number of steps, a fraction of the run
    # such as 0.06, or a string such as "3e9 tokens". 0 as in the reference script: no warm-up; use 1 % to 10 % of the
    # steps when training from scratch.
    optimizer.warmup_steps = FieldReference(0, field_type=object)
    # Learning rate after the warm-up: "linear" or "cosine" decay until num_train_steps, "constant", "inverse_sqrt", or
    # "wsd": constant, then a decay over the last decay_steps. "linear" as in the reference script.
    optimizer.schedule = "linear"
    # wsd, inverse_sqrt: length of the decay at the end of the run, in the units of warmup_steps. None: 0.1 for wsd,
    # none for inverse_sqrt.
    optimizer.decay_steps = placeholder(object)
    # wsd, inverse_sqrt: shape of that decay: "linear", "1-sqrt" or "cosine". None: "1-sqrt" for wsd, "linear" for
    # inverse_sqrt.
    optimizer.decay_shape = placeholder(str)
    # All schedules but "constant": learning rate at the end of the decay, as a fraction of its peak. None: 0.
    optimizer.end_factor = placeholder(float)
    # adamw, stable_adamw, lamb, muon: decay rate of the running mean of gradients. None: 0.9.
    optimizer.adam_beta1 = placeholder(float)
    # adamw, stable_adamw, lamb, muon: decay rate of the running mean of squared gradients. RoBERTa uses 0.98, which
    # recovers sooner from spikes. None: 0.999 for adamw, as in the reference script, and for lamb; 0.99 for
    # stable_adamw; 0.95 for muon.
    optimizer.adam_beta2 = placeholder(float)
    # adamw, stable_adamw, lamb, muon: added to the square root of the second moment. None: 1e-8, as in the reference
    # script; 1e-6 for stable_adamw and lamb.
    optimizer.adam_epsilon = placeholder(float)
    # muon: momentum, the decay rate of the sum of gradients. None: 0.95.
    optimizer.muon_momentum = placeholder(float)
    # muon: Newton-Schulz iterations, which orthogonalize the updates. None: 5.
    optimizer.muon_iterations = placeholder(int)
    # muon: factor of an orthogonalized update, "spectral": sqrt(max(1, outputs / inputs)), or "rms":
    # 0.2 sqrt(max(outputs, inputs)), which makes its RMS that of AdamW's updates, so that AdamW's learning rate and
    # weight decay fit. None: "spectral".
    optimizer.muon_scale = placeholder(str)
    # lion: decay rates in the update and of the momentum. None: 0.9 and 0.99.
    optimizer.lion_beta1 = placeholder(float)
    optimizer.lion_beta2 = placeholder(float)
    # adafactor: exponent of the decay of second moments; RMS at which updates are clipped. None: 0.8 and 1.
    optimizer.adafactor_decay_rate = placeholder(float)
    optimizer.adafactor_clipping_threshold = placeholder(float)
    # Decoupled weight decay, multiplied by the learning rate. Biases and norm scales are not decayed. 0 as in the
    # reference script; 0.01 is usual.
    optimizer.weight_decay = 0.0
    # Layer-wise learning-rate decay, the factor from each layer to the one below it: the head has the full rate, the
    # last layer layer_decay of it, and the embeddings the least. 1: the same rate everywhere; use 0.8 to 0.95 to
    # continue from a published model.
    optimizer.layer_decay = 1.0
    # Decay rate of an exponential moving average of the parameters, which is evaluated and exported in their place. It
    # costs memory for one more copy. 0: no average; 0.999 is usual.
    optimizer.ema_decay = 0.0
    # Largest global gradient norm; larger gradients are scaled down to it. 0: no clipping, since the reference script
    # ignores its flag; 1.0 is usual.
    optimizer.max_grad_norm = 0.0
    # Consecutive skipped steps after which the run stops. A step whose loss or gradient is not finite is skipped:
    # parameters and optimizer state stay unchanged. After 10 in a row the parameters rarely recover.
    optimizer.max_skipped_steps = 10
    # A step is also skipped if its gradient norm exceeds spike_factor times the running mean over about 100 steps; the
    # first 100 are never skipped. 0: no spike is skipped, as in the reference script.
    optimizer.spike_factor = 0.0

    config.eval = evaluation = ConfigDict()
    # Labeled tasks that a linear classifier on the frozen encoder learns at every evaluation, for the metric
    # probe/<name>/accuracy: pairs of a name and a file as for --mode=probe, such as (("topics", "topics.jsonl"),). At
    # most 1,000 texts of each, or 5,000 tagged words, are used, so that it takes little time. Empty: none.
    evaluation.probes = ()
    # Minimal pairs of sentences that are scored at every evaluation, for the metric pairs/<name>/accuracy: pairs of a
    # name and a file as for --mode=score, such as (("agreement", "pairs.jsonl"),). At most 200 of each file are used.
    # Empty: none.
    evaluation.pairs = ()

    config.checkpoint = checkpoint = ConfigDict()
    # Newest checkpoints to keep; those at the ends of stages are kept as well. 2: if the newest is damaged, the run
    # resumes from the other.
    checkpoint.keep_checkpoints = 2
    # Also keep every checkpoint whose step is a multiple of this. 0: none, which saves disk space.
    checkpoint.keep_every_steps = 0
    # WORKDIR or WORKDIR@STEP: start a new run from a checkpoint of that run, by default the newest one. The run there
    # is only read, and may be in progress. None: start with new weights, or those of model.model_name_or_path.
    checkpoint.init_from = placeholder(str)
    # "branch": continue its steps, optimizer, schedule and data position, for example to decay the learning rate.
    # "restart": take parameters and optimizer state, and begin at step 0. None: "branch" if init_from is set.
    checkpoint.init_mode = placeholder(str)

    config.export = export = ConfigDict()
    # Dtype of the weights in `model/`: "float32" (as trained), "bfloat16" or "float16" (half the size).
    export.dtype = "float32"
    # True: add the files with which sentence-transformers loads `model/`; the vector of a text is the mean over its
    # tokens. False, because only that library reads them.
    export.sentence_transformers = False

    config.hub = hub = ConfigDict()
    # Upload `model/` and the TensorBoard files to the Hugging Face hub after every evaluation, in the background.
    # False, because it needs a token.
    hub.push_to_hub = False
    # Repository on the hub, "name" or "owner/name". None: the name of the work directory.
    hub.hub_model_id = placeholder(str)
    # True: if the repository does not exist, create it as a private one.
    hub.private = False
    # License in the model card, as a hub identifier such as "apache-2.0". None: not stated.
    hub.license = placeholder(str)
    # Languages in the model card, as codes such as ("en", "de"). Empty: not stated.
    hub.languages = ()

    config.profile = profile = ConfigDict()
    # Steps from the start (or resumption) of the run to the start of the profiler. 10: compilation is over by then.
    profile.first_step = 10
    # Steps to trace for TensorBoard's profile page. 0: none, since traces are large.
    profile.num_steps = 0

    config.report = report = ConfigDict()
    # Example sentences that the model fills in after every evaluation. Each contains "<mask>", which stands for the
    # tokenizer's own mask token. Set your own for other languages: --config.report.sentences="('Die
    # <mask> ist da.',)".
    report.sentences = (
        "The capital of France is <mask>.",
        "She opened the <mask> and went into the house.",
        "In the year 1969, two men walked on the <mask>.",
    )
    return config.lock()
