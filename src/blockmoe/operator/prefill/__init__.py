"""The layer after routing as one persistent, warp-specialised Gluon kernel, from four pairs an expert on (sm_90).

Pairs are sorted by expert; tile t holds pairs t * 128 ..., all of one expert. A unit is a tile by a column tile (2 x 128 weight
rows). A multiprocessor runs one program; programs, or clusters of two, draw units in ascending order, all of GEMM1 before those of GEMM2.

  units.py     which tile and columns a unit is, and how units are drawn
  parts.py     stages, loads, products: what both GEMMs share
  turns.py     whose products the tensor cores have
  gate_up.py   GEMM1: hidden states gathered by token, SwiGLU, quantisation
  down.py      GEMM2: each tile's rows stored or added to the output in the order of experts
  zeros.py     the output's rows of tokens without a pair
  layer.py     the kernel and its roles

What programs wait for from each other, by counters in global memory:

  begin   what loads for both programs of a cluster: both have initialised their barriers (`ready`)
  always  a cluster's second program: the first has drawn a unit (`mail`)
  GEMM2   a unit's loads, and the drawing of the next: all rows of its tile of the intermediate stored (`finished`)
          a unit's additions: those of the same columns of the same tokens' rows before (`added`)

and within a cluster, in both GEMMs, for stages that the other's consumers free.

Why this ends. Only programs that run have units, and a cluster's programs start together. Both have the same units in the same order, and
of their tiles neither waits for the other, so stages become free in both. A unit is drawn while the one before it is being asked for (at
its first K block where it has few), and told when all roles have heard of the one before that (`draw`; the writer of zeros waits for
nothing but what it hears), so what a cluster does of a unit waits for its own lower units and, of other clusters, for `finished` and
`added` of lower ones. A consumer's turn waits for the other's product before, of the same unit or a lower one. Every cluster has ascending
units. So the lowest unit of all that is not done waits for nothing; and while units are left, a cluster that is done draws the next.
`finished` is told by a warp that waits for what its own program's consumers do of the unit.
"""
