"""Masked-language-model training in JAX: the map of the package.

    train       the run: build, restore, loop over batch, step, log, evaluate, save, export
    interrupt   SIGTERM and SIGINT;  hosts  several processes as one run: they start and end together
    told        what a run says of itself at its beginning and its end
    fit         the largest batch that a device takes;  benchmark  where the time of an update goes
    preflight   looks through a run before it begins, for a machine;  explain  what config keys mean
    show_data   the ledger: documents and masked rows of any update of a run, made again
    saved       any checkpoint of a run as a model directory, means of them, sentences filled in by them
    setup       a config -> the parts of a run; everything a user can get wrong is found there
    warm_start  weights that are there, of ours or of transformers, fitted to a run's model
    text        a config -> sources, tokenizer, evaluation rows, and any process's batches
    workdir     the work directory's paths, and whether a run may go on in it;  bucket  one at gs://...
    report      what is told of a run;  terminal  the live line;  metric_files  where metrics go;  curves  their picture
    html_report a page of the curves of several runs
    checkpoint  the only file that imports Orbax
    export      the Hugging Face model directory;  card  its README.md;  hub  its way to the hub, in the background
    evaluate    sums over the evaluation rows, divided once;  fill_mask  guesses for the masked word
    parallel    the only file that knows devices

    steps       TrainState, train_step, eval_step: pure functions of one device's share
    masking     (key, tokens) -> inputs, positions, targets, weights
    models      the encoder in Linen, its config and weights in Hugging Face's form
    loss        cross-entropy as sums and counts
    optimizer   schedules and AdamW

    data        text -> this host's rows of token ids; knows no device
      sources     a name, files or a URL -> shards of text;  docstrings, files  two kinds of them
      network, remote  what is tried again when the network is bad;  files at URLs
      reader      a process's share of the shards, less those the network did not give
      dealing     who reads what, also when a run goes on with another number of processes
      stream      rows of one source: shuffle windows, held-out documents, exact resume;  ledger  their documents
      batches     rows of one source or a mixture, less the steps left out;  eval_rows  those held out
      tokenizer   load, save; a column of strings -> ragged ids;  train_tokenizer  in the dress of a family
      packing     ragged ids -> rows
      prefetch    a thread that makes batches ahead;  synthetic  rows without text

Imports point one way: main -> train -> the first group -> the second. `errors` holds the one exception that is meant
for the user. Beside the plan of the house there are `setup` (train.py would pass 400 lines), `workdir`, `curves` and
`fill_mask` (each has two users), `text` (what `show_data` needs of `setup`), and `data/files`: text, JSON-lines, CSV
and parquet files are read with Arrow itself, for `datasets` 5.2 stops on a column that only some files have, and gives
numbers among strings back as strings.
"""
