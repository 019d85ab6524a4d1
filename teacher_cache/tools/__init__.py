"""The commands beside `run`: plan, inspect, verify, check, repack, clean, student."""
