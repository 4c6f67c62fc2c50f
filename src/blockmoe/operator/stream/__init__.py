"""The layer after routing as one persistent, warp-specialised Gluon kernel, where reading the weights is the bound (sm_90).

  units.py     which number stands for which unit of work, or part of the last sum
  load.py      its producers: weights by TMA, one warp; pairs by cp.async, one, two or four
  compute.py   its consumers, two where few tokens make one of them the bound: wgmma, promotion, epilogues
  sums.py      the output's last sum; a warp that tells what is stored
  stay.py      what the L2 kept may leave it
  layer.py     the kernel, and what `blockmoe.operator.either` needs of it

One program a multiprocessor. Units are drawn from a ticket, those of GEMM1 first, and told to the program's other roles, so that no
multiprocessor idles between the GEMMs: the weights of GEMM2 come in while the last tiles of GEMM1 are multiplied. Where tiles are few, a
row block of GEMM1 is several units, each of a share of K, and the last one's program adds the others' sums. Few tokens (`dense`):
a tile of an active expert lists all of them, and GEMM2 sums over the experts in its accumulator. Else pairs are sorted by expert, GEMM2
writes a row a pair, and the last sum, by token, comes in two column groups: of the first one's parts those draw who have no units left.

Why nobody waits for ever: a unit of GEMM2 waits for units of GEMM1, which have lower tickets, so programs that run drew them; those
wait for nothing (who lets others draw first has none, and looks 16 times at most), but the last share of K for the others, whose tickets
are lower still. Few tokens: who has a unit of GEMM2 draws none before it is multiplied, which waits for GEMM1 alone. A part of the last
sum waits for its column group's units of GEMM2; who has a part found no unit left, so all have been drawn. Who tells that a unit is stored
waits for its own program's consumer alone.
"""
