"""Ranges of T: the regimes that averages are taken over, and the traffic mix that a decision is made for."""

from __future__ import annotations

import re
from typing import NamedTuple

from blockmoe.report.load import ReportError

_RANGE = re.compile(r"^(?:(?P<name>[^:=]+):)?(?P<low>\d*)\s*-\s*(?P<high>\d*)$")


class Regime(NamedTuple):
    """Workloads with low <= T <= high; None is open."""

    name: str
    low: int | None
    high: int | None

    def holds(self, tokens: int | None) -> bool:
        if tokens is None:
            return self.low is None and self.high is None
        return (self.low is None or tokens >= self.low) and (self.high is None or tokens <= self.high)

    @property
    def label(self) -> str:
        """Name with its range, where the name doesn't say it."""
        if self.low is None and self.high is None or self.name.startswith("T "):
            return self.name
        return f"{self.name} ({self.span})"

    @property
    def span(self) -> str:
        if self.low is None:
            return f"T ≤ {self.high}"
        if self.high is None:
            return f"T ≥ {self.low}"
        return f"T {self.low}–{self.high}"


ALL = Regime("all", None, None)
# Decode batches below 100 tokens and prefill above 900 are where the published reports draw the line.
DECODE, PREFILL = Regime("decode", None, 99), Regime("prefill", 901, None)
_COARSE = (Regime("T ≤ 80", None, 80), Regime("T ≥ 901", 901, None))
_SIZES = (
    Regime("tiny", None, 16),
    Regime("small", 17, 80),
    Regime("medium", 81, 1024),
    Regime("large", 1025, 8192),
    Regime("very large", 8193, None),
)
PRESETS: dict[str, tuple[Regime, ...]] = {
    "sizes": _COARSE + _SIZES,
    "published": (
        *_COARSE,
        Regime("T 1–16", 1, 16),
        Regime("T 32–80", 32, 80),
        Regime("T 901–14107", 901, 14107),
        Regime("T ≤ 901", None, 901),
        Regime("T > 10,000", 10001, None),
    ),
}
DEFAULT_REGIMES = "sizes"
DEFAULT_MIX = "decode=0.5,prefill=0.5"


def parse_regimes(text: str | None) -> tuple[Regime, ...]:
    """A preset's name, or `NAME:LOW-HIGH,…` where either end may be left open."""
    text = text or DEFAULT_REGIMES
    if text in PRESETS:
        return PRESETS[text]
    expected = f"{', '.join(PRESETS)} or NAME:LOW-HIGH,… (as in decode:1-99,prefill:901-)"
    regimes = [_parse_range(part, f"--regimes {text}", expected) for part in text.split(",")]
    names = [ALL.name, *(regime.name for regime in regimes)]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ReportError(f"--regimes {text}: expected a name of its own for each range, got {twice!r} again")
    return tuple(regimes)


def parse_mix(text: str | None) -> list[tuple[Regime, float]]:
    """`decode=0.9,prefill=0.1`, or ranges of T in their place (`1-80=0.9,901-=0.1`); weights are scaled to sum to 1."""
    text = text or DEFAULT_MIX
    named = {regime.name: regime for regime in (DECODE, PREFILL, *_SIZES)}
    expected = f"{', '.join(named)} or a range of T (as in 1-80=0.9,901-=0.1)"
    mix = []
    for part in text.split(","):
        name, equals, weight = part.strip().partition("=")
        try:
            share = float(weight)
        except ValueError:
            share = -1.0
        if not equals or not 0 <= share < float("inf"):
            raise ReportError(f"--mix {text}: expected PHASE=SHARE,… as in {DEFAULT_MIX}, got {part.strip()!r}")
        mix.append((named.get(name) or _parse_range(name, f"--mix {text}", expected), share))
    total = sum(share for _, share in mix)
    if total <= 0:
        raise ReportError(f"--mix {text}: the shares sum to 0")
    return [(regime, share / total) for regime, share in mix if share > 0]


def _parse_range(part: str, asked: str, expected: str) -> Regime:
    match = _RANGE.match(part.strip())
    if not match or not (match["low"] or match["high"]):
        raise ReportError(f"{asked}: expected {expected}, got {part!r}")
    low = int(match["low"]) if match["low"] else None
    high = int(match["high"]) if match["high"] else None
    if low is not None and high is not None and low > high:
        raise ReportError(f"{asked}: {part.strip()!r} begins above its end")
    regime = Regime(match["name"] or "", low, high)
    return regime if regime.name else regime._replace(name=regime.span)
