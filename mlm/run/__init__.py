"""Parts of a run besides the model: work directory, checkpoints, Google Cloud Storage, signals, several hosts."""
