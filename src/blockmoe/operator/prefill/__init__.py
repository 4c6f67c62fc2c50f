"""The prefill engine: the layer after routing as two persistent, warp-specialised Gluon kernels, for many pairs an expert (sm_90).

Pairs are sorted by expert; tile t holds pairs t * 128 ..., all of one expert. A unit is a tile by a column tile (2 x 128 weight
rows); unit u is column tile u % COLUMNS of tile u // COLUMNS. A multiprocessor runs one program, whose loading warp draws units
from a ticket, so each program has ascending ones, and tells its other warps (`parts.py`).

  gate_up.py   GEMM1: hidden states copied into a ring of sorted tiles, SwiGLU, quantisation
  down.py      GEMM2: each tile's rows stored or added to the output in the order of experts; zeros for tokens without a pair

What programs wait for from each other, by counters in global memory:

  GEMM1   a tile's loads: all its COLUMNS parts copied into the ring (`copied`)
          a tile's copying, where the ring is full: all COLUMNS units of tile - RING multiplied (`used`)
  GEMM2   a unit's addition: that of the same columns of the tiles that hold the same tokens' pairs before (`added`)

Why this ends. GEMM2: a unit waits for lower ones only; those were drawn before, by programs that run, each in ascending order. So
the lowest unit that is not added waits for nothing. GEMM1: take the first tile that is not wholly copied. It waits for the units of
an earlier tile. All tiles up to that one are copied, so programs get through their units, and draw more, until those are multiplied.
But parts to copy are dealt out beforehand, by the number of the program: every program must be running. Hence the cooperative
launch, which starts all of them or none. (GEMM2 is launched so too, though nothing waits for a program that has drawn nothing.)
"""
