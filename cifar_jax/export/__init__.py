"""``python -m cifar_jax.export``: the command, which verifies each file, and the formats."""
