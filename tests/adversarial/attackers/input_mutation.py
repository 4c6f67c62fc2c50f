"""Zeroes the activations once it has read them."""

from honest import compute


def run(x, weight, scale):
    y = compute(x, weight, scale)
    x.zero_()
    return y
