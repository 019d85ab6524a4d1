"""Runs side by side: table and page."""
