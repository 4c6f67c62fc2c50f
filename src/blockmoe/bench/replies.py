"""What a worker may answer to each request. A solution shares the worker's process and can write to its socket (`docs/guards.md`): what the
bench's own code never says must fail that solution, not the run."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from blockmoe.bench.schema import Status

Time = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
Call = Annotated[str, Field(pattern=r"^-?\d{1,9}$")]  # its number


class Opened(BaseModel):
    inputs: str


class Digests(BaseModel):
    outputs: dict[Call, str]


class Warmed(BaseModel):
    host_us: Time | None


class Timed(BaseModel):
    ms: Time
    events_ms: Time | None


class Block(Digests):
    samples: list[Timed] = Field(min_length=1)
    inputs: str
    timer: str


class Captured(BaseModel):
    graph_ms: Time


class Uncaptured(BaseModel):
    graph_error: str


class Judged(Digests):
    status: Status
    message: str
    correctness: dict[str, Any] | None


_KINDS = {
    "open": Opened,
    "check": Digests,
    "warm": Warmed,
    "block": Block,
    "graph": Captured | Uncaptured,
    "remember": Digests,
    "judge": Judged,
}
REPLIES = {do: TypeAdapter(kind) for do, kind in _KINDS.items()}


def is_one(do: str, reply: dict[str, Any]) -> bool:
    """Whether the bench answers so to `do`; to a request that is not among REPLIES anything is an answer."""
    try:
        if do in REPLIES:
            REPLIES[do].validate_python(reply)
    except ValidationError:
        return False
    return True
