"""`equipoise doctor`: what works on this machine, and what is missing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from equipoise.cli.bench import JsonPath, check_json_path

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from equipoise.doctor.examination import Examination
    from equipoise.doctor.machine import Machine
    from equipoise.doctor.wires import WireReport

_LINES_OF_OUTPUT = 3


def doctor(
    communicator: Annotated[
        list[str] | None,
        typer.Option(
            help="Communicator that must work; may be repeated. By default all are tried, and the "
            "one that auto picks must."
        ),
    ] = None,
    timeout: Annotated[float, typer.Option(help="Longest that one trial may take, in s.")] = 20.0,
    json_path: JsonPath = None,
) -> None:
    """Try every wire on this machine, and say what is missing.

    Each wire carries experts between two processes: in CPU memory, and in that of two GPUs, or of
    one that both share. Exit status: 0 if the wire that auto picks works, or every communicator
    named; on a machine with GPUs, in their memory. 1 if not. 2 for wrong input.
    """
    check_json_path(json_path)
    from rich.console import Console

    from equipoise.doctor.examination import examine
    from equipoise.report.files import write_atomically

    to_stdout = str(json_path) == "-"
    console = Console(stderr=to_stdout)
    with console.status("looking at this machine") as status:
        found = examine(tuple(dict.fromkeys(communicator or ())), timeout, status.update)
    _show(console, found)
    if to_stdout:
        sys.stdout.write(found.to_json())
    elif json_path is not None:
        write_atomically(json_path, found.to_json())
    if not found.is_well:
        raise typer.Exit(1)


def _show(console: Console, found: Examination) -> None:
    table = _make_table()
    for name, value in (*_list_software(found), *_list_limits(found.machine)):
        table.add_row(name, value)
    console.print(table)
    console.print()
    table = _make_table("wire", "CPU memory", "GPU memory")
    for in_cpu, in_gpu in zip(found.wires[::2], found.wires[1::2], strict=True):
        table.add_row(in_cpu.communicator, _say_outcome(in_cpu), _say_outcome(in_gpu))
    console.print(table)
    for line in (*_list_reasons(found), *(f"Advice: {text}" for text in found.advice)):
        console.print(f"\n{line}", markup=False, highlight=False)
    console.print(f"\n{found.verdict}", markup=False, highlight=False)


def _make_table(*headings: str) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=bool(headings))
    for heading in headings or ("name", "value"):
        table.add_column(heading, overflow="fold")
    return table


def _say_outcome(wire: WireReport) -> str:
    said: list[str] = [wire.status]
    if wire.gb_per_s is not None:
        said.append(f"{wire.gb_per_s:.3g} GB/s")
    if wire.communicator == "auto" and wire.chosen:
        said.append(f"by {wire.chosen}")
    if wire.memory == "GPU" and len(wire.devices) > len(set(wire.devices)):
        said.append("both on one GPU")
    return ", ".join(said)


def _list_reasons(found: Examination) -> Iterator[str]:
    """Why wires do not work, each reason once."""
    names: dict[tuple[str, str], list[str]] = {}
    for wire in found.wires:
        if wire.reason is not None:
            names.setdefault((wire.reason, wire.memory), []).append(wire.communicator)
    for (reason, memory), whose in names.items():
        yield f"{', '.join(whose)} in {memory} memory: {reason}"
    for wire in found.wires:
        if wire.reason is not None and wire.output:
            lines = wire.output.splitlines()[-_LINES_OF_OUTPUT:]
            yield "\n  ".join((f"{wire.communicator} in {wire.memory} memory printed:", *lines))


def _list_software(found: Examination) -> Iterator[tuple[str, str]]:
    import platform

    packages = found.packages
    gpus, ucx = found.gpus, found.nixl.ucx
    yield "Equipoise", f"{packages['equipoise']}, Python {platform.python_version()}"
    yield "torch", f"{packages['torch']}, {_say_cuda()}"
    driver = f"{gpus.driver}, up to CUDA {gpus.driver_cuda}" if gpus.driver else "none"
    yield "NVIDIA driver", driver
    bindings = packages["nccl4py"]
    yield "NCCL", f"{gpus.nccl or 'none in torch'}, nccl4py {bindings or 'not installed'}"
    builds = [f"{k} {v}" for k, v in packages.items() if v and k.startswith(("nixl", "rixl"))]
    yield "NIXL", ", ".join(builds) or "not installed"
    yield "UCX", f"{ucx.version}: {', '.join(ucx.transports)}" if ucx else "not asked, see below"
    for number, gpu in enumerate(gpus.gpus):
        peers = ", ".join(map(str, gpu.peers))
        free = f"{_gib(gpu.free_bytes)} of {_gib(gpu.total_bytes)} free"
        yield (
            f"GPU {number}",
            f"{gpu.name}, {free}; reaches {f'GPU {peers}' if peers else 'no other'}",
        )


def _say_cuda() -> str:
    import torch

    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"


def _list_limits(machine: Machine) -> Iterator[tuple[str, str]]:
    from equipoise.doctor.machine import SHARED_MEMORY

    free = f"{_gib(machine.free_memory_bytes)} of {_gib(machine.memory_bytes)} free"
    yield "machine", f"{machine.cores} cores, memory {free}"
    yield (
        "shared memory",
        f"{SHARED_MEMORY}: {_gib(machine.free_shm_bytes)} of {_gib(machine.shm_bytes)} free",
    )
    most = machine.most_locked_bytes
    limit = "no limit" if machine.locked_bytes is None else f"{machine.locked_bytes >> 10:,} KiB"
    hard = "no limit" if most is None else f"{most >> 10:,} KiB"
    yield "locked memory", f"{limit}, may be raised to {hard}" if limit != hard else limit
    reserved = machine.reserved_huge_pages
    pages = f"; {reserved[0]} reserved, {reserved[1]} of them free" if reserved else ""
    yield "huge pages", f"{machine.huge_pages or 'not known'}{pages}"
    settings = [f"{name}={value}" for name, value in machine.settings.items()]
    yield "environment", " ".join(settings) or "nothing set that wires look at"


def _gib(num_bytes: int | None) -> str:
    return "unknown" if num_bytes is None else f"{num_bytes / (1 << 30):.1f} GiB"
