"""What a service of changing ranks is asked to be; travels to ranks as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from equipoise.config import EPLBConfig, make_config
from equipoise.errors import ConfigError

DType = Literal["float32", "bfloat16", "float16"]
HostBackup = Literal["none", "unreplicated", "all"]
Dispatch = Literal["torch", "nixl_ep"]

PREFILL_CHUNK = 512
"""Tokens of prompts in one step of a rank."""


@dataclass(frozen=True)
class Fault:
    """A fault that a rank does to itself, to see what becomes of it.

    Attributes:
        rank: name of the rank.
        step: after which forward pass of the rank, counted over generations.
        how: `kill` ends the process at once, `hang` stops it (SIGSTOP).
    """

    rank: str
    step: int
    how: Literal["kill", "hang"]


@dataclass(frozen=True)
class ServiceSpec:
    """A service over ranks that come and go.

    Attributes:
        model: directory of a Hugging Face checkpoint.
        num_ranks: to begin with.
        config: balancing; it must work in the background or not at all.
        dtype: of the weights.
        device: kind of device.
        dispatch: what tokens travel by. nixl_ep is for GPUs, a rank on each, and bfloat16; its
            buffer is made once, for `slots_per_rank` and `max_ranks`.
        max_ranks: most ranks at a time, leavers included; None where `dispatch` needs no limit.
        slots_per_rank: the same in every generation, so that more ranks mean more replicas; None to
            have as many redundant experts in each, by `config`.
        max_batch_size: sequences in flight per rank.
        max_len: tokens of the longest request, generated ones included.
        queue_limit: requests that may wait for a rank.
        timeout_s: longest wait of a rank for another.
        start_s: longest wait for a process to start, import and warm up.
        change_s: longest that a change may prepare once its processes are there.
        beat_s: between two signs of life of a rank.
        silence_s: after so long without one a rank that serves is given up; a slow one gives them.
        idle_tick_s: between two ticks of ranks that have nothing to do.
        orphan_s: how long ranks that have lost their controller serve on what they have and wait
            for one that takes its place; then they end.
        respawn: whether a rank that died is replaced.
        respawn_tries: replacements that fail in a row, after which no more are tried.
        respawn_s: between the first that fails and the next try; doubled each time.
        host_backup: experts that ranks keep in host memory, for when their rank dies.
        interface: address that the channel and the store listen on; whoever reaches it and knows
            the token is trusted.
        faults: that ranks do to themselves.
    Raises: ConfigError, naming the value, if it is out of range.
    """

    model: Path
    num_ranks: int
    config: EPLBConfig = field(default_factory=EPLBConfig)
    dtype: DType = "float32"
    device: Literal["cpu", "cuda"] = "cpu"
    dispatch: Dispatch = "torch"
    max_ranks: int | None = None
    slots_per_rank: int | None = None
    max_batch_size: int = 8
    max_len: int = 512
    queue_limit: int = 1024
    timeout_s: float = 30.0
    start_s: float = 120.0
    change_s: float = 60.0
    beat_s: float = 0.2
    silence_s: float = 10.0
    idle_tick_s: float = 0.05
    orphan_s: float = 60.0
    respawn: bool = False
    respawn_tries: int = 5
    respawn_s: float = 1.0
    host_backup: HostBackup = "none"
    interface: str = "127.0.0.1"
    faults: tuple[Fault, ...] = ()

    def __post_init__(self) -> None:
        for name in ("num_ranks", "max_batch_size", "max_len", "queue_limit", "respawn_tries"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.slots_per_rank is not None and self.slots_per_rank < 1:
            raise ConfigError(f"slots_per_rank must be at least 1, got {self.slots_per_rank}")
        if self.dispatch == "nixl_ep":
            self._check_nixl_ep()
        for name in _DURATIONS:
            if not 0 < getattr(self, name) <= LONGEST_S:
                raise ConfigError(
                    f"{name} must be above 0 and at most {LONGEST_S:g} s, got "
                    f"{getattr(self, name):g}"
                )
        if self.silence_s < 2 * self.beat_s:
            raise ConfigError(
                f"silence_s of {self.silence_s:g} s gives ranks up between two signs of life, "
                f"{self.beat_s:g} s apart: ask for at least {2 * self.beat_s:g}"
            )

    def _check_nixl_ep(self) -> None:
        for name, wanted in (("device", "cuda"), ("dtype", "bfloat16")):
            if getattr(self, name) != wanted:
                raise ConfigError(
                    f"dispatch nixl_ep needs {name} {wanted}, not {getattr(self, name)}"
                )
        if self.slots_per_rank is None or self.max_ranks is None:
            raise ConfigError(
                "dispatch nixl_ep has one buffer for all generations: say slots_per_rank and "
                "max_ranks"
            )
        if self.max_ranks < self.num_ranks:
            raise ConfigError(
                f"max_ranks of {self.max_ranks} does not hold the {self.num_ranks} ranks that begin"
            )

    def to_json(self) -> dict[str, Any]:
        """Everything, of JSON's own types. Collective: none."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return values | {
            "model": str(self.model),
            "config": self.config.model_dump(),
            "faults": [asdict(fault) for fault in self.faults],
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ServiceSpec:
        """What `to_json` wrote. Collective: none."""
        read = {
            "model": Path(values["model"]),
            "config": make_config(values["config"]),
            "faults": tuple(Fault(**fault) for fault in values["faults"]),
        }
        return cls(**{**values, **read})


LONGEST_S = 86_400.0
_DURATIONS = (
    "timeout_s",
    "start_s",
    "change_s",
    "beat_s",
    "silence_s",
    "idle_tick_s",
    "orphan_s",
    "respawn_s",
)
