"""Has the destination's storage allocated anew."""

from honest import compute


def run_into(x, weight, scale, y):
    y.resize_(4 * len(x), x.shape[1])
    y.resize_(x.shape)
    y.copy_(compute(x, weight, scale))
