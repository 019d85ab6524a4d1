"""What a task is in stage two: what is collected from a batch, metrics, defaults."""
