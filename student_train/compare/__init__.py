"""Runs side by side: table and page.

A single student on a cache is evaluate/.
"""
