"""One look at everything, and the verdict."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

from equipoise import __version__
from equipoise.bench.outcome import describe_machine
from equipoise.comm.registry import check_name, list_communicators
from equipoise.doctor.advice import explain_no_gpu, give_advice
from equipoise.doctor.machine import Machine, look_at_machine
from equipoise.doctor.probes import GpuReport, NixlReport, look_at_gpus, look_at_nixl
from equipoise.doctor.wires import Memory, WireReport, try_wires
from equipoise.errors import ConfigError

FORMAT_VERSION = 1

_PACKAGES = (
    "torch",
    "nixl",
    "nixl-cu13",
    "nixl-cu12",
    "rixl",
    "nccl4py",
    "nvidia-nccl-cu13",
    "nvidia-nccl-cu12",
)


@dataclass(frozen=True)
class Examination:
    """What was found.

    Attributes:
        wires: of each communicator, in CPU memory and then in that of GPUs.
        needed: the names that must work for all to be well.
        memory: the kind in which they must: that of GPUs, unless there are none.
        machine: limits and settings.
        gpus: what CUDA says.
        nixl: what NIXL and UCX say.
        packages: version of each package that wires use, None for one that is not installed.
        advice: what would be better, each with the command that mends it.
    """

    wires: tuple[WireReport, ...]
    needed: tuple[str, ...]
    memory: Memory
    machine: Machine
    gpus: GpuReport
    nixl: NixlReport
    packages: dict[str, str | None]
    advice: tuple[str, ...]

    @property
    def missed(self) -> tuple[WireReport, ...]:
        """The wires that are needed and do not work."""
        needed = (wire for wire in self.wires if wire.communicator in self.needed)
        return tuple(w for w in needed if w.memory == self.memory and w.status != "works")

    @property
    def is_well(self) -> bool:
        """Whether all that is needed works."""
        return not self.missed

    @property
    def verdict(self) -> str:
        """One sentence."""
        if self.missed:
            named = ", ".join(wire.communicator for wire in self.missed)
            verb = "does" if len(self.missed) == 1 else "do"
            return f"{named} {verb} not work in {self.memory} memory here."
        parts = []
        for wire in self.wires:
            if wire.communicator in self.needed and wire.memory == self.memory:
                speed = f"{wire.gb_per_s or 0:.2g} GB/s"
                name = wire.communicator
                said = (
                    f"auto takes {wire.chosen}, which works" if name == "auto" else f"{name} works"
                )
                parts.append(f"{said} ({speed} in {self.memory} memory)")
        return "; ".join(parts) + "."

    def to_json(self) -> str:
        """One object, as text that ends with a newline."""
        ucx = self.nixl.ucx
        values = {
            "format_version": FORMAT_VERSION,
            "works": self.is_well,
            "verdict": self.verdict,
            "needed": {"communicators": list(self.needed), "memory": self.memory},
            "wires": [wire.to_json() for wire in self.wires],
            "advice": list(self.advice),
            "packages": self.packages,
            "torch": {"cuda": torch.version.cuda, "hip": torch.version.hip, "nccl": self.gpus.nccl},
            "driver": {"version": self.gpus.driver, "cuda": self.gpus.driver_cuda},
            "gpus": [asdict(gpu) for gpu in self.gpus.gpus],
            "cuda": {"is_broken": self.gpus.is_broken, "problem": self.gpus.problem},
            "nixl": {"works": self.nixl.works, "problem": self.nixl.problem},
            "ucx": None if ucx is None else {**asdict(ucx), "transports": list(ucx.transports)},
            "machine": {**describe_machine(), **asdict(self.machine)},
        }
        return json.dumps(values, indent=2, allow_nan=False) + "\n"


def examine(
    names: Sequence[str] = (),
    timeout_s: float = 20.0,
    on_step: Callable[[str], None] = lambda _: None,
) -> Examination:
    """Look at the machine, and try wires.

    Args:
        names: of communicators that must work; empty to try all, of which the one that "auto"
            picks must.
        timeout_s: longest that one trial, or one question to a library, may take.
        on_step: called with what comes next.
    Collective: none; starts processes, and leaves none.
    Raises: ConfigError.
    """
    for name in names:
        check_name(name)
    if not 0 < timeout_s < float("inf"):
        raise ConfigError(f"--timeout must be a number of seconds above 0, got {timeout_s}")
    # First, as starting processes sets variables.
    machine = look_at_machine()
    on_step("asking CUDA")
    gpus = look_at_gpus(timeout_s)
    on_step("asking NIXL and UCX")
    nixl = look_at_nixl(timeout_s)
    wires = try_wires(
        names or ("auto", *list_communicators()),
        len(gpus.gpus),
        explain_no_gpu(gpus),
        timeout_s,
        lambda name, memory: on_step(f"trying {name} in {memory} memory"),
    )
    return Examination(
        wires=wires,
        needed=tuple(names) or ("auto",),
        memory="GPU" if gpus.gpus or gpus.is_broken else "CPU",
        machine=machine,
        gpus=gpus,
        nixl=nixl,
        packages=_list_packages(),
        advice=give_advice(machine, gpus, nixl),
    )


def _list_packages() -> dict[str, str | None]:
    # Equipoise may run from a tree that was never installed.
    versions: dict[str, str | None] = {"equipoise": __version__, **dict.fromkeys(_PACKAGES)}
    for name in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions
