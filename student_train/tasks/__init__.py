"""What a task is in stage two: `base.py` says what it is asked, `table.py` lists the tasks.

Rows, logits, answers, defaults and exports of a task are here; no other room asks for its name.
"""
