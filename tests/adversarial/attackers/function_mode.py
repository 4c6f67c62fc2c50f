"""Leaves a mode on that sees every torch function."""

from honest import compute
from torch.overrides import TorchFunctionMode


class Everywhere(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def run(x, weight, scale):
    if not hasattr(run, "mode"):
        run.mode = Everywhere()
        run.mode.__enter__()
    return compute(x, weight, scale)
