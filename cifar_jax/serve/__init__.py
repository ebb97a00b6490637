"""``python -m cifar_jax.serve``: the command, and the web application."""
