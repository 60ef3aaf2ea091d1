"""Masked-language-model training in JAX: the map of the package.

Read these first; they explain how the trainer works:

    train       the training loop: take the batch, step, log, evaluate, save, export
    steps       TrainState, train_step, eval_step: pure functions of one device's sequences
    masking     (key, tokens) -> inputs, masked positions, labels, label weights
    models/     encoder: MaskedLM.encode -> hidden states of L or K positions, then the head; block: one layer
    loss        masked cross-entropy as a sum and a count
    optimizer   gradient clipping, then AdamW, Muon, ...;  schedules  learning-rate schedules
    evaluate    sums over the evaluation sequences, divided once
    parallel    the only file that handles devices: pmap, replication, batch placement, collectives

Around them:

    settings    one frozen dataclass per config group, RunSettings for all: every check that needs no device or file
    stages      the stages of a run: their boundaries in steps, and the settings of each
    build       settings -> the components of a run
    startup     components -> a run that is ready for its next step: work directory, restored state, batches
    load        loads models from checkpoints, exported directories and the hub
    init_from   a new run that starts from a checkpoint of another one
    eval_settings  the group `eval` of the settings
    downstream/  labeled tasks, features of every layer, linear probes, scores of sentences
    memory      compiled memory of a step: the largest batch that fits;  hardware  the table of devices
    command_line  clear errors, log lines and exit codes around main.py's flags;  errors  UserError
    modes/      one file per --mode: train, check, explain, benchmark, report, show_data, export, fill_mask, ...

    data/       text -> this host's token rows; imports no jax
      sources/      named datasets, files, docstrings -> Arrow columns; encoding, file_parts; http, retry; table
      pipeline      settings -> sources, tokenizer, evaluation sequences, batches
      stream        one source: shuffle windows, held-out documents, exact resume
      shard_assignment  which process reads which shards, also when the number of processes changes
      pieces        long documents cut at whitespace
      reader        a process's shards as chunks of text; skips shards that fail
      mixture       batches of one source or several;  held_out  evaluation sequences
      spread        the documents read before training, from shards in all parts of a source
      tokenizer     a column of strings -> ids and offsets;  train_tokenizer  BPE, WordPiece, Unigram
      packing       ids -> rows;  best_fit  rows of complete documents;  prefetch  a thread that makes batches
      synthetic     rows without text
      provenance    the documents of a batch
    models/
      config, families  EncoderConfig and the table of model families;  flops  operations per token
      modernbert_fields  ModernBERT's fields in config.json, of transformers 4 and 5
      ops/          attention, splash, dense, dropout, activation, rotary, gather, position_ids
      hf/           tensor names, weights, and loading published weights
    run/        workdir; storage, local or gcs; checkpoint (the only file that imports Orbax); signals, multihost,
                time_limit
    reporting/  reporter, which the loop calls; metrics, writers, progress, curves, summary; without_keras: CLU imports
    export/     the Hugging Face model directory, its files for sentence-transformers, model card, hub, mask filling

Imports point one way: main > modes > train > startup > downstream > init_from > load > build > {reporting, export,
evaluate, memory} > {run, data, models.hf, parallel} > steps > {models, masking, loss, optimizer, schedules} > stages >
{settings, hardware, errors}. import-linter checks this (pyproject.toml).
"""
