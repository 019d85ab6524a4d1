"""One self-contained HTML page from a template, and charts as numbers."""
