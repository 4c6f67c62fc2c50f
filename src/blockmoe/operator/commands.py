"""The command line over the operator: warmup."""

from __future__ import annotations

import sys
import time
from fnmatch import fnmatchcase
from typing import Annotated, Literal

import typer

from blockmoe.geometry import GEOMETRIES, HEADLINE

Dtype = Literal["float32", "bfloat16"]


def register(app: typer.Typer) -> None:
    """Add the commands of this module to an application."""
    app.command("warmup")(warmup)


def warmup(
    definitions: Annotated[
        list[str] | None, typer.Option(metavar="NAME…", help="Definitions: names or patterns.", show_default="the headline")
    ] = None,
    device: Annotated[str, typer.Option(metavar="cuda[:N]", help="For which GPU.")] = "cuda",
    logits_dtype: Annotated[Dtype, typer.Option(help="Of the routing logits.")] = "float32",
    bias_dtype: Annotated[Dtype, typer.Option(help="Of the routing bias.")] = "bfloat16",
) -> None:
    """Compile every kernel that the operator may launch for the definitions' sizes and such logits and bias, into Triton's cache."""
    try:
        names = _chosen(definitions or [HEADLINE.definition_name])
        index = _device(device)
    except ValueError as error:
        print(f"blockmoe: {error}", file=sys.stderr)
        raise typer.Exit(2) from None

    import torch

    from blockmoe.operator import warmup as compile_all

    for name in names:
        begin = time.perf_counter()
        count = compile_all(GEOMETRIES[name], index, getattr(torch, logits_dtype), getattr(torch, bias_dtype))
        print(f"{name}: {count} kernels in {time.perf_counter() - begin:.1f} s", flush=True)


def _chosen(patterns: list[str]) -> list[str]:
    """The bundled definitions that any of the patterns matches."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in GEOMETRIES):
            raise ValueError(f"--definitions: unknown definition {pattern!r}; known: {', '.join(GEOMETRIES)}")
    return [name for name in GEOMETRIES if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _device(name: str) -> int | None:
    """The index of a CUDA device, None for the current one; raises ValueError where it is not here."""
    kind, _, index = name.partition(":")
    if kind != "cuda" or (index and not index.isdecimal()) or name.endswith(":"):
        raise ValueError(f"--device: expected cuda or cuda:N, got {name}")
    try:
        import torch
        import triton  # noqa: F401

        from blockmoe.operator.machine import of_gpu
    except ModuleNotFoundError as error:
        raise ValueError(f"warmup: needs the package {error.name}, which is not installed") from None
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise ValueError("warmup: expected a CUDA device, found none")
    if index and int(index) >= count:
        raise ValueError(f"--device: expected cuda:0 to cuda:{count - 1}, got {name}")
    found = int(index) if index else None
    of_gpu(torch.cuda.current_device() if found is None else found, "--device")
    return found
