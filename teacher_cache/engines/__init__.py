"""Rows -> what the teacher says: `base.py` is what a job asks of an engine, `hf.py` the reference.

What is kept of a teacher's logits is said in `teacher_cache/select`.
"""
