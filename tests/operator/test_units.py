"""The units of the persistent kernels: every tile and column once, by programs that share what they are said to share."""

import random
from collections import Counter
from types import SimpleNamespace

import pytest

pytest.importorskip("triton.experimental.gluon")

from blockmoe.operator.prefill import layer, units, zeros  # noqa: E402
from blockmoe.operator.stream import compute, load  # noqa: E402
from blockmoe.operator.stream import sums as sums_of  # noqa: E402
from blockmoe.operator.stream import units as stream_units  # noqa: E402


class Lists:
    """`tile_group` of experts with so many tiles, as a pointer."""

    def __init__(self, tiles: list[int]) -> None:
        self.values = [4096 * sum(tiles[:i]) + n for i, n in enumerate(tiles) for _ in range(n)]

    def __add__(self, at: int) -> int:
        return self.values[at]


def in_python(function, monkeypatch, rank: int = 0):
    """A jit function's body, run as Python on integers."""
    language = SimpleNamespace(
        load=lambda at: at, program_id=lambda axis: rank, where=lambda so, a, b: a if so else b, to_tensor=int, minimum=min, constexpr=None
    )
    monkeypatch.setitem(function.fn.__globals__, "gl", language)
    monkeypatch.setitem(function.fn.__globals__, "TILES_AT_ONCE", 4)  # so that some experts have more
    return function.fn


SEEDS = range(12)


@pytest.mark.parametrize("columns", [4, 16, 28])
@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("seed", SEEDS)
def test_prefill(cluster, columns, seed, monkeypatch):
    draw = random.Random(seed)
    tiles = [draw.randint(1, 13) for _ in range(draw.randint(1, 6))]
    groups, seen = Lists(tiles), Counter()
    for unit in range(sum(tiles) * columns // cluster):
        places = [in_python(units.unit_at, monkeypatch, rank)(unit, groups, columns, cluster) for rank in range(cluster)]
        seen.update((tile, column) for tile, column, _ in places)
        assert len({paired for _, _, paired in places}) == 1
        if cluster == 2:
            (tile, column, paired), (other_tile, other_column, _) = places
            if paired:
                assert other_tile == tile + 1 and groups + tile == groups + other_tile and column == other_column
            else:
                assert other_tile == tile and other_column == column + 1
    assert len(seen) == sum(tiles) * columns and set(seen.values()) == {1}


@pytest.mark.parametrize("cluster", [1, 2])
def test_prefill_keeps_to_some_tiles(cluster, monkeypatch):
    """Of an expert's eleven tiles four, as many as are set here, go through all columns, then the next four, then the rest."""
    groups, columns, order = Lists([2, 11]), 16, []
    for unit in range(2 * columns // cluster, 13 * columns // cluster):
        order += [in_python(units.unit_at, monkeypatch, rank)(unit, groups, columns, cluster)[0] - 2 for rank in range(cluster)]
    assert [sorted(set(order[begin : begin + 4 * columns])) for begin in range(0, 11 * columns, 4 * columns)] == [
        [0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10],
    ]  # fmt: skip


@pytest.mark.parametrize("seed", SEEDS)
def test_prefill_ascends(seed, monkeypatch):
    """A unit's addition waits for tiles of lower experts: their units come before."""
    draw = random.Random(seed)
    tiles = [draw.randint(1, 5) for _ in range(6)]
    groups = Lists(tiles)
    unit_at = in_python(units.unit_at, monkeypatch)
    experts = [groups + unit_at(unit, groups, 28, 2)[0] for unit in range(sum(tiles) * 14)]
    assert experts == sorted(experts)


NUMBERS = {name: getattr(units, name).value for name in ("K", "MAIL", "DOWN", "END", "QUEUE", "THERE")}


class Drawing:
    """What `units.draw` calls, in Python: a ticket that other clusters draw from too, one cluster's mail, and what its programs tell."""

    def __init__(self, seed: int, others: bool) -> None:
        self.random, self.others = random.Random(seed), others
        self.next, self.mail, self.told = 0, {}, {0: [], 1: []}

    def atomic_add(self, ticket, one, sem):
        self.next += 1 + (self.random.randint(0, 3) if self.others else 0)
        return self.next - 1

    def atomic_xchg(self, at, value, sem):
        self.mail.setdefault(at, [0]).append(value)

    def wait_until(self, at, least, pause, how):
        return next(value for value in self.mail[at] if value >= least)  # in time, nothing that was there before will do

    def run(self, monkeypatch, rank: int, tiles: int, hidden: int, inter: int, cluster: int) -> list[tuple[int, int]]:
        """Kinds and numbers of the units told."""
        language = SimpleNamespace(
            load=lambda at, mask=True, other=0: at if mask else other, program_id=lambda axis: rank, to_tensor=int,
            where=lambda a, b, c: b if a else c, atomic_add=self.atomic_add, atomic_xchg=self.atomic_xchg,
        )  # fmt: skip
        wanted = there = SimpleNamespace(index=lambda i: None)
        told = dict(wait_until=self.wait_until, tell=lambda queue, told, heard, n, words: self.told[rank].append(words[:2]))
        told |= dict(unit_at=lambda unit, groups, columns, cluster: (unit, 0, 0), wait_until_finished=lambda *_: None, barrier=lambda: None)
        barriers = dict(mbarrier=SimpleNamespace(wait=lambda barrier, parity: None, arrive=lambda barrier, count: None))
        for name, value in dict(gl=language, **told, **barriers, **NUMBERS).items():
            monkeypatch.setitem(units.draw.fn.__globals__, name, value)
        units.draw.fn(0, 0, None, None, None, wanted, there, 0, tiles, 0, 0, 0, 0, hidden, inter, cluster)
        return self.told[rank]


@pytest.mark.parametrize("others", [False, True])
@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("seed", SEEDS)
def test_prefill_draws(cluster, seed, others, monkeypatch):
    """Both GEMMs' units, ascending, then the end: all of them where no other cluster draws; the same in a cluster's other program."""
    tiles, down, end = seed, NUMBERS["DOWN"], NUMBERS["END"]
    drawing = Drawing(seed, others)
    first, *more = [drawing.run(monkeypatch, rank, tiles, 1024, 512, cluster) for rank in range(cluster)]
    every = [(kind, unit) for kind in (0, down) for unit in range(tiles * 4 // cluster)] + [(end, 0)]
    assert all(told == first for told in more)
    assert first == sorted(set(first)) and first[-1][0] == end and set(first) <= set(every)
    assert others or first == every


@pytest.mark.parametrize("hidden", [256, 1536, 7168])
@pytest.mark.parametrize("seed", SEEDS)
def test_prefill_zeros(seed, hidden, monkeypatch):
    """Every token without a pair once, by some program, whatever units it hears of, also where there is none; and each hears of all."""
    draw = random.Random(seed)
    tokens, programs, tiles = draw.choice([1, 7, 133, 500]), draw.randint(1, 132), seed // 2
    pairs = [draw.randint(0, 2) for _ in range(tokens)]
    runs, page = hidden // 256, SimpleNamespace(shape=[zeros.page_runs(hidden)], store=lambda values: None)
    stored, told, heard = Counter(), [], []

    def hear(queue, told, _, n, warps):
        heard.append(told[n])
        return told[n], 0

    def store(out, at, buffer):
        stored.update(range(at[0], at[0] + buffer.shape[0]))

    language = SimpleNamespace(
        load=lambda at: pairs[at] if isinstance(at, int) else at.value, to_tensor=int, where=lambda a, b, c: b if a else c, maximum=max,
        minimum=min, static_range=range, zeros=lambda *_: None, BlockedLayout=lambda *_: None, bfloat16=None, constexpr=None,
    )  # fmt: skip
    calls = dict(hear_unit=hear, barrier=lambda: None, fence_async_shared=lambda: None, gl=language)
    copies = SimpleNamespace(async_copy_shared_to_global=store, store_wait=lambda pending: stored.update(waited=1))
    for name, value in dict(calls, tma=copies, **{name: NUMBERS[name] for name in ("K", "END")}, COLUMNS=256).items():
        monkeypatch.setitem(zeros.write_zeros.fn.__globals__, name, value)
    for program in range(programs):
        language.program_id, language.num_programs = (lambda axis, at=program: at), (lambda axis: programs)
        told, heard[:] = [*(draw.randint(0, NUMBERS["DOWN"]) for _ in range(draw.randint(0, 9))), NUMBERS["END"]], []
        zeros.write_zeros.fn(None, page, 0, None, told, None, SimpleNamespace(value=tiles), tokens, hidden, 512)
        assert heard == told
    assert stored.pop("waited") == programs
    assert stored == Counter(token * runs + run for token in range(tokens) if pairs[token] == 0 for run in range(runs))


@pytest.mark.parametrize("seed", SEEDS)
def test_stream(seed, monkeypatch):
    draw = random.Random(seed)
    tiles = [draw.randint(1, 4) for _ in range(draw.randint(1, 32))]
    groups, unit_at = Lists(tiles), in_python(stream_units.unit_at, monkeypatch)
    places = [unit_at(unit, groups, 32, False) for unit in range(32 * sum(tiles))]
    assert sorted(places) == [(tile, block) for tile in range(sum(tiles)) for block in range(32)]
    assert [groups + tile for tile, _ in places] == sorted(groups + tile for tile, _ in places)
    assert [unit_at(unit, None, 32, True) for unit in range(64)] == [(unit // 32, unit % 32) for unit in range(64)]


@pytest.mark.parametrize("blocks", [1, 2, 3, 10, 28])
@pytest.mark.parametrize("seed", SEEDS)
def test_stream_last_sum(blocks, seed, monkeypatch):
    """Every block of every tile once, a column group's units side by side; every run of columns of every slot once, in its column group."""
    draw = random.Random(seed)
    tiles, programs, some, tokens = [draw.randint(1, 4) for _ in range(draw.randint(1, 32))], draw.randint(1, 132), draw.randint(0, 50), 60
    groups, total = Lists(tiles), sum(tiles)
    gl = SimpleNamespace(load=lambda at: at, where=lambda so, a, b: a if so else b, maximum=max, minimum=min, constexpr=None)
    gl.num_programs = lambda axis: programs
    monkeypatch.setitem(stream_units.parts_drawn.fn.__globals__, "RUN", run := stream_units.RUN.value)
    for name in ("unit_at", "blocks_before", "second_unit", "runs_of", "parts_drawn"):
        function = getattr(stream_units, name).fn
        monkeypatch.setitem(function.__globals__, "gl", gl)
        monkeypatch.setitem(function.__globals__, name, function)
    first = stream_units.blocks_before(total, blocks)
    places = [stream_units.second_unit(unit, total, groups, blocks) for unit in range(total * blocks)]
    assert sorted(places) == [(tile, block) for tile in range(total) for block in range(blocks)]
    assert [block >= first for _, block in places] == sorted(block >= first for _, block in places)
    assert 0 <= first < blocks and (blocks - first) * total <= max(programs + total, blocks * total // 2, total)

    rows, warps = 128, 8
    zeros, sums = stream_units.parts_drawn(some, tokens, total, blocks, rows)
    assert zeros == -(-(tokens - some) // warps)
    monkeypatch.setitem(sums_of.part_at.fn.__globals__, "gl", gl)
    monkeypatch.setitem(sums_of.part_at.fn.__globals__, "runs_of", stream_units.runs_of)  # in Python, too, by now
    runs = [-(-of * 2 * rows // run) for of in (first, blocks - first)]
    parts = range(sums + -(-some // warps) * runs[1])
    found = [sums_of.part_at.fn(part, sums, first, blocks, rows) for part in parts]
    assert Counter(found) == Counter((g, step, n) for g in range(2) for step in range(-(-some // warps)) for n in range(runs[g]))


FLIGHTS = [
    (0, 96, 4), (95, 96, 4), (131, 132, 3), (132, 192, 7), (132, 160, 10), (131, 160, 3),  # of GEMM1
    (131, 208, 3), (132, 208, 6), (264, 272, 10),  # of GEMM2, behind 96 and 160 units of GEMM1
]  # fmt: skip


@pytest.mark.parametrize("tiles, tokens, near", [(33, 2048, 6), (56, 4096, 6), (57, 4096, 0), (64, 2048, 0), (33, 1055, 0), (33, 1056, 6)])
def test_tiles_under_way(tiles, tokens, near, monkeypatch):
    """Of the headline geometry by 132 programs: too many tiles, or too many for the tokens, and no row is told apart."""
    gl = SimpleNamespace(load=lambda at: at, where=lambda so, a, b: a if so else b, num_programs=lambda axis: 132)
    monkeypatch.setitem(layer.tiles_under_way.fn.__globals__, "gl", gl)
    monkeypatch.setitem(layer.tiles_under_way.fn.__globals__, "K", 128)
    assert layer.tiles_under_way.fn(tiles, tokens, 7168, 56) == near


@pytest.mark.parametrize("unit, units, flight", FLIGHTS)
def test_stream_flight(unit, units, flight, monkeypatch):
    gl = SimpleNamespace(num_programs=lambda axis: 132, minimum=min, maximum=max)
    monkeypatch.setitem(load.share_of_flight.fn.__globals__, "gl", gl)
    assert load.share_of_flight.fn(unit, units, 3, 10) == flight


class Ticket:
    """What `load.let_others_draw` sees: a number that grows by so many whenever it looks; how often it has."""

    def __init__(self, growth: int) -> None:
        self.growth, self.looks = growth, 0

    def __add__(self, lanes: int) -> "Ticket":
        return self

    def look(self) -> int:
        self.looks += 1
        return self.growth * self.looks

    def language(self, program: int, programs: int) -> SimpleNamespace:
        return SimpleNamespace(
            num_programs=lambda axis: programs, program_id=lambda axis: program, arange=lambda *given, layout: 1,
            BlockedLayout=lambda *given: None, to_tensor=int, max=lambda value, axis: value, int32=None,
            inline_asm_elementwise=lambda asm, constraints, given, **more: given[0].look(),
        )  # fmt: skip


@pytest.fixture
def counted(monkeypatch):
    """`stream.units.unit_counts` for so many programs, given the number of tiles."""
    language = SimpleNamespace(load=lambda at: at, to_tensor=int, where=lambda a, b, c: b if a else c)
    monkeypatch.setitem(stream_units.unit_counts.fn.__globals__, "gl", language)
    monkeypatch.setitem(stream_units.unit_counts.fn.__globals__, "SPLIT_TILES", stream_units.SPLIT_TILES.value)

    def count(programs: int, *given) -> tuple[int, int, int, int]:
        language.num_programs = lambda axis: programs
        return stream_units.unit_counts.fn(*given)

    return count


@pytest.mark.parametrize(
    ("programs", "tiles", "rows", "split", "dense", "shares"),
    [
        (132, 1, 64, 4, True, 1), (114, 1, 64, 4, True, 0), (132, 2, 64, 4, True, 0), (132, 0, 64, 4, True, 2),
        (132, 1, 128, 4, False, 2), (132, 2, 128, 4, False, 2), (132, 3, 128, 4, False, 1), (132, 4, 128, 4, False, 1),
        (132, 5, 128, 4, False, 0), (255, 5, 128, 4, False, 0), (114, 4, 128, 4, False, 0), (132, 1, 128, 2, False, 1),
        (132, 1, 128, 1, False, 0),
    ],
)  # fmt: skip
def test_shares_of_k(programs, tiles, rows, split, dense, shares, counted):
    """Row blocks are split while the shares are no more than programs, of few tiles; units are as many more."""
    out = 7168 // 64 if dense else tiles * 7168 // 256
    units = tiles * (2048 // rows) << shares
    assert counted(programs, tiles, 7168, 2048, rows, split, dense) == (tiles, shares, units, units + out)
    assert sorted({stream_units.share_of.fn(unit, shares) for unit in range(units)}) == list(range(1 << shares if tiles else 0))


@pytest.mark.parametrize("programs", [132, 114])
@pytest.mark.parametrize("tiles", [0, 1, 2, 3, 5])
def test_some_let_others_draw(programs, tiles, counted, monkeypatch):
    """As many as have no unit of GEMM1 look until the others have drawn, or 16 times; any 33 neighbours have an even share, but for
    two."""
    looks, split = {}, 4
    units = counted(programs, tiles, 7168, 2048, 64, split, True)[2]
    monkeypatch.setitem(load.let_others_draw.fn.__globals__, "unit_counts", lambda *given: counted(programs, *given))
    for growth in (0, 50):
        for program in range(programs):
            ticket = Ticket(growth)
            monkeypatch.setitem(load.let_others_draw.fn.__globals__, "gl", ticket.language(program, programs))
            load.let_others_draw.fn(ticket, tiles, 7168, 2048, 64, split)
            looks[growth, program] = ticket.looks
    waiting = [program for program in range(programs) if looks[0, program]]
    assert len(waiting) == (max(0, programs - units) if tiles else 0)
    assert all(looks[0, program] == 16 and looks[50, program] == -(-units // 50) for program in waiting)
    for first in range(0, programs - 33):
        share = sum(first <= program < first + 33 for program in waiting)
        assert abs(share - 33 * len(waiting) / programs) < 2


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("counts", [(2, 2, 2), (3, 3, 4, 1), (1, 1, 1)])
def test_consumers_share_stages(dense, counts):
    """Every stage is one consumer's, and of two each has every other stage through all units."""
    consumers = 2 if dense else 1
    owner, it = {}, 0
    for count in counts:
        for group in range(consumers):
            for step in range(compute.own_first.fn(it, group, dense), it + count, consumers):
                assert owner.setdefault(step, group) == group
        it += count
    assert sorted(owner) == list(range(sum(counts))) and all(owner[step] == step % consumers for step in owner)
