"""What a task is in stage one: how its documents become rows.

How documents are read is `teacher_cache/corpus`'s matter.
"""
