"""Single ranks as actors of a Ray cluster.

Each rank has a placement group of its own, so that what one leaves behind is free at once, and a
thread here that places, starts and watches it. Which node it goes to is settled here, as Ray
spreads or packs only what is asked for together.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal

from equipoise.elastic.launcher import RankHandle, RankSeat
from equipoise.errors import ConfigError, DependencyError, MembershipError
from equipoise.launch.ray_actor import RankActor

logger = logging.getLogger(__name__)

Spread = Literal["spread", "pack"]

PINNED_S = 2.0
"""How long one node is asked for room before another is."""
LOOK_S = 0.1
"""Between two looks at whether a rank is to be ended."""
CALL_S = 5.0
"""How long a cluster has to answer at all."""
STOP_S = 5.0
"""How long the ends of all ranks are waited for."""
NODE_LABEL = "ray.io/node-id"
_DIED = -9


@dataclass(frozen=True)
class RayOptions:
    """How ranks are placed on a cluster.

    Attributes:
        address: of the cluster; "auto" for the one that RAY_ADDRESS names or this machine is of.
        spread: whether a newcomer goes to the node with fewest ranks, or with most.
        num_cpus: that each rank takes; one GPU beside them where ranks are on GPUs.
        room_s: longest wait for a cluster to have room for a rank.
    Raises: ConfigError if a number is not above 0.
    """

    address: str = "auto"
    spread: Spread = "spread"
    num_cpus: float = 1.0
    room_s: float = 60.0

    def __post_init__(self) -> None:
        for name in ("num_cpus", "room_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name):g}")


class RayLauncher:
    """Starts ranks as actors. They end with this process, or when it says so.

    Args:
        device: kind of device.
        options: where and how.
    Raises: DependencyError without Ray; ConfigError if no cluster answers.
    """

    def __init__(
        self, device: Literal["cpu", "cuda"] = "cpu", options: RayOptions | None = None
    ) -> None:
        self._device, self._options = device, options or RayOptions()
        self._ray = load_ray()
        self._is_connected_here = not self._ray.is_initialized()
        if self._is_connected_here:
            _connect(self._ray, self._options.address)
        self._is_closed = False
        self._ranks: list[_RayRank] = []
        self._places = _Places(self._ray, self._options.spread)

    @property
    def host(self) -> str:
        """The cluster, until a rank says which node of it."""
        return "ray"

    @property
    def interface(self) -> str:
        """The address by which the cluster's nodes reach this one."""
        return str(self._ray.util.get_node_ip_address())

    def open(self, timeout_s: float) -> None:
        """A cluster is there from the beginning. As `Launcher.open`."""

    def find_device(self, taken: list[str]) -> str:
        """The kind: which GPU a rank gets is Ray's. As `Launcher.find_device`."""
        del taken
        return self._device

    def start(self, seat: RankSeat) -> RankHandle:
        """Ask for a place, and have a rank start there. As `Launcher.start`."""
        if self._is_closed:
            raise MembershipError(f"{seat.name} is not started any more: the launcher was closed")
        rank = _RayRank(self._ray, seat, self._options, self._bundle, self._places)
        self._ranks = [one for one in self._ranks if one.exit_code is None]
        self._ranks.append(rank)
        return rank

    def adopt(self, seat: RankSeat, pid: int) -> RankHandle:
        """Never: actors end with the process that started them. As `Launcher.adopt`."""
        raise MembershipError(f"{seat.name} (process {pid}) ended with the server that started it")

    def close(self) -> None:
        """End what still runs, and leave the cluster. Twice is fine."""
        self._is_closed = True
        for rank in self._ranks:
            rank.stop(kill=True)
        until = time.monotonic() + STOP_S
        for rank in self._ranks:
            rank.wait(max(0.0, until - time.monotonic()))
        self._ranks.clear()
        if self._is_connected_here:
            self._ray.shutdown()

    @property
    def _bundle(self) -> dict[str, float]:
        gpus = {"GPU": 1.0} if self._device == "cuda" else {}
        return {"CPU": self._options.num_cpus, **gpus}


class _Places:
    """Which node the next rank goes to, by how many are there. Any thread may call."""

    def __init__(self, ray: Any, spread: Spread) -> None:
        self._ray, self._spread = ray, spread
        self._lock = threading.Lock()
        self._counts: dict[str, int] = {}

    def choose(self, bundle: dict[str, float], tried: set[str]) -> str | None:
        """A node that could hold a bundle if nobody else were there; a rank is counted there.

        Args:
            bundle: what a rank takes.
            tried: nodes that had no room.
        Returns:
            None if there is none that was not tried.
        """
        nodes = [
            one["NodeID"]
            for one in self._ray.nodes()
            if one["Alive"]
            and one["NodeID"] not in tried
            and all(one["Resources"].get(name, 0.0) >= much for name, much in bundle.items())
        ]
        if not nodes:
            return None
        sign = 1 if self._spread == "spread" else -1
        with self._lock:
            node = str(min(nodes, key=lambda one: (sign * self._counts.get(one, 0), one)))
            self._counts[node] = self._counts.get(node, 0) + 1
        return node

    def take(self, node: str) -> None:
        """A rank is there."""
        with self._lock:
            self._counts[node] = self._counts.get(node, 0) + 1

    def free(self, node: str) -> None:
        """A rank is there no more."""
        with self._lock:
            self._counts[node] -= 1


@dataclass
class _RayRank:
    """One rank from the asking for its place to its end, which a thread sees to."""

    ray: Any
    seat: RankSeat
    options: RayOptions
    bundle: dict[str, float]
    places: _Places
    pid: int | None = None
    detail: str = ""
    _code: int | None = None
    _is_stopped: threading.Event = field(default_factory=threading.Event)
    _has_ended: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        threading.Thread(
            target=self._live, name=f"equipoise-ray-{self.seat.name}", daemon=True
        ).start()

    @property
    def exit_code(self) -> int | None:
        return self._code if self._has_ended.is_set() else None

    def stop(self, *, kill: bool = False) -> None:
        """Either way the same: Ray has one way to end an actor. Who shall leave is told so."""
        del kill
        self._is_stopped.set()

    def wait(self, timeout_s: float) -> int | None:
        self._has_ended.wait(timeout_s)
        return self.exit_code

    def _live(self) -> None:
        group: Any = None
        node = ""
        try:
            found = self._find_place()
            if found is None:
                self._code = _DIED
                return
            group, node = found
            self._code = self._run(group)
        except Exception as error:
            self._code = 1
            self.detail = self.detail or f"{self.seat.name}: {_say(error)}"
            logger.debug("%s", self.seat.name, exc_info=True)
        finally:
            if group is not None:
                with contextlib.suppress(Exception):  # the cluster is gone, and with it the group
                    self.ray.util.remove_placement_group(group)
                self.places.free(node)
            self._has_ended.set()

    def _find_place(self) -> tuple[Any, str] | None:
        """Reserve what the rank takes; None if it is not wanted any more.

        Raises: MembershipError if the cluster has no room in time.
        """
        until = time.monotonic() + self.options.room_s
        tried: set[str] = set()
        while (node := self.places.choose(self.bundle, tried)) is not None:
            group = self._reserve(min(until, time.monotonic() + PINNED_S), {NODE_LABEL: node})
            if group is not None:
                return group, node
            self.places.free(node)
            tried.add(node)
            if self._is_stopped.is_set():
                return None
        # Wherever there is room first; an autoscaler sees it, and may bring a node.
        group = self._reserve(until, None)
        if group is not None:
            table = self.ray.util.placement_group_table(group)
            node = next(iter(table["bundles_to_node_id"].values()))
            self.places.take(node)
            return group, node
        if self._is_stopped.is_set():
            return None
        wanted = ", ".join(f"{much:g} {name}" for name, much in self.bundle.items())
        raise MembershipError(
            f"the Ray cluster had no room for {wanted} within {self.options.room_s:g} s"
        )

    def _reserve(self, until: float, selector: dict[str, str] | None) -> Any:
        """A placement group that is there; None if that takes longer, or the rank is not wanted."""
        selectors = None if selector is None else [selector]
        group = self.ray.util.placement_group(
            [self.bundle], strategy="STRICT_PACK", bundle_label_selector=selectors
        )
        while not self._is_stopped.is_set():
            if group.wait(min(LOOK_S, max(0.0, until - time.monotonic()))):
                return group
            if time.monotonic() >= until:
                break
        self.ray.util.remove_placement_group(group)
        return None

    def _run(self, group: Any) -> int:
        """Have the rank serve, and wait for its end."""
        scheduling = import_module("ray.util.scheduling_strategies")
        actor = (
            self.ray.remote(RankActor)
            .options(
                num_cpus=self.bundle["CPU"],
                num_gpus=self.bundle.get("GPU", 0.0),
                max_restarts=0,
                scheduling_strategy=scheduling.PlacementGroupSchedulingStrategy(group, 0),
                # Each rank sees all GPUs and takes its own: NCCL and NIXL reach the others.
                runtime_env={"env_vars": {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}}
                if "GPU" in self.bundle
                else None,
            )
            .remote()
        )
        try:
            done = actor.run.remote(self.seat)
            while not self._is_stopped.is_set():
                if self.ray.wait([done], timeout=LOOK_S)[0]:
                    return self._read(done)
            return _DIED
        finally:
            # Threads of a group that a dead peer left hanging must not keep the process.
            self.ray.kill(actor)

    def _read(self, done: Any) -> int:
        """What a rank ended with."""
        try:
            return int(self.ray.get(done, timeout=STOP_S))
        except self.ray.exceptions.ActorUnavailableError:
            self.detail = f"{self.seat.name} does not answer Ray: its node may be lost"
        except self.ray.exceptions.RayActorError as error:
            self.detail = f"{self.seat.name} died: {_say(error)}"
        return _DIED


def load_ray() -> Any:
    """The package.

    Raises: DependencyError.
    """
    # Read when it is imported. Whoever asks it for something once the cluster has gone would start
    # another, of this machine alone.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    try:
        return import_module("ray")
    except ImportError as error:
        raise DependencyError("--launcher ray needs Ray: pip install 'equipoise[ray]'") from error


def _connect(ray: Any, address: str) -> None:
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS", address)
    try:
        _call(address)
        ray.init(
            address=address,
            namespace="equipoise",
            log_to_driver=False,
            configure_logging=False,
            logging_level="error",
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"no Ray cluster at {address} ({_say(error)}): start one by `ray start --head`, or "
            "name one by --ray-address HOST:PORT"
        ) from error


def _call(address: str) -> None:
    """See whether somebody answers at HOST:PORT; Ray itself tries for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=CALL_S).close()


def _say(error: Exception) -> str:
    """The first line of an error that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
