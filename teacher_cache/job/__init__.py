"""A capture job: resolve the options, calibrate, publish, capture shard by shard."""
