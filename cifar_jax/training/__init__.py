"""A run: from its start, by epochs of steps, to its test and report."""
