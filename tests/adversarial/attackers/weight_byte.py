"""Changes the lowest bit of one byte of the weights."""

import torch
from honest import compute


def run(x, weight, scale):
    y = compute(x, weight, scale)
    weight.view(torch.uint8)[5, 7, 11] ^= 1
    return y
