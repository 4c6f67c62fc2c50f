"""Computes in the input's memory and returns it."""

from honest import compute


def run(x, weight, scale):
    return x.copy_(compute(x, weight, scale)).view(x.shape)
