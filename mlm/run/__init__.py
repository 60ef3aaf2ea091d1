"""What a run needs besides the model: work directory, checkpoints, Google Cloud Storage, signals, several hosts."""
