"""Every key there is, with its unit and its reason. Other configs start from this one.

Names are the flags of the reference script (Hugging Face's `run_mlm_flax_stream.py`), grouped by the part that
reads them. Any key can be set from the command line: `--config.optimizer.learning_rate=1e-4`.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    """Returns the defaults: the reference script's where it has one."""
    config = ConfigDict()

    # Everything random is derived from it: initialization, order of the text, masks, dropout.
    config.seed = 42
    # Updates of the parameters in all; the learning rate reaches 0 there.
    config.num_train_steps = 50_000
    # Rows of `data.max_seq_length` tokens per device in one forward pass. 0 for training: the most that its memory
    # takes, found by compiling the step for some; a run keeps to what it has found.
    config.per_device_train_batch_size = 8
    config.per_device_eval_batch_size = 8
    # Forward and backward passes whose gradients are summed for one update; the rows of an update are
    # per_device_train_batch_size x gradient_accumulation_steps x devices.
    config.gradient_accumulation_steps = 1
    # Updates between two lines of training metrics (each the mean since the line before), two evaluations (each
    # also exports `model/`), two checkpoints. The last update is always logged, evaluated, saved and exported.
    config.logging_steps = 500
    config.eval_steps = 500
    config.save_steps = 500

    config.data = data = ConfigDict()
    # "docstrings" (of the installed Python packages; needs no network), or a dataset's name on the hub, or a
    # local directory that `datasets.load_dataset` takes, or "synthetic": random ids, to time the loop without text.
    data.dataset_name = "docstrings"
    # The configuration of that dataset, such as "en" of allenai/c4. None: its only one.
    data.dataset_config_name = placeholder(str)
    # Text (a document a line), JSON-lines, CSV or parquet files, plain or compressed, all of one kind: a path, a glob,
    # an http(s) or gs:// URL of one file, or a list of these. Wins over dataset_name.
    data.data_files = placeholder(object)
    # The same for evaluation. None: the first num_eval_samples rows of the training text are held out.
    data.eval_data_files = placeholder(object)
    # Several sources: (name, weight) or (name, weight, {key: value}) each, the name a data set's or a free one for the
    # metrics eval/<name>/loss, the keys dataset_name, dataset_config_name, data_files, eval_data_files, split and
    # text_column_name, where they differ from the ones here. Weights are shares of the rows.
    data.mixture = ()
    # Of a named dataset: which part is trained on.
    data.split = "train"
    # The column that holds the text. Text files have "text".
    data.text_column_name = "text"
    # Tokens in a row, begin and end tokens included.
    data.max_seq_length = 128
    # How documents become rows. "concatenate": they run on over row borders, an end token between them (no token
    # is lost, none is padding). "isolate": the same rows, but attention and positions stay inside a document.
    # "pad": a document a row, cut or padded (the reference's pad_to_max_length). "pad_lines": a line a row (its
    # line_by_line).
    data.packing = "concatenate"
    # Documents read, then shuffled among themselves, no others: sorted files want a shuffle before. 0: the order of the
    # source.
    data.shuffle_buffer_size = 10_000
    # Rows in the evaluation set. Documents in it are never trained on.
    data.num_eval_samples = 5_000
    # (first, last) updates whose data is left out, the cure for a loss that spikes: update `first` is trained on what
    # update last + 1 would have had. The numbers are those of the run with none left out.
    data.skip_steps = ()
    # Over a network (URLs and the hub): seconds of failing, with nothing new in between, for which a read is tried
    # again, with growing waits, before its shard is set aside for the rest of the epoch. Five minutes outlast what
    # servers and routers need to start again.
    data.network_deadline_seconds = 300.0
    # Seconds of silence after which a connection counts as broken.
    data.network_timeout_seconds = 30.0
    # Shards that a process may set aside in one epoch of a source, or one after the other, before the run stops. With
    # the deadline: a server that is gone stops it after three quarters of an hour. 0: the first one stops it.
    data.max_failed_shards = 8
    # Batches made ahead of the step, in a thread.
    data.prefetch_batches = 4
    # Where `datasets` and `transformers` keep what they download. None: their own default.
    data.cache_dir = placeholder(str)

    config.tokenizer = tokenizer = ConfigDict()
    # A hub name or a local directory. None: the one of model.model_name_or_path, else one is trained on the head of
    # the text.
    tokenizer.tokenizer_name = placeholder(str)
    # Slow tokenizers are not supported; the key stands for those who come from the reference's flags.
    tokenizer.use_fast_tokenizer = True
    # Of a tokenizer trained here: "bpe" (of bytes), "wordpiece", "unigram", or "auto", the one of the model's family:
    # bpe for roberta and modernbert, wordpiece for bert, distilbert and electra, unigram for albert, xlm-roberta and
    # camembert. The family also says how the special tokens are called.
    tokenizer.algorithm = "auto"
    # Fold case and drop accents, as "uncased" models do; wordpiece, and unigram of albert.
    tokenizer.lowercase = False
    # Entries, special tokens included, and documents it is trained on.
    tokenizer.vocab_size = 50_265
    tokenizer.train_documents = 100_000
    # "auto": `gigatoken` where it gives the same ids as `tokenizers` (byte-level BPE), else `tokenizers`.
    # "gigatoken" or "tokenizers": that one.
    tokenizer.backend = "auto"

    config.model = model = ConfigDict()
    # The family, whose defaults hold when config_name and model_name_or_path are None: "roberta", "xlm-roberta",
    # "camembert", "roberta-prelayernorm", "bert", "distilbert", "electra" (the generator), "albert", "roformer" or
    # "modernbert".
    model.model_type = "roberta"
    # A hub name or local directory whose config.json is copied, without the weights.
    model.config_name = placeholder(str)
    # A hub name or local directory, such as a run's model/, whose config.json and weights training starts from
    # (mlm/models/hf/pretrained.py says what becomes of another vocabulary, longer rows and missing heads).
    model.model_name_or_path = placeholder(str)
    # Of the computation: "float32" or "bfloat16". Parameters, reductions and the optimizer stay float32.
    model.dtype = "float32"
    # "plain"; "xla" and "cudnn" are jax.nn.dot_product_attention's, the second a flash kernel for NVIDIA GPUs with
    # dtype "bfloat16". Only "plain" drops attention weights: it is what trains unless attention_probs_dropout_prob is
    # 0. "auto": "cudnn" where it can run, else "plain".
    model.attention = "auto"
    # What the backward pass computes anew. "none": what the compiler likes. "dots": the activation of the feed-forward
    # net, which saves memory and bytes to move. "full": whole layers, which leaves one array a layer in memory
    # and costs a forward pass more. "auto": "dots", on CPU "none", where operations are dearer than memory.
    model.remat = "auto"
    # One layer is compiled for all that are alike, which is quicker. Checkpoints are the same either way, but dropout
    # masks are not.
    model.scan_layers = False
    # Fields of the Hugging Face config to change. None: as in the config above; vocab_size, pad_token_id,
    # bos_token_id and eos_token_id then come from the tokenizer when there is no config to copy.
    model.overrides = overrides = ConfigDict()
    overrides.vocab_size = placeholder(int)
    overrides.hidden_size = placeholder(int)
    overrides.num_hidden_layers = placeholder(int)
    overrides.num_attention_heads = placeholder(int)
    overrides.intermediate_size = placeholder(int)
    overrides.hidden_act = placeholder(str)
    overrides.hidden_dropout_prob = placeholder(float)
    overrides.attention_probs_dropout_prob = placeholder(float)
    overrides.max_position_embeddings = placeholder(int)
    overrides.type_vocab_size = placeholder(int)
    overrides.initializer_range = placeholder(float)
    overrides.layer_norm_eps = placeholder(float)
    # Of some families only; the others refuse them. electra, albert, roformer: width of the embeddings.
    overrides.embedding_size = placeholder(int)
    # albert: groups of layers with parameters of their own, and blocks in a group.
    overrides.num_hidden_groups = placeholder(int)
    overrides.inner_group_num = placeholder(int)
    # roformer: rotary positions for values too.
    overrides.rotary_value = placeholder(bool)
    # modernbert: global attention at every so many layers; tokens that the others see (half on each side); the bases
    # of the rotary positions of either kind; biases; whether the decoder is the word embeddings.
    overrides.global_attn_every_n_layers = placeholder(int)
    overrides.local_attention = placeholder(int)
    overrides.global_rope_theta = placeholder(float)
    overrides.local_rope_theta = placeholder(float)
    overrides.attention_bias = placeholder(bool)
    overrides.mlp_bias = placeholder(bool)
    overrides.norm_bias = placeholder(bool)
    overrides.classifier_bias = placeholder(bool)
    overrides.decoder_bias = placeholder(bool)
    overrides.classifier_activation = placeholder(str)
    overrides.embedding_dropout = placeholder(float)
    overrides.mlp_dropout = placeholder(float)
    overrides.initializer_cutoff_factor = placeholder(float)
    overrides.tie_word_embeddings = placeholder(bool)

    config.masking = masking = ConfigDict()
    # The share of tokens to predict, special tokens and padding aside.
    masking.mlm_probability = 0.15
    # Of those: the share replaced by the mask token, and by a random token; the rest stays as it is.
    masking.mask_replace_prob = 0.8
    masking.random_replace_prob = 0.1

    config.optimizer = optimizer = ConfigDict()
    # The peak. It rises linearly over warmup_steps updates from 0, then follows the schedule down to 0 at
    # num_train_steps: "linear", "cosine", or "constant" (stays at the peak).
    optimizer.learning_rate = 5e-5
    optimizer.warmup_steps = 0
    optimizer.schedule = "linear"
    # Of AdamW: the decay of the running means of gradients and of their squares, and what is added to the root of the
    # latter.
    optimizer.adam_beta1 = 0.9
    optimizer.adam_beta2 = 0.999
    optimizer.adam_epsilon = 1e-8
    # Decoupled, as in AdamW; biases and norm scales have none.
    optimizer.weight_decay = 0.0
    # The gradient's global norm is scaled down to this. 0: no clipping.
    optimizer.max_grad_norm = 0.0
    # An update whose loss or gradient is not finite is skipped: parameters and optimizer stay as they were. After so
    # many in a row the run stops: its parameters will not mend themselves.
    optimizer.max_skipped_steps = 10
    # Skip an update, too, whose gradient norm is over so many times the running mean of the last 100 or so. 0: never.
    optimizer.spike_factor = 0.0

    config.checkpoint = checkpoint = ConfigDict()
    # The newest ones that are kept.
    checkpoint.keep_checkpoints = 2
    # Of the older ones, those whose number of updates is a multiple of this are kept, too. 0: none.
    checkpoint.keep_every_steps = 0

    config.export = export = ConfigDict()
    # Of the weights in `model/`: "float32", as they are trained, or "bfloat16" or "float16", half the size.
    export.dtype = "float32"

    config.hub = hub = ConfigDict()
    # Upload `model/` and the tensorboard files after every evaluation, in the background.
    hub.push_to_hub = False
    # "name" or "owner/name". None: the work directory's own name.
    hub.hub_model_id = placeholder(str)
    # Of a repository that is made here.
    hub.private = False
    # For the model card, in the hub's abbreviations: such as "apache-2.0", and ("en", "de").
    hub.license = placeholder(str)
    hub.languages = ()

    config.profile = profile = ConfigDict()
    # Trace num_steps updates after first_step for tensorboard's profile page. 0 steps: no trace.
    profile.first_step = 10
    profile.num_steps = 0

    config.report = report = ConfigDict()
    # Sentences with "<mask>" (whatever the tokenizer's own mask token is) that the finished model fills in; yours to
    # set for another language: --config.report.sentences="('Die <mask> ist da.',)".
    report.sentences = (
        "The capital of France is <mask>.",
        "She opened the <mask> and went into the house.",
        "In the year 1969, two men walked on the <mask>.",
    )
    return config.lock()
