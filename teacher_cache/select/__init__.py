"""Logits -> what is kept of them."""
