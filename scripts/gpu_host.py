"""Host time of eager calls: python scripts/gpu_host.py [--tokens 1,16,52,901,4096]

A line for each T, in us a call until it returns, the device busy: least and median of seven rounds of 60 calls. `bound`: with launches
bound to their addresses (`blockmoe.operator.bound`), as from the fourth call with the same ones on; given: with `out` and `workspace`, too;
`unbound`: by Triton's launcher. Beside them one `add_` of torch, since machines differ by much. Exit code 1 where the calls don't agree bit
for bit: bound, on another stream, in another thread, from a CUDA graph.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from collections.abc import Callable

import gpu_operator as operator
import torch

from blockmoe.geometry import HEADLINE
from blockmoe.operator import api, launch
from blockmoe.operator.workspace import workspace_size

CALLS, ROUNDS = 60, 7


def host_us(call: Callable[[], object]) -> str:
    rounds = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        rounds.append((time.perf_counter() - start) / CALLS * 1e6)
    torch.cuda.synchronize()
    return f"{min(rounds):.1f}, {statistics.median(rounds):.1f}"


def unbound(call: Callable[[], object]) -> str:
    bind, launch.Prepared._bind = launch.Prepared._bind, lambda *given: None
    for known in api._calls.values():
        for prepared in known.rounds or ():
            prepared._number = next(launch._numbers)
    try:
        return host_us(call)
    finally:
        launch.Prepared._bind = bind


def agree(call: Callable[[], object], out: torch.Tensor) -> list[str]:
    """What differs from the first call, which nothing was bound for."""
    expected, different = None, []

    def after(name: str, act: Callable[[], object]) -> None:
        nonlocal expected
        out.fill_(float("nan"))
        act()
        torch.cuda.synchronize()
        bits = out.view(torch.int16)
        expected = bits.clone() if expected is None else expected
        different.extend([] if torch.equal(bits, expected) else [name])

    def elsewhere() -> None:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()

    def in_a_thread() -> None:
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()

    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    for n in range(5):
        after(f"call {n}", call)
    for n in range(4):
        after(f"call {n} on another stream", elsewhere)
    with torch.cuda.graph(graph, stream=side):  # where launches are bound
        call()
    after("replay", graph.replay)
    after("in a thread", in_a_thread)
    return different


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="1,16,52,901,4096", metavar="T,T,...")
    weights, one, wrong = operator.weights(HEADLINE), torch.zeros(1024, device="cuda"), []
    print("T | add_ | bound | bound, given | unbound")
    for tokens in map(int, parser.parse_args().tokens.split(",")):
        inputs = (*operator.activations(HEADLINE, tokens), *weights)
        out = torch.empty(tokens, HEADLINE.hidden_size, dtype=torch.bfloat16, device="cuda")
        memory = torch.empty(workspace_size(HEADLINE, tokens), dtype=torch.uint8, device="cuda")
        given = lambda inputs=inputs, out=out, memory=memory: operator.call(inputs, HEADLINE, 32, out=out, workspace=memory)  # noqa: E731
        alone = lambda inputs=inputs: operator.call(inputs, HEADLINE, 32)  # noqa: E731
        wrong += [f"T = {tokens}: {name}" for name in agree(given, out)]
        print(f"{tokens} | {host_us(lambda: one.add_(1))} | {host_us(alone)} | {host_us(given)} | {unbound(alone)}", flush=True)
    if wrong:
        raise SystemExit("gpu_host: other bits: " + "; ".join(wrong))


if __name__ == "__main__":
    main()
