"""How the row loss of a chunk of logits is computed: one file an implementation, one table.

What the losses mean is in rows.py; where the logits come from is linear.py's matter.
"""
