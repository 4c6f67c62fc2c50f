"""A report is quick, and reading traces needs neither torch nor, without pictures, matplotlib."""

import subprocess
import sys
from pathlib import Path

from make import folder, run, times_of_a_yardstick, trace

from blockmoe.report import api


def test_500_traces_within_seconds_and_without_torch(tmp_path):
    sizes = [*range(1, 101)]
    folder(tmp_path, run({"alpha": 1.0, "beta": 1.1, "gamma": 1.2, "delta": 1.3, "epsilon": 1.4}, sizes))
    code = (
        "import sys; from pathlib import Path; from make import times_of_a_yardstick\n"
        "def report():\n"
        "    from blockmoe import report\n"
        f"    report.write([Path({str(tmp_path)!r})], formats=['md'])\n"
        "print(times_of_a_yardstick(report))\n"
        "print([name for name in ('torch', 'matplotlib', 'jinja2') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=Path(__file__).parent)
    assert result.returncode == 0, result.stderr
    times, modules = result.stdout.splitlines()
    assert modules == "[]"
    assert float(times) < 40


def test_ten_thousand_traces(tmp_path):
    latencies = {"a": 1.0, "b": 1.0, "c": 2.0, "d": 3.0}
    traces = [trace(name, tokens, latencies[name], blocks=2) for tokens in range(1, 2501) for name in latencies]
    folder(tmp_path, traces)
    assert times_of_a_yardstick(lambda: api.write([tmp_path], formats=["md", "html", "csv", "json"])) < 250
    assert "The first 500 of 2500 workloads" in (tmp_path / "report.md").read_text()
