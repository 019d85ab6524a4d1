"""What a student is taught: row losses, the chunked head, hidden-state losses, the weighted sum."""
