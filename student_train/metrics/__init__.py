"""Metrics of the tasks: pure functions of arrays, and counts that are added up.

What they are computed from, batch by batch, is collected in tasks/; no model is run here.
"""
