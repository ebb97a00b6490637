"""What a run saves, and the trained networks in it."""
