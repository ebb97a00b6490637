"""``python -m cifar_jax.export``: the command that checks each file, and the formats."""
