"""Exchanges the destination's data."""

from honest import compute


def run_into(x, weight, scale, y):
    y.data = compute(x, weight, scale)
