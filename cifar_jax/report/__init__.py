"""``python -m cifar_jax.report``: run -> page (plain data) -> figures and html."""
