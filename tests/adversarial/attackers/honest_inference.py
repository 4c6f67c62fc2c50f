"""No attack: inference mode, whose tensors lack autograd, a pool of threads, and defaults of its own for device and dtype."""

from concurrent.futures import ThreadPoolExecutor

import torch
from honest import compute

torch.set_default_device("meta")
torch.set_default_dtype(torch.bfloat16)
pool = ThreadPoolExecutor(2)


@torch.inference_mode()
def run(x, weight, scale):
    rows = len(x) // 2
    halves = [pool.submit(torch.inference_mode()(compute), part, weight, scale) for part in (x[:rows], x[rows:])]
    return torch.cat([half.result() for half in halves])
