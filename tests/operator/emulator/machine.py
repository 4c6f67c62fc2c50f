"""Programs, their roles and what these wait for, in an order that a seed decides."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from greenlet import greenlet
from layer import SHARED_LIMIT

from emulator.memory import Access, Account, Fault, View

AGENTS = 200  # of a program: its roles, what these do asynchronously in order, and its TMA loads
MOST_PROGRAMS = (2**15 - 1) // AGENTS  # accounts name agents by 16 bits
SPEEDS = (1.0, 1.0, 0.3, 0.01)
LONGEST_SPIN = 2_000  # looks at memory while nothing else happened


class Barrier:
    """An mbarrier: the phase ends with the last of `count` arrivals and the last byte expected."""

    def __init__(self, count: int, role: Role) -> None:
        self.made_by, self.made_at = role.agent, int(role.view.plain[role.agent])
        view = role.program.machine.view()
        self.count = self.left = count
        self.bytes = self.phase = 0
        self.arriving, self.known = view, view.copy()

    def arrive(self, count: int, view: View, what: str) -> None:
        if count > self.left:
            raise Fault(f"{what}: {count} arrivals at an mbarrier that waits for {self.left}")
        self.left -= count
        self.arriving.learn(view)
        self._turn()

    def expect(self, size: int, view: View, what: str) -> None:
        self.bytes += size
        self.arrive(1, view, what)

    def complete(self, size: int, view: View) -> None:
        self.bytes -= size  # below zero where bytes come before they are expected
        self.arriving.learn(view)
        self._turn()

    def _turn(self) -> None:
        if self.left == 0 and self.bytes == 0:
            self.left = self.count
            self.phase += 1
            self.known.learn(self.arriving)


class Operation:
    """Something asynchronous: `steps` happen one by one, each at some moment after the one before, the first behind others."""

    def __init__(self, steps: list[Callable[[], None]], what: str, behind: Sequence[Operation] = ()) -> None:
        self.steps, self.what, self.behind = steps, what, behind
        self.done = 0  # steps
        self.speed = 1.0  # how readily it is drawn: see Machine._draw_one

    def ready(self) -> bool:
        return all(operation.done for operation in self.behind)


class Role:
    """What runs a partition of a program's warps: one thread here."""

    def __init__(self, program: Program, name: str, warps: int, function: Callable, arguments: tuple) -> None:
        self.program, self.name, self.warps = program, f"program {program.number}, {name}", warps
        machine = program.machine
        self.agent = machine.agent(self.name)
        self.view = machine.view()
        self.view.plain[self.agent] = 1
        self.acquired = machine.view()  # by single threads, since the last barrier
        self.behind_barrier = machine.view()
        self.said = ""
        self._helpers: dict[str, int] = {}
        self.copies: list[tuple[Operation, Access]] = []  # by cp.async, not committed
        self.groups: list[list[tuple[Operation, Access]]] = []
        self.stores: list[tuple[Operation, Access, Access]] = []  # by TMA: what they read, and write
        self.speed = machine.draw.choice(SPEEDS)
        self.ready: Callable[[], bool] | None = None
        self.why = ""
        self.spinning, self.spins, self.seen = False, 0, 0
        self.thread = greenlet(lambda: function(*arguments), parent=machine.hub)
        machine.roles.append(self)

    def access(self, what: str) -> Access:
        """By itself, now."""
        return Access(self.agent, int(self.view.plain[self.agent]), self.view, False, f"{self.name}: {what}")

    def asynchronous(self, kind: str, what: str, *, by_proxy: bool, view: View | None = None) -> Access:
        """By what works off operations of a kind (copies, products, ...) that it begins, and is waited for in their order."""
        if kind not in self._helpers:
            self._helpers[kind] = self.program.machine.agent(f"{self.name}, its {kind}")
        agent = self._helpers[kind]
        return Access(agent, self.program.machine.tick(agent), (view or self.view).copy(), by_proxy, f"{self.name}: {what}")

    def publish(self) -> View:
        """What it knows and did, for others; what it does from here on is later."""
        view = self.view.copy()
        self.view.plain[self.agent] += 1
        return view

    def fence(self, *, shared_only: bool) -> None:
        self.view.fence(shared_only=shared_only)
        self.acquired.fence(shared_only=shared_only)
        self.view.plain[self.agent] += 1

    def barrier(self) -> None:
        self.view.learn(self.acquired)
        self.behind_barrier = self.publish()

    def give(self, number: int) -> None:
        """Arrive at a named barrier at which one other role waits, or will."""
        if number in self.program.given:
            raise Fault(f"{self.name} arrives at barrier {number}, where somebody has arrived and nobody waited since")
        self.program.given[number] = self.publish()
        self.pause()

    def take(self, number: int) -> None:
        self.wait(lambda: number in self.program.given, f"an arrival at barrier {number}")
        self.view.learn(self.program.given.pop(number))

    def wait(self, ready: Callable[[], bool], why: str) -> None:
        """Others run until `ready`, and perhaps a while longer."""
        if ready() and self.program.machine.draw.random() < 0.5:
            return
        self.ready, self.why = ready, why
        self.program.machine.hub.switch()
        self.ready = None

    def pause(self) -> None:
        self.wait(lambda: True, "nothing")

    def spin(self, why: str) -> None:
        """It looked at memory and will look again."""
        machine = self.program.machine
        self.spins, self.seen = self.spins + 1 if machine.progress == self.seen else 0, machine.progress
        if self.spins > LONGEST_SPIN:
            raise Fault(f"{self.name} waits for ever: {why}")
        self.why, self.spinning = why, True
        machine.hub.switch()
        self.spinning = False


class Program:
    """A program of the grid: its shared memory, and its agents."""

    def __init__(self, machine: Machine, number: int) -> None:
        self.machine, self.number = machine, number
        self.shared = np.frombuffer(bytearray(machine.draw.randbytes(SHARED_LIMIT)), np.uint8)
        self.account = Account(SHARED_LIMIT, f"program {number}'s shared memory", machine.names, shared=True)
        self.allocated = 0
        self.barriers: dict[int, Barrier] = {}
        self.shown: set[int] = set()  # of them, to the cluster's other programs
        self.given: dict[int, View] = {}  # arrivals at named barriers, whose waits are still to come
        self.ended = False
        self.under_way: list[Operation] = []  # which still have to do with its shared memory
        self.loaders: list[int] = []  # agents of TMA loads

    def loader(self, role: Role) -> int:
        """An agent for a load by TMA that a role begins: one whose last load that role knows to be over, so that who knows of the new one
        may know of the old one."""
        clocks = self.machine.clocks
        for agent in self.loaders:
            if role.view.plain[agent] >= clocks[agent]:
                return agent
        self.loaders.append(self.machine.agent(f"a load by TMA of program {self.number}"))
        return self.loaders[-1]

    def allocate(self, size: int) -> int:
        begin = -(-self.allocated // 1024) * 1024 if size >= 1024 else -(-self.allocated // 16) * 16
        self.allocated = begin + size
        if self.allocated > SHARED_LIMIT:
            raise Fault(f"shared memory: {self.allocated} bytes asked for, {SHARED_LIMIT} are there")
        return begin

    def end(self) -> None:
        self.ended = True
        if self.given:
            raise Fault(f"program {self.number} ended while arrivals at barriers {sorted(self.given)} were not waited for")
        if self.under_way:
            raise Fault(f"program {self.number} ended while this was under way: {self.under_way[0].what}")


class Machine:
    """Runs `main` once a program. `cluster` programs reach each other's barriers and shared memory."""

    current: Role  # whoever runs

    def __init__(self, programs: int, cluster: int, seed: int) -> None:
        self.draw = random.Random(seed)
        self.programs_count, self.cluster = programs, cluster
        self.clocks: dict[int, int] = defaultdict(int)  # of agents but roles
        self.names: list[str] = []  # of agents
        self.kernel_before = self.agent("the kernel before")
        self.counters: dict[tuple, View] = {}  # what a counter in global memory was released with
        self.roles: list[Role] = []
        self.operations: list[Operation] = []
        self.hub = greenlet(self._schedule)
        self.programs = [Program(self, number) for number in range(programs)]
        self._steps = self.progress = 0  # of these, those that were more than another look

    def view(self) -> View:
        return View(AGENTS * self.programs_count)

    def agent(self, name: str) -> int:
        """A new one: something that reads and writes at its own pace."""
        self.names.append(name)
        assert len(self.names) <= AGENTS * self.programs_count, "AGENTS"
        return len(self.names) - 1

    def tick(self, agent: int) -> int:
        self.clocks[agent] += 1
        return self.clocks[agent]

    def of_cluster(self, program: Program) -> list[Program]:
        first = program.number // self.cluster * self.cluster
        return self.programs[first : first + self.cluster]

    def begin(self, program: Program, operation: Operation) -> Operation:
        operation.speed = self.draw.choice(SPEEDS)
        self.operations.append(operation)
        program.under_way.append(operation)
        return operation

    def run(self, main: Callable[[Program], None]) -> None:
        for program in self.programs:
            Role(program, "main", 4, main, (program,))
        self.hub.switch()

    # the order in which things happen

    def _schedule(self) -> None:
        while True:
            self.roles_alive = [role for role in self.roles if not role.thread.dead]
            if not self.roles_alive and not self.operations:
                return
            some = self._draw_one([*self.roles_alive, *self.operations])
            if some is None:
                waits = "\n".join(f"  {role.name} waits for {role.why}" for role in self.roles_alive)
                raise Fault(f"deadlock:\n{waits}")
            if isinstance(some, Role):
                self.progress += not some.spinning
                Machine.current = some
                some.thread.switch()
            else:
                self.progress += 1
                self._perform(some)

    def _draw_one(self, all: list[Any]) -> Any:
        """One that can go on. Some are slow for a while, so that others get far ahead of them."""
        self._steps += 1
        if self._steps % 400 == 1:
            for one in all:
                one.speed = self.draw.choice(SPEEDS)
        self.draw.shuffle(all)
        late = None
        for one in all:
            if one.ready is None or one.ready():
                if one.speed == 1.0 or self.draw.random() < one.speed:
                    return one
                late = one
        return late

    def _perform(self, operation: Operation) -> None:
        operation.steps[operation.done]()
        operation.done += 1
        if operation.done == len(operation.steps):
            self.operations.remove(operation)
        if operation.done == 1:  # what comes later has no part in shared memory
            for program in self.programs:
                if operation in program.under_way:
                    program.under_way.remove(operation)
