"""A service that cannot go on: it says what is missing, to everybody, and leaves nothing."""

from __future__ import annotations

import queue
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from equipoise.bundled import model_directory
from equipoise.elastic.controller import Controller
from equipoise.elastic.room import check_room
from equipoise.elastic.service import RequestFailed, ServiceRequest
from equipoise.engine.requests import SamplingParams
from equipoise.errors import MembershipError
from equipoise.launch.processes import LocalLauncher
from tests.elastic.services import WAIT_S, find_pids, is_alive, make_spec, wait_until
from tests.elastic.test_controller_faults import kill


def test_memory_that_does_not_suffice_is_counted() -> None:
    check_room(1, torch.device("cpu"), "generation 3")
    said = r"generation 3 takes 1,000,000,000,000,000 bytes on cpu, and [0-9,]+ are free: [0-9,]+ a"
    with pytest.raises(MembershipError, match=said):
        check_room(10**15, torch.device("cpu"), "generation 3")


@pytest.mark.more_faults
@pytest.mark.timeout(400)
def test_experts_that_cannot_be_restored_are_named_and_the_service_ends(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(model_directory(), model)
    spec = replace(make_spec(2), model=model)
    controller = Controller(spec, LocalLauncher("cpu", model))
    controller.start()
    pids = find_pids(controller)
    try:
        heard: queue.Queue[Any] = queue.Queue()
        sampling = SamplingParams(max_new_tokens=60, ignore_end=True)
        # More than the ranks answer before one of them is killed.
        for number in range(24):
            controller.submit(ServiceRequest(f"r{number}", (5,), sampling), heard.put)
        heard.get(timeout=WAIT_S)
        (weights,) = model.glob("*.safetensors")
        weights.unlink()
        kill(controller, "rank-1")
        event = heard.get(timeout=WAIT_S)
        while not isinstance(event, RequestFailed):
            event = heard.get(timeout=WAIT_S)
        assert weights.name in event.reason, event.reason
        assert controller.status().phase == "failed"
        wait_until(lambda: not any(map(is_alive, pids)))
    finally:
        controller.close()
