"""A controller is killed while requests are in flight; one in its place takes its ranks over."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from equipoise.bundled import model_directory
from equipoise.elastic.controller import Controller
from equipoise.elastic.held_requests import HELD_S, HeldRequests
from equipoise.elastic.service import RequestFailed
from equipoise.elastic.state_file import ControllerState, StateFile
from equipoise.engine.requests import Delta, SamplingParams
from equipoise.errors import ConfigError
from equipoise.launch.processes import LocalLauncher
from tests.elastic.services import (
    WAIT_S,
    find_pids,
    is_alive,
    list_serving,
    make_spec,
    streaming,
    wait_until,
)

ROOT = Path(__file__).parent.parent.parent
NUM_REQUESTS, NUM_TOKENS = 8, 40
PROMPTS = {f"r{number}": (10 + number, 11, 12) for number in range(NUM_REQUESTS)}
GREEDY = SamplingParams(max_new_tokens=NUM_TOKENS, ignore_end=True)
KILLED = """
import json, os, signal, sys, threading
from pathlib import Path
from equipoise.bundled import model_directory
from equipoise.elastic.changes import Changes
from equipoise.elastic.controller import Controller
from equipoise.elastic.service import ServiceRequest
from equipoise.launch.processes import LocalLauncher
from tests.elastic.services import find_pids, make_spec
from tests.elastic.test_adoption import GREEDY, PROMPTS

if __name__ == "__main__":
    told = open(sys.argv[2], "a")

    def tell(delta):
        print(json.dumps([delta.request_id, delta.position, delta.tokens]), file=told, flush=True)

    launcher = LocalLauncher("cpu", model_directory())
    controller = Controller(make_spec(2), launcher, Path(sys.argv[1]))
    controller.start()
    print(json.dumps(sorted(find_pids(controller))), file=told, flush=True)
    for key, prompt in PROMPTS.items():
        controller.submit(ServiceRequest(key, prompt, GREEDY), tell)
    phase = sys.argv[3]

    class Doomed(Changes):
        def __setattr__(self, name, value):
            super().__setattr__(name, value)
            # At once: some phases are over sooner than another thread can look.
            if (name, value) == ("phase", phase) and phase != "preparing":
                os.kill(os.getpid(), signal.SIGKILL)

    controller._changes.__class__ = Doomed
    if phase:
        controller.scale(to=3, wait=False)
    if phase == "preparing":
        os.kill(os.getpid(), signal.SIGKILL)
    threading.Event().wait(300)
"""


class Client:
    """Puts the tokens of requests together, as they come and once."""

    def __init__(self) -> None:
        self.answers: dict[str, list[int]] = {key: [] for key in PROMPTS}
        self.ended: queue.Queue[str] = queue.Queue()

    def take(self, key: str, position: int, tokens: list[int]) -> None:
        assert position == len(self.answers[key]), "each token once, and in order"
        self.answers[key] += tokens

    def deliver(self, event: Any) -> None:
        if isinstance(event, RequestFailed):
            self.ended.put(f"{event.request_id} failed: {event.reason}")
            return
        try:
            self.take(event.request_id, event.position, list(event.tokens))
        except AssertionError as error:
            self.ended.put(f"{event.request_id}: {error}")
        if event.finish_reason is not None:
            self.ended.put(event.request_id)


@contextmanager
def orphaned(state: Path, client: Client, num_tokens: int, phase: str = "") -> Iterator[list[int]]:
    """Ranks whose controller was killed when so many tokens had come, or in a change's phase."""
    script, told = state.with_name("killed.py"), state.with_name("told")
    script.write_text(KILLED)
    told.touch()
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    process = subprocess.Popen(
        [sys.executable, str(script), str(state), str(told), phase],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
    )
    try:
        # Everything is loaded anew, which takes a while on a busy machine.
        wait_until(
            lambda: (
                len(told.read_text().splitlines()) > num_tokens
                and (not phase or process.poll() is not None)
            ),
            3 * WAIT_S,
        )
    finally:
        process.kill()
        process.wait(WAIT_S)
    pids, *lines = told.read_text().splitlines()
    for line in lines:
        client.take(*json.loads(line))
    pids = json.loads(pids)
    assert process.returncode == -signal.SIGKILL
    try:
        yield pids
    finally:
        wait_until(lambda: not any(map(is_alive, pids)))


def find_greedy() -> dict[str, list[int]]:
    import torch

    from equipoise.models.loading import load_model

    plain = load_model(model_directory(), torch.float32, torch.device("cpu"))
    answers = {}
    for key, prompt in PROMPTS.items():
        tokens = list(prompt)
        for _ in range(NUM_TOKENS):
            with torch.inference_mode():
                logits = plain(input_ids=torch.tensor([tokens]), use_cache=False).logits
            tokens.append(int(logits[0, -1].argmax()))
        answers[key] = tokens[len(prompt) :]
    return answers


@pytest.mark.timeout(600)
def test_a_controller_in_place_of_one_that_was_killed_goes_on(tmp_path: Path) -> None:
    state, client = tmp_path / "state", Client()
    with orphaned(state, client, 60) as pids:
        controller = Controller(make_spec(2), LocalLauncher("cpu", model_directory()), state)
        try:
            controller.start()
            assert find_pids(controller) == set(pids), "the same ranks"
            assert set(controller.unfinished()) == set(PROMPTS), "none has ended by then"
            for key in controller.unfinished():
                controller.take_up(key, len(client.answers[key]), client.deliver)
            with pytest.raises(ConfigError, match="r0' was not taken over, or has been asked for"):
                controller.take_up("r0", 0, client.deliver)
            ends = {client.ended.get(timeout=WAIT_S) for _ in PROMPTS}
            assert ends == set(PROMPTS)
            # Balancing and scaling go on, through a store of its own.
            wait_until(lambda: controller.status().balancing)
            with streaming(controller):
                assert controller.scale(to=3, timeout_s=WAIT_S).joining == ("rank-2",)
                assert controller.scale(remove=["rank-0"], timeout_s=WAIT_S).done
                assert list_serving(controller) == ["rank-1", "rank-2"]
            status = controller.status()
            assert (status.totals.deaths, status.totals.failed) == (0, 0)
        finally:
            controller.close()
    assert not state.exists()
    assert client.answers == find_greedy()


@pytest.mark.more_faults
@pytest.mark.timeout(600)
@pytest.mark.parametrize("phase", ["preparing", "committing", "retiring"])
def test_a_controller_that_dies_while_ranks_come_leaves_no_answer_behind(
    tmp_path: Path, phase: str
) -> None:
    state, client = tmp_path / "state", Client()
    with orphaned(state, client, 0, phase):
        controller = Controller(make_spec(2), LocalLauncher("cpu", model_directory()), state)
        try:
            controller.start()
            known = set(controller.unfinished())
            for key in known:
                controller.take_up(key, len(client.answers[key]), client.deliver)
            assert {client.ended.get(timeout=WAIT_S) for _ in known} == known
            # The newcomer has come or has gone: which, was decided before or was not.
            wait_until(lambda: controller.status().phase == "idle")
            assert len(list_serving(controller)) in (2, 3)
            with streaming(controller):
                assert controller.scale(to=4, timeout_s=WAIT_S).done
            assert controller.status().totals.failed == 0
        finally:
            controller.close()
    greedy = find_greedy()
    # What no rank had been given yet died with the controller's queue.
    assert known or phase == "preparing"
    for key in known:
        assert client.answers[key] == greedy[key]


def test_a_state_is_of_one_living_controller_and_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "state"
    state = ControllerState("service", "127.0.0.1", 1234, "secret", {"model": "small"})
    file = StateFile(path)
    assert file.found is None
    file.write(state)
    assert path.stat().st_mode & 0o777 == 0o600
    assert "secret" not in repr(state)
    with pytest.raises(ConfigError, match="a living controller has it"):
        StateFile(path)
    file.close(keep=True)
    again = StateFile(path)
    assert again.found == state
    again.close(keep=False)
    assert list(tmp_path.iterdir()) == []
    for wrong in ("no JSON", "[]", '{"format_version": 2}', '{"format_version": 1, "port": 1}'):
        path.write_text(wrong)
        path.chmod(0o600)
        with pytest.raises(ConfigError, match="is no state of a controller"):
            StateFile(path)
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="must be this user's, and closed to others"):
        StateFile(path)
    with pytest.raises(ConfigError, match="no state can be kept there"):
        StateFile(tmp_path / "nowhere" / "state")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match="folder: is a directory; name a file"):
        StateFile(tmp_path / "folder")
    assert not (tmp_path / "folder.lock").exists()


def test_a_rank_tells_of_what_it_has_and_of_what_has_ended_lately() -> None:
    now = [100.0]
    held = HeldRequests(lambda: now[0])
    sampling = {"max_new_tokens": 4}
    for key in ("a", "b"):
        given = {"id": key, "tokens": [1, 2], "sampling": sampling, "generated": [7], "attempt": 3}
        assert held.take(given).generated == [7]
    assert held.note(Delta("a", 1, (8,))) == ["a", 3, 1, [8], None]
    assert held.note(Delta("b", 1, (9,), "stop")) == ["b", 3, 1, [9], "stop"]
    assert held.note(Delta("unknown", 0, (9,))) is None
    assert (len(held), "a" in held, "b" in held) == (1, True, False)
    told = {one["id"]: (one["generated"], one["finish_reason"]) for one in held.to_json()}
    assert told == {"a": ([7, 8], None), "b": ([7, 9], "stop")}
    held.keeps_all = True
    now[0] += 2 * HELD_S
    held.forget_old()
    assert len(held.to_json()) == 2, "as long as nobody is there to tell"
    held.keeps_all = False
    held.forget_old()
    assert [one["id"] for one in held.to_json()] == ["a"]
    assert json.loads(json.dumps(held.to_json())) == held.to_json()
