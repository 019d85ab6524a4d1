"""A capture job: resolve the options (`draft.py`), calibrate, publish, capture shard by shard."""
