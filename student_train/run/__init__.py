"""One training run: the trainer, its folder, checkpoints, logs and signals."""
