"""Logits -> what is kept of them: one object a kind of targets, listed in `kinds.py`.

How a kind is written to a cache and read from it is in `shared/targets`.
"""
