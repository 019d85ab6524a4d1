"""What a student is taught: row losses, the chunked head, hidden-state losses, the weighted sum.

Where the batches come from is data/, how the steps are made is run/.
"""
