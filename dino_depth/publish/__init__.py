"""What a run leaves for others: the exported encoder in three formats, checked for parity, its card, a page."""
