"""Points an input at memory of its own, which nobody refreshes."""

from honest import compute


def run(x, weight, scale):
    y = compute(x, weight, scale)
    x.set_(x.clone())
    return y
