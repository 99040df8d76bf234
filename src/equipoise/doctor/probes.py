"""What is asked of libraries that may hang or crash: each in a process of its own."""

from __future__ import annotations

import ctypes
import importlib
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from equipoise.comm.groups import RankGroup
from equipoise.comm.nixl.agent import Agent
from equipoise.doctor.trial import keep_output
from equipoise.doctor.ucx import Ucx, ask_ucx
from equipoise.errors import CommunicatorUnavailable, EquipoiseError
from equipoise.launch.failure import JobFailed
from equipoise.launch.local import run_local
from equipoise.launch.seats import Seat

_ALONE = Seat(0, 1, 1, "cpu", "gloo")
_VERSION_BYTES = 80


@dataclass(frozen=True)
class ProbeSpec:
    """How a probe is run.

    Attributes:
        timeout_s: longest that it may take.
        output: file that gets what it prints.
    """

    timeout_s: float
    output: Path


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        name: as the driver calls it.
        total_bytes: of its memory.
        free_bytes: of it, now.
        peers: numbers of the GPUs whose memory it can reach.
    """

    name: str
    total_bytes: int
    free_bytes: int
    peers: tuple[int, ...]


@dataclass(frozen=True)
class GpuReport:
    """What CUDA says.

    Attributes:
        gpus: by number.
        driver: version of NVIDIA's driver, None where there is none.
        driver_cuda: newest CUDA version that it serves, None where there is none.
        nccl: version that torch has, None where it has none.
        nccl4py_problem: why nccl4py cannot be imported; None if it can, or there are no GPUs.
        is_broken: it gave no answer, or there is a driver with which it does not start.
        problem: why there are no GPUs, as CUDA says; None if it does not say.
    """

    gpus: tuple[Gpu, ...] = ()
    driver: str | None = None
    driver_cuda: str | None = None
    nccl: str | None = None
    nccl4py_problem: str | None = None
    is_broken: bool = False
    problem: str | None = None


@dataclass(frozen=True)
class NixlReport:
    """What NIXL and its UCX say.

    Attributes:
        works: an agent with UCX could be made.
        ucx: what that UCX lists; None if it could not be asked.
        problem: why not; None if all is well.
    """

    works: bool = False
    ucx: Ucx | None = None
    problem: str | None = None


def look_at_gpus(timeout_s: float) -> GpuReport:
    """GPUs, driver and NCCL. Collective: none; starts a process, and leaves none."""
    heard, problem = _probe("ask_cuda", timeout_s)
    return GpuReport(is_broken=True, problem=problem) if problem else heard


def look_at_nixl(timeout_s: float) -> NixlReport:
    """NIXL and its UCX. Collective: none; starts a process, and leaves none."""
    heard, problem = _probe("ask_nixl", timeout_s)
    return NixlReport(problem=problem) if problem else heard


def ask_cuda(spec: ProbeSpec, group: RankGroup, emit: Callable[[GpuReport], None]) -> None:
    """Tell what CUDA says. Collective: the only rank of the group."""
    assert group.size == 1, "one process asks"
    keep_output(spec.output)
    driver, driver_cuda = _ask_driver()
    gpus: tuple[Gpu, ...] = ()
    problem = None
    is_hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if (torch.version.cuda or torch.version.hip) and not is_hidden:
        try:
            torch.cuda.init()  # type: ignore[no-untyped-call]
            gpus = tuple(_describe_gpu(number) for number in range(torch.cuda.device_count()))
        except RuntimeError as error:
            problem = str(error).partition("\n")[0]
    is_broken = problem is not None and driver is not None
    nccl4py_problem = _try_nccl4py() if gpus else None
    emit(GpuReport(gpus, driver, driver_cuda, _find_nccl(), nccl4py_problem, is_broken, problem))


def ask_nixl(spec: ProbeSpec, group: RankGroup, emit: Callable[[NixlReport], None]) -> None:
    """Tell what NIXL and its UCX say. Collective: the only rank of the group."""
    assert group.size == 1, "one process asks"
    keep_output(spec.output)
    try:
        agent = Agent(group.device)
    except CommunicatorUnavailable as error:
        emit(NixlReport(problem=str(error)))
        return
    try:
        emit(NixlReport(works=True, ucx=ask_ucx()))
    except (EquipoiseError, OSError, AttributeError) as error:
        emit(NixlReport(works=True, problem=f"UCX cannot be asked: {error}"))
    finally:
        agent.close()


def _probe(function: str, timeout_s: float) -> tuple[Any, str | None]:
    """What the probe says, or why it says nothing."""
    heard: list[Any] = []
    with tempfile.TemporaryDirectory(prefix="equipoise-doctor-") as folder:
        spec = ProbeSpec(timeout_s, Path(folder, "output"))
        job = f"{__name__}:{function}"
        try:
            run_local(spec, [_ALONE], heard.append, job=job, limit_s=timeout_s)
        except TimeoutError:
            return None, f"no answer within {timeout_s:g} s"
        except JobFailed as error:
            return None, error.failure.text.removeprefix("rank 0 ")
    return heard[0], None


def _describe_gpu(number: int) -> Gpu:
    free_bytes, total_bytes = torch.cuda.mem_get_info(number)
    others = [other for other in range(torch.cuda.device_count()) if other != number]
    return Gpu(
        torch.cuda.get_device_name(number),
        total_bytes,
        free_bytes,
        tuple(other for other in others if torch.cuda.can_device_access_peer(number, other)),
    )


def _ask_driver() -> tuple[str | None, str | None]:
    """Versions of NVIDIA's driver, and of the newest CUDA that it serves."""
    # Source: nvml.h, which every driver brings.
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None, None
    if nvml.nvmlInit_v2():
        return None, None
    text = ctypes.create_string_buffer(_VERSION_BYTES)
    cuda = ctypes.c_int()
    found = not nvml.nvmlSystemGetDriverVersion(text, _VERSION_BYTES)
    found_cuda = not nvml.nvmlSystemGetCudaDriverVersion_v2(ctypes.byref(cuda))
    nvml.nvmlShutdown()
    return (
        text.value.decode() if found else None,
        f"{cuda.value // 1000}.{cuda.value % 1000 // 10}" if found_cuda else None,
    )


def _find_nccl() -> str | None:
    """The version that torch is built with, or has loaded."""
    if not torch.version.cuda:
        return None
    try:
        version = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
    except AttributeError:  # a build without it
        return None
    return ".".join(map(str, version))


def _try_nccl4py() -> str | None:
    try:
        importlib.import_module("nccl.core")
    except (ImportError, OSError, RuntimeError) as error:
        return str(error)
    return None
