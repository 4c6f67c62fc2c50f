"""Sleeps until the timeout, and does not go when it is asked to."""

import signal
import time

signal.signal(signal.SIGTERM, signal.SIG_IGN)


def run(x, weight, scale):
    time.sleep(3600)
