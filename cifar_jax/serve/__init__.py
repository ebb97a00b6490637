"""``python -m cifar_jax.serve``: the command, and the application that it serves."""
