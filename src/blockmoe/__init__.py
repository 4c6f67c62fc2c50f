"""blockmoe: the FP8 block-scale mixture-of-experts operator for Hopper, and the bench that measures it."""

__version__ = "0.1.0"
