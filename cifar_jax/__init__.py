"""Convolutional networks on CIFAR-10 in JAX, in a functional style."""

__version__ = "0.1.0"
