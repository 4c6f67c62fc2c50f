"""No attack: works on a stream of its own, ordered behind the caller's and joined to it."""

import torch
from honest import compute

side = []


def run(x, weight, scale):
    if not side:
        side.append(torch.cuda.Stream())
    caller = torch.cuda.current_stream()
    side[0].wait_stream(caller)
    with torch.cuda.stream(side[0]):
        y = compute(x, weight, scale)
    caller.wait_stream(side[0])
    y.record_stream(caller)
    return y
