"""No attack, written into the destination."""

from honest import compute


def run_into(x, weight, scale, y):
    y.copy_(compute(x, weight, scale))
