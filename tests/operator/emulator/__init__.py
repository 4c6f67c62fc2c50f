"""Gluon kernels on the CPU: every role of every program, at an order that a seed decides, and whether all that they share is ordered.

Triton's interpreter knows no Gluon. Here a kernel's own Python functions run, with another language beneath them (`language.py`), each
role as a greenlet (`machine.py`), on bytes that know who wrote and read them last (`memory.py`). A run ends with the kernel's results, or
with a Fault: a race, an access out of bounds, a deadlock, a program that ends while another still reaches for its shared memory.

What is modelled

- mbarriers by arrivals, bytes and phases; counters in memory with release and acquire. Only they, `barrier` and the start of roles order
  what roles do: vector clocks, so that a race is found in any order in which it does not show.
- two proxies. What loads and stores wrote, TMA and wgmma may read behind a fence alone, the writer's or the reader's.
- asynchronous operations (TMA, cp.async, wgmma) happen at any moment between being asked for and being waited for.
- multicast and arrivals at both programs of a cluster, as `blockmoe.operator.ptx` puts them into the PTX.
- a release by one thread covers what the others did before the last `barrier`; what threads have acquired each for itself, the others see
  behind the next.

What is not

- threads of a role: it is one thread. So a barrier that only they need is not missed, nor are swizzles (shared memory is linear here), nor
  registers; an arrival at an mbarrier is taken to cover the whole role, as Triton puts a barrier before it.
- weak orders beyond these; the L1's stale lines; time.
- the tensor cores' sums of fewer bits than float32.
"""

from emulator.memory import Fault
from emulator.translate import emulate, interpret

__all__ = ["Fault", "emulate", "interpret"]
