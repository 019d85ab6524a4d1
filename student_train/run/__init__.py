"""One training run: the trainer, its folder, checkpoints, logs and signals.

What is learnt is loss/, and by whom is student/.
"""
