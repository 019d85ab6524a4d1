"""Rows -> what the teacher says: loading it, forwards, heads in chunks, probes, generation."""
