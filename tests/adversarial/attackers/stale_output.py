"""Returns without writing."""


def run_into(x, weight, scale, y):
    pass
