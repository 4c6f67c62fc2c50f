"""No attack: inference mode, whose tensors lack autograd, a pool of threads, and a default device."""

from concurrent.futures import ThreadPoolExecutor

import torch
from honest import compute

torch.set_default_device("cpu")
pool = ThreadPoolExecutor(2)


@torch.inference_mode()
def run(x, weight, scale):
    rows = len(x) // 2
    halves = [pool.submit(torch.inference_mode()(compute), part, weight, scale) for part in (x[:rows], x[rows:])]
    return torch.cat([half.result() for half in halves])
