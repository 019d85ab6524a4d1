"""What a cache is on disk: manifest, columns, frames, blocks, shards and their commits.

What a target is lives in `shared/targets`, where files lie in `shared/storage`.
"""
