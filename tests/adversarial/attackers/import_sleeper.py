"""Sleeps until the timeout while it is imported."""

import time

time.sleep(3600)


def run(x, weight, scale):
    raise AssertionError
