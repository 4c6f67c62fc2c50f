"""No attack: the toy's layer, also for the attackers to fall back on."""

import torch


def compute(x, weight, scale):
    return x @ torch.einsum("eij,e->ij", weight.float(), scale)


def run(x, weight, scale):
    return compute(x, weight, scale)
