"""What a task is in stage one: one object a task, one file a family, listed in `table.py`.

How documents are read is `teacher_cache/corpus`'s matter, how a model is run `engines`'s.
"""
