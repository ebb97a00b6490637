"""A step: augmentation, loss, gradients and update, on one or many devices."""
