"""What would be better on this machine, and the command for it."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from equipoise.doctor.machine import SHARED_MEMORY, Machine
from equipoise.doctor.probes import GpuReport, NixlReport

_ENOUGH_SHM_BYTES = 1 << 30


def explain_no_gpu(gpus: GpuReport) -> str:
    """Why torch sees no GPU here, and what to do about it.

    Args:
        gpus: what CUDA says, where that is none.
    """
    if gpus.is_broken:
        return f"CUDA does not work here: {gpus.problem}"
    if not (torch.version.cuda or torch.version.hip):
        said = f"torch {torch.__version__} is built without CUDA"
        if gpus.driver is None:
            return f"needs CUDA devices: {said}, and there is no NVIDIA driver here"
        return f"needs CUDA devices: {said}; install a build with it: pip install --force torch"
    if gpus.driver is None:
        return (
            "needs CUDA devices, and there is no NVIDIA driver here; a container sees the host's "
            "when it is started with --gpus all"
        )
    return "needs CUDA devices, and CUDA_VISIBLE_DEVICES hides all that may be here"


def give_advice(machine: Machine, gpus: GpuReport, nixl: NixlReport) -> tuple[str, ...]:
    """What stands in the way of wires, or slows them down; each ends with what to do.

    Args:
        machine: limits and settings.
        gpus: what CUDA says.
        nixl: what NIXL and UCX say.
    """
    return (
        *_advise_on_limits(machine),
        *_advise_on_nixl(machine, gpus, nixl),
        *_advise_on_nccl(gpus),
        *_advise_on_peers(gpus),
    )


def _advise_on_limits(machine: Machine) -> Iterator[str]:
    if machine.shm_bytes is not None and machine.shm_bytes < _ENOUGH_SHM_BYTES:
        yield (
            f"{SHARED_MEMORY} has {machine.shm_bytes >> 20} MiB, and UCX and NCCL use it between "
            "processes of a host: start the container with --shm-size=8g, or mount -o "
            f"remount,size=8g {SHARED_MEMORY}"
        )
    if machine.has_infiniband and machine.locked_bytes is not None:
        yield (
            f"a process may lock {machine.locked_bytes >> 10} KiB of memory, and InfiniBand locks "
            "all that it registers: start the container with --ulimit memlock=-1, or ulimit -l "
            "unlimited"
        )
    if machine.huge_pages == "never":
        yield (
            "huge pages are off, and experts in CPU memory travel slower without: echo madvise | "
            "sudo tee /sys/kernel/mm/transparent_hugepage/enabled"
        )


def _advise_on_nixl(machine: Machine, gpus: GpuReport, nixl: NixlReport) -> Iterator[str]:
    settings = [name for name in machine.settings if name.startswith("UCX_")]
    if nixl.problem and settings:
        yield f"{nixl.problem}; but try first without what is set here: unset {' '.join(settings)}"
    elif nixl.problem:
        yield nixl.problem
    if gpus.gpus and nixl.ucx and "cuda_ipc" not in nixl.ucx.transports:
        yield (
            "UCX lists no cuda_ipc, by which nixl reads the memory of another process's GPU: "
            "unset UCX_TLS, or add cuda_ipc and cuda_copy to it"
        )


def _advise_on_nccl(gpus: GpuReport) -> Iterator[str]:
    if gpus.nccl4py_problem:
        yield (
            f"pynccl needs nccl4py, which cannot be imported ({gpus.nccl4py_problem}): "
            "pip install 'equipoise[nccl]'"
        )


def _advise_on_peers(gpus: GpuReport) -> Iterator[str]:
    apart = [
        f"{number} and {other}"
        for number, gpu in enumerate(gpus.gpus)
        for other in range(number)
        if other not in gpu.peers
    ]
    if apart:
        yield (
            f"GPUs {', '.join(apart)} cannot reach each other's memory, and experts between them "
            "go through the host's: nvidia-smi topo -p2p r says why"
        )
