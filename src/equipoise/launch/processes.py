"""Single ranks as processes of this machine, started and ended at any time."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import select
import signal
import sys
import threading
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Literal

from equipoise.elastic.launcher import UNKNOWN_EXIT, RankHandle, RankSeat
from equipoise.errors import ConfigError, MembershipError
from equipoise.launch.local import STOP_S, preload_ranks

WARM_UPS = ("equipoise.policy.flow.warm", "equipoise.comm.nixl.warm")
"""What takes long in a process once, and not in those that are forked from it."""


class LocalLauncher:
    """Starts ranks from a forkserver that has loaded torch, as `run_local` does.

    They outlive this process if it is killed: what they do then is theirs to decide.

    Args:
        device: kind of device; GPUs are given to the rank that finds fewest others there.
        model: checkpoint directory; what serving it needs is loaded once, for all ranks.
    Raises: ModelError if the model cannot be taken over.
    """

    def __init__(self, device: Literal["cpu", "cuda"] = "cpu", model: Path | None = None) -> None:
        self._device = device
        self._processes: list[BaseProcess] = []
        self._adopted: list[_AdoptedRank] = []
        self._is_closed = False
        self._is_settled = threading.Event()
        """Whether ranks can be started, or never will."""
        modules = [] if model is None else list_modules(model)
        # Seen on the CPU alone: what a process has run before a fork, GPUs may not bear.
        preload_ranks([*modules, *WARM_UPS] if device == "cpu" else modules)

    @property
    def host(self) -> str:
        """This machine."""
        return "localhost"

    def open(self, timeout_s: float) -> None:
        """Wait until the forkserver has loaded what ranks need. As `Launcher.open`.

        Raises: MembershipError also if `close` is called meanwhile.
        """
        # In a thread: to start a process waits for the forkserver, which nothing can interrupt.
        threading.Thread(target=self._try, name="equipoise-try-start", daemon=True).start()
        if not self._is_settled.wait(timeout_s):
            raise MembershipError(f"what ranks need was not loaded within {timeout_s:g} s")
        if self._is_closed:
            raise MembershipError("no rank is started any more: the launcher was closed")

    def find_device(self, taken: list[str]) -> str:
        """The CPU, or the GPU with the fewest ranks. As `Launcher.find_device`."""
        if self._device == "cpu":
            return "cpu"
        import torch  # here, so that a service on the CPU does not wait for it

        gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        if not gpus:
            raise ConfigError("device cuda: torch sees no CUDA device here; ask for cpu")
        return min(gpus, key=taken.count)

    def start(self, seat: RankSeat) -> RankHandle:
        """Fork a rank. As `Launcher.start`."""
        context = multiprocessing.get_context("forkserver")
        process = context.Process(
            name=f"equipoise-{seat.name}", target=_run, args=(seat,), daemon=True
        )
        try:
            process.start()
        except (OSError, EOFError) as error:
            raise MembershipError(f"{seat.name} could not be started: {error}") from error
        self._processes = [one for one in self._processes if one.exitcode is None]
        self._processes.append(process)
        return _LocalRank(process)

    def adopt(self, seat: RankSeat, pid: int) -> RankHandle:
        """Take over a rank of a controller before this one's. As `Launcher.adopt`."""
        try:
            rank = _AdoptedRank(pid)
        except OSError as error:
            raise MembershipError(f"{seat.name} is no process of this machine: {error}") from error
        self._adopted.append(rank)
        return rank

    def _try(self) -> None:
        """Start a process, and have it end."""
        process = multiprocessing.get_context("forkserver").Process(target=_do_nothing, daemon=True)
        with contextlib.suppress(OSError, EOFError):  # the forkserver has ended: `start` says so
            process.start()
            process.join()
        self._is_settled.set()

    def close(self) -> None:
        """End what still runs, by SIGTERM and then by SIGKILL. Twice is fine."""
        self._is_closed = True
        self._is_settled.set()
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join(STOP_S)
            if process.is_alive():
                process.kill()
                process.join(STOP_S)
        self._processes.clear()
        for rank in self._adopted:
            rank.stop()
        for rank in self._adopted:
            if rank.wait(STOP_S) is None:
                rank.stop(kill=True)
                rank.wait(STOP_S)
            rank.close()
        self._adopted.clear()


class _LocalRank:
    detail = ""

    def __init__(self, process: BaseProcess) -> None:
        self._process = process
        assert process.pid is not None
        self.pid: int = process.pid

    @property
    def exit_code(self) -> int | None:
        return self._process.exitcode

    def stop(self, *, kill: bool = False) -> None:
        if kill:
            self._process.kill()
        else:
            self._process.terminate()

    def wait(self, timeout_s: float) -> int | None:
        self._process.join(timeout_s)
        return self._process.exitcode


class _AdoptedRank:
    """A process that is another's child, by a descriptor: its number may become another's."""

    detail = ""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._descriptor = os.pidfd_open(pid)

    @property
    def exit_code(self) -> int | None:
        return self.wait(0.0)

    def stop(self, *, kill: bool = False) -> None:
        if self.exit_code is None:
            number = signal.SIGKILL if kill else signal.SIGTERM
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._descriptor, number)

    def wait(self, timeout_s: float) -> int | None:
        if self._descriptor < 0:
            return UNKNOWN_EXIT
        ended = select.poll()
        ended.register(self._descriptor, select.POLLIN)
        return UNKNOWN_EXIT if ended.poll(1000 * timeout_s) else None

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def list_modules(model: Path) -> list[str]:
    """What a rank imports to serve a model, by name. Raises: ModelError if it cannot."""
    from equipoise.models.families import read_model_shape

    family = read_model_shape(model).model_type
    return [
        "equipoise.elastic.rank",
        "equipoise.policy.flow",
        "transformers.models.auto.tokenization_auto",
        f"transformers.models.{family}.modeling_{family}",
    ]


def _do_nothing() -> None:
    """What a process does that only shows that one can be started."""


def _run(seat: RankSeat) -> None:
    # The parent pickles this function, and need not import what a rank imports.
    from equipoise.elastic.rank import run_rank

    # Ctrl-C reaches the whole terminal; it is for the controller to end the ranks.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    code = run_rank(seat)
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of a group that a dead peer left hanging must not keep the process.
    os._exit(code)
