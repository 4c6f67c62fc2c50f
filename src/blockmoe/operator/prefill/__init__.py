"""The layer after routing as one persistent, warp-specialised Gluon kernel, for many pairs an expert (sm_90).

Pairs are sorted by expert; tile t holds pairs t * 128 ..., all of one expert. A unit is a tile by a column tile (2 x 128 weight
rows). A multiprocessor runs one program; units are dealt out to programs, or to clusters of two, in ascending order, all of GEMM1 before
those of GEMM2 (`parts.py`).

  parts.py     units, stages, loads, products: what both GEMMs share
  gate_up.py   GEMM1: hidden states gathered by token, SwiGLU, quantisation
  down.py      GEMM2: each tile's rows stored or added to the output in the order of experts
  layer.py     the kernel and its roles

What programs wait for from each other, by counters in global memory:

  begin   a cluster's programs: both have initialised their barriers (`ready`)
  GEMM2   a tile's loads: all its rows of the intermediate stored (`finished`)
          additions: all programs have found which tile adds to a token's row before another (`prepared`)
          a unit's addition: that of the same columns of the tiles that hold the same tokens' pairs before (`added`)

and within a cluster, in both GEMMs, for stages that the other's consumers free.

Why this ends. All programs run at once: a cooperative launch starts all of them or none. A cluster's programs have the same units at the
same time, of tiles of which neither waits for the other, so stages become free in both. GEMM1 waits for nothing else: every unit of it
ends, and `prepared` and `finished` are reached. Then a unit waits for additions of lower ones only, and every program has ascending ones,
so the lowest unit that is not added waits for nothing.
"""
