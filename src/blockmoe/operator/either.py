"""One kernel with both ways through the layer after routing: the roles of `stream`, or those of `prefill` where few experts take much.

Which is faster, the sizes alone don't tell: stream reads an expert's weights once for each of its tiles, of 64 pairs or 32
(`StreamTile.way`). Routing does, which counts them (`place_kernel`); a launch of each, one of them with nothing to do, took 5 to 8 us more.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_wait

from blockmoe.operator.launch import Launch, Slot
from blockmoe.operator.lists import LISTS
from blockmoe.operator.prefill import layer as by_prefill
from blockmoe.operator.prefill.layer import meeting_places as prefill_places
from blockmoe.operator.prefill.layer import prefill
from blockmoe.operator.stream import layer as by_stream
from blockmoe.operator.stream.layer import give_up, streams
from blockmoe.operator.stream.layer import meeting_places as stream_places
from blockmoe.operator.workspace import MOST_PROGRAMS, Round

GATHERERS = gl.constexpr(4)  # of stream: the kernel's first warps, which are four as prefill's first consumer
LOADERS = 40  # registers of a thread of stream's single warps


@gluon.jit(do_not_specialize=["tokens", "pitch"])
def either_kernel(
    w1, w2, p_w1, p_middle, p_middle_boxes, p_w2, p_runs,
    x, x_scale, w1_scale, w2_scale, middle, middle_scale, partial, rows, out, words,
    tile_count, tile_expert, tile_group, tile_begin, tile_end, pair_token, pair_weight, token_pair, token_pairs, slot_token, slot_count,
    before, way, ticket, part, finished, written, summed, added, ready, mail, tokens, pitch,
    HIDDEN: gl.constexpr, INTER: gl.constexpr, TOP_K: gl.constexpr, ROWS: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
    SMALL_N: gl.constexpr, SMALL_STAGES: gl.constexpr, SPLIT: gl.constexpr, DENSE: gl.constexpr, FLIGHT: gl.constexpr,
    BURST: gl.constexpr, LOADERS: gl.constexpr, WARPS: gl.constexpr,
    P_STAGES: gl.constexpr, P_CLUSTER: gl.constexpr, P_FLIGHT: gl.constexpr, P_MANY: gl.constexpr, P_TILES_APART: gl.constexpr,
    P_CONSUMERS: gl.constexpr, P_LOADERS: gl.constexpr, P_CARRIERS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """The layer after routing: `prefill_kernel`'s where `way` is 2, else `stream_kernel`'s, to which clusters are nothing; what begins with
    P is the former's. `out` and, in 64-bit words, `words` are the same."""
    places = stream_places(ROWS, N, max(STAGES, SMALL_STAGES), DENSE, GATHERERS)  # while routing goes on
    p_places = prefill_places(P_STAGES, P_CLUSTER)
    if PDL:
        gdc_wait()
    taken = gl.load(way)
    if taken < 2:
        lists = (tile_count, tile_expert, tile_group, tile_begin, tile_end, pair_token, pair_weight)
        slots = (token_pair, token_pairs, slot_token, slot_count)
        counters = (ticket, part, finished, written, summed)
        streams(
            taken, places, w1, w2, x, x_scale, w1_scale, w2_scale, middle, middle_scale, partial, rows, out, lists, slots, counters,
            tokens, HIDDEN, INTER, TOP_K, ROWS, N, STAGES, SMALL_N, SMALL_STAGES, SPLIT, DENSE, FLIGHT, BURST, LOADERS, WARPS, GATHERERS,
        )  # fmt: skip
    else:
        boxes = (p_w1, p_middle, p_middle_boxes, p_w2, p_runs)
        tiles = (tile_count, tile_expert, tile_group, tile_begin, tile_end)
        prefill(
            p_places, boxes, x, x_scale, w1_scale, w2_scale, words, middle_scale, token_pairs, pair_token, pair_weight, before, added,
            ready, ticket, mail, finished, tiles, tokens, pitch, HIDDEN, INTER, P_STAGES, P_CLUSTER, P_FLIGHT, P_MANY, P_TILES_APART,
            P_CONSUMERS, P_LOADERS, P_CARRIERS,
        )  # fmt: skip
        if taken > 2:  # never
            give_up(places)


def layer(x: Slot, x_scale: Slot, w1: Slot, w1_scale: Slot, w2: Slot, w2_scale: Slot, out: Slot, round: Round) -> list[Launch]:
    """Both GEMMs, SwiGLU and the output's last sum."""
    assert round.sm_count <= MOST_PROGRAMS, "counters and partial sums are of so many"
    tile, b, (*_, streaming, filling) = round.plan.gate_up, round.memory, round.ways
    inputs = (x, x_scale, w1_scale, w2_scale, b["middle"], b["middle_scale"], b["partial"], b["rows"], out, Slot(out.tensor, torch.int64))
    lists = (*LISTS, "before", "way", "ticket", "part", "finished", "written", "summed", "added", "ready", "mail")
    boxes = (*by_stream.boxes_of(w1, w2, tile.stream, streaming), *by_prefill.boxes_of(w1, w2, out, tile.prefill, filling))
    arguments = (*boxes, *inputs, *(b[n] for n in lists), round.sizes.tokens, filling.sizes.rows)
    constants = (*by_stream.constants_of(tile.stream, streaming), LOADERS, tile.stream.num_warps)
    _, _, *others = by_prefill.constants_of(tile.prefill, filling)  # the sizes again
    constants += (*others, round.plan.pdl)
    return [round.launch(either_kernel, round.sm_count, arguments, constants, GATHERERS.value, cluster=tile.prefill.cluster)]
