"""A report is quick, and reading traces needs neither torch nor, without pictures, matplotlib.

Processor time is measured, not wall time: other work on the machine must not fail a test.
"""

import resource
import subprocess
import sys
import time

from make import folder, run, trace

from blockmoe.report import api


def test_500_traces_within_seconds_and_without_torch(tmp_path):
    sizes = [*range(1, 101)]
    folder(tmp_path, run({"alpha": 1.0, "beta": 1.1, "gamma": 1.2, "delta": 1.3}, sizes))
    code = (
        "import sys; from pathlib import Path; from blockmoe import report;"
        f"report.write([Path({str(tmp_path)!r})], formats=['md']);"
        "print([name for name in ('torch', 'matplotlib', 'jinja2') if name in sys.modules])"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "[]", result.stderr
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 3


def test_ten_thousand_traces(tmp_path):
    latencies = {"a": 1.0, "b": 1.0, "c": 2.0, "d": 3.0}
    traces = [trace(name, tokens, latencies[name], blocks=2) for tokens in range(1, 2501) for name in latencies]
    folder(tmp_path, traces)
    start = time.process_time()
    api.write([tmp_path], formats=["md", "html", "csv", "json"])
    assert time.process_time() - start < 45
    assert "The first 500 of 2500 workloads" in (tmp_path / "report.md").read_text()
