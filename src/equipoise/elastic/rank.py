"""What the process of a rank does, from its start to its end."""

from __future__ import annotations

import logging
import os
import threading
import traceback
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch

from equipoise.elastic.builder import Home
from equipoise.elastic.channel import ChannelClosed, Message
from equipoise.elastic.dispatching import RankDispatch
from equipoise.elastic.interface import find_name
from equipoise.elastic.launcher import RankSeat
from equipoise.elastic.link import ControllerLink
from equipoise.elastic.rank_loop import RankLoop
from equipoise.elastic.spec import ServiceSpec
from equipoise.elastic.store import connect_store
from equipoise.errors import EquipoiseError
from equipoise.models.checkpoint import Checkpoint
from equipoise.models.loading import load_tokenizer
from equipoise.policy import get_policy

logger = logging.getLogger(__name__)

FIRST_WORD_S = 30.0
"""How long a rank waits for what it is to serve."""


class Pulse:
    """What a rank's signs of life say: set by the forward thread, read by the link's."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._message: Message = {"say": "beat"}

    def set(self, **facts: Any) -> None:
        """From now on."""
        with self._lock:
            self._message = {"say": "beat", **facts}

    def read(self) -> Message:
        """As it was last set."""
        with self._lock:
            return self._message


def run_rank(seat: RankSeat) -> int:
    """Serve as a rank until the controller says that it is over.

    Args:
        seat: what it was started with.
    Returns:
        The exit code: 0 where it left as it was told to.
    Collective: with the other ranks of each of its generations.
    """
    pulse = Pulse()
    try:
        link = ControllerLink(seat, pulse.read)
    except ChannelClosed as error:
        logger.error("%s: %s", seat.name, error)
        return 1
    try:
        return _serve(seat, link, pulse)
    except BaseException as error:
        expected = isinstance(error, EquipoiseError)
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        # torch appends its C++ stack; the first line is what happened.
        text = " ".join(lines) if expected else ": ".join([type(error).__name__, *lines[:1]])
        shown = "".join(traceback.format_exception(error))
        link.say({"say": "failed", "reason": text, "expected": expected, "traceback": shown})
        return 1
    finally:
        link.close()


def _serve(seat: RankSeat, link: ControllerLink, pulse: Pulse) -> int:
    welcome = link.receive(FIRST_WORD_S)
    if welcome is None or welcome.get("do") != "welcome":
        logger.error("%s: the controller did not say what to serve: %s", seat.name, welcome)
        return 1
    spec = ServiceSpec.from_json(welcome["spec"])
    link.set_times(spec.beat_s, spec.orphan_s)
    link.meet(str(welcome["service"]))
    # Ranks meet where they reach the controller; the host's name may lead elsewhere. What the user
    # has set wins.
    interface = find_name(link.local_address)
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
    torch.set_num_threads(seat.num_threads)
    device = torch.device(seat.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=spec.timeout_s)
    store = connect_store(welcome["store"], spec.timeout_s)
    dispatch = RankDispatch(spec, device)
    home = Home(
        name=seat.name,
        store=store,
        device=device,
        config=spec.config,
        timeout=timeout,
        model=spec.model,
        dtype=getattr(torch, spec.dtype),
        attention="sdpa",
        dispatcher=dispatch.create,
    )
    # What takes time is loaded before anybody waits for this rank.
    tokenizer = load_tokenizer(spec.model)
    get_policy(spec.config.policy)
    checkpoint = Checkpoint(spec.model, home.dtype, device, home.attention)
    home = replace(home, checkpoint=checkpoint)
    link.say({"say": "warm"})
    try:
        return RankLoop(seat.name, spec, home, tokenizer, link, pulse.set).run()
    finally:
        dispatch.close()
