"""From caches to micro-batches: which rows form a step, decoding, several caches as one."""
