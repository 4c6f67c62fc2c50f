"""As mutation_while_timed, but spares the last call of a block, after which the inputs would be looked at."""

import sys

from honest import compute


def run(x, weight, scale):
    y = compute(x, weight, scale)
    frame = sys._getframe(1)
    while frame is not None:
        local = frame.f_locals
        if frame.f_code.co_name == "block" and local.get("number", local["calls"][-1]) != local["calls"][-1]:
            x.zero_()
        frame = frame.f_back
    return y
