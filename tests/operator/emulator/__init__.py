"""Gluon kernels on the CPU: every role of every program, at an order that a seed decides, and whether all that they share is ordered.

Triton's interpreter knows no Gluon. Here a kernel's own Python functions run, with another language beneath them (`language.py`), each
role as a greenlet (`machine.py`), on bytes that know who wrote and read them last (`memory.py`). A run ends with the kernel's results, or
with a Fault: a race, an access out of bounds, a deadlock, a program that ends while another still reaches for its shared memory.

What is modelled

- mbarriers by arrivals, bytes and phases; counters in memory with release and acquire. Only they, `barrier` and the start of roles order
  what roles do, by vector clocks: two accesses that nothing orders are a race also in an order in which it does no harm.
- proxies: what loads and stores wrote, and what TMA stored, TMA and wgmma may read behind a fence alone, the writer's or the reader's; a
  fence of shared memory (.shared::cta) says nothing of global memory.
- TMA and cp.async happen at any moment between being asked for and being waited for; wgmma reads its operands all that time.
- multicast and arrivals at both programs of a cluster, as `blockmoe.operator.ptx` puts them into the PTX.
- the kernel before, which may still run until `gdc_wait` (PDL), but for weights, which no kernel writes.
- a release, or a store by TMA, by one thread covers what the others did before the last `barrier`, and what an mbarrier ordered since, for
  which all of them wait; what threads have acquired each for itself, the others see behind the next `barrier`. Strictly so: a release by a
  thread of its own stores, or what it reads by a counter of its own, is a race here too; no kernel does that.
- accesses outside of a list, or of a descriptor's tensor; int32 arrays that overflow (numbers outside of arrays do not, and nothing
  that fits a test comes near: that addresses are of 64 bits where they must be is the GPU tests' to see).

What is not

- threads of a role: it is one thread. An arrival at an mbarrier is taken to cover the role, as Triton puts a barrier before it
  (`uncovered` in test_aot_stream.py looks for that in the PTX). Nor are swizzles (shared memory is linear here) or registers.
- counters themselves: one that is overwritten unread shows in what it leads to, or not.
- weak orders beyond these; the L1's stale lines; time.
- the tensor cores' sums of fewer bits than float32.
"""

from emulator.memory import Fault
from emulator.translate import emulate, interpret

__all__ = ["Fault", "emulate", "interpret"]
