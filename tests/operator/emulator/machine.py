"""Programs, their roles and what these wait for, in an order that a seed decides."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from greenlet import greenlet

from emulator.memory import Access, Account, Fault, View

SHARED_BYTES = 232448  # what a program may have
ENGINES = 100  # asynchronous operations of a program at a time, each an agent of its own
ROLES = 12  # agents of a program, its roles
AGENTS = ROLES + ENGINES
SPEEDS = (1.0, 1.0, 0.3, 0.01)
LONGEST_SPIN = 2_000  # looks at memory while nothing else happened


class Barrier:
    """An mbarrier: the phase ends with the last of `count` arrivals and the last byte expected."""

    def __init__(self, count: int, view: View) -> None:
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
        self.access: Access | None = None

    def ready(self) -> bool:
        return all(operation.done for operation in self.behind)


class Role:
    """What runs a partition of a program's warps: one thread here."""

    def __init__(self, program: Program, name: str, warps: int, function: Callable, arguments: tuple) -> None:
        self.program, self.name, self.warps = program, f"program {program.number}, {name}", warps
        self.agent = program.agent()
        machine = program.machine
        self.view = machine.view()
        self.view.plain[self.agent] = 1
        self.acquired = machine.view()  # by single threads, since the last barrier
        self.behind_barrier = machine.view()
        self.said = ""
        self.copies: list[Operation] = []  # cp.async: not committed
        self.groups: list[list[Operation]] = []
        self.stores: list[Operation] = []
        self.speed = machine.draw.choice(SPEEDS)
        self.ready: Callable[[], bool] | None = None
        self.why = ""
        self.spinning, self.spins, self.seen = False, 0, 0
        self.thread = greenlet(lambda: function(*arguments), parent=machine.hub)
        machine.roles.append(self)

    def access(self, what: str, by_proxy: bool = False) -> Access:
        return Access(self.agent, int(self.view.plain[self.agent]), self.view, by_proxy, f"{self.name}: {what}")

    def publish(self) -> View:
        """What it knows and did, for others; what it does from here on is later."""
        view = self.view.copy()
        self.view.plain[self.agent] += 1
        return view

    def fence(self) -> None:
        self.view.fence()
        self.view.plain[self.agent] += 1

    def barrier(self) -> None:
        self.view.learn(self.acquired)
        self.behind_barrier = self.publish()

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
        self.shared = machine.draw.randbytes(SHARED_BYTES)
        self.shared = np.frombuffer(bytearray(self.shared), np.uint8)
        self.account = Account(SHARED_BYTES, f"program {number}'s shared memory", machine.agent_name)
        self.allocated = 0
        self.barriers: dict[int, Barrier] = {}
        self.ended = False
        self.under_way: list[Operation] = []  # which still have to do with its shared memory
        self.busy: list[Operation] = []
        self._roles = self._engines = 0

    def agent(self) -> int:
        self._roles += 1
        assert self._roles <= ROLES
        return self.number * AGENTS + self._roles - 1

    def engine(self) -> tuple[int, int]:
        """An agent for an asynchronous operation, and its clock. The role that begins one waits where too many are under way."""
        self.busy = [operation for operation in self.busy if operation.done < len(operation.steps)]
        Machine.current.wait(lambda: sum(one.done < len(one.steps) for one in self.busy) < ENGINES // 2, "asynchronous operations")
        self._engines += 1
        agent = self.number * AGENTS + ROLES + self._engines % ENGINES
        self.machine.clocks[agent] += 1
        return agent, self.machine.clocks[agent]

    def allocate(self, size: int) -> int:
        begin = -(-self.allocated // 1024) * 1024 if size >= 1024 else -(-self.allocated // 16) * 16
        self.allocated = begin + size
        if self.allocated > SHARED_BYTES:
            raise Fault(f"shared memory: {self.allocated} bytes asked for, {SHARED_BYTES} are there")
        return begin

    def end(self) -> None:
        self.ended = True
        for operation in self.under_way:
            raise Fault(f"program {self.number} ended while this was under way: {operation.what}")


class Machine:
    """Runs `main` once a program. `cluster` programs reach each other's barriers and shared memory."""

    current: Role  # whoever runs

    def __init__(self, programs: int, cluster: int, seed: int) -> None:
        self.draw = random.Random(seed)
        self.programs_count, self.cluster = programs, cluster
        self.clocks: dict[int, int] = defaultdict(int)
        self.counters: dict[tuple, View] = {}  # what a counter in global memory was released with
        self.roles: list[Role] = []
        self.operations: list[Operation] = []
        self.hub = greenlet(self._schedule)
        self.programs = [Program(self, number) for number in range(programs)]
        self._steps = self.progress = 0  # of these, those that were more than another look

    def view(self) -> View:
        return View(np.zeros(self.programs_count * AGENTS, np.int32), np.zeros(self.programs_count * AGENTS, np.int32))

    def agent_name(self, agent: int) -> str:
        for role in self.roles:
            if role.agent == agent:
                return role.name
        return f"an asynchronous operation of program {agent // AGENTS}"

    def of_cluster(self, program: Program) -> list[Program]:
        first = program.number // self.cluster * self.cluster
        return self.programs[first : first + self.cluster]

    def begin(self, program: Program, operation: Operation) -> Operation:
        operation.speed = self.draw.choice(SPEEDS)
        self.operations.append(operation)
        program.under_way.append(operation)
        program.busy.append(operation)
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
