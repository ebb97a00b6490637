"""From ``--data`` to arrays of images and labels, and batches of them."""
