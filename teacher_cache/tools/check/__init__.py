"""`cache-teacher check`: a cache is held against what its teacher says now."""
