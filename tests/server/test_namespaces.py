"""The guide to several machines, followed in two network namespaces with one link between them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from equipoise.server.settings import ADMIN_KEY, API_KEY
from tests.server.serving import KEYS, wait_until
from tests.sessions import list_session

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        not os.environ.get("SERVER_NAMESPACES"),
        reason="SERVER_NAMESPACES asks for it, as root",
    ),
]
ADDRESSES = ("10.77.0.1", "10.77.0.2")
URL = f"http://{ADDRESSES[0]}:8000"
TORCHRUN = (
    "torchrun --nnodes 2 --node-rank {} --nproc-per-node 1 --master-addr 10.77.0.1 "
    "--master-port 29500 -m equipoise serve"
)
END_S = 120.0


class Machine:
    """A namespace, in which commands see one address beside the loopback's."""

    def __init__(self, number: int, folder: Path) -> None:
        self.name, self._folder = f"equipoise-{number}", folder
        self._environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            API_KEY: KEYS.api,
            ADMIN_KEY: KEYS.admin,
        }

    def start(self, command: str, said: str) -> subprocess.Popen[str]:
        """Run a command in a session of its own; what it says goes to files."""
        with (
            (self._folder / f"{said}.out").open("w") as out,
            (self._folder / f"{said}.err").open("w") as err,
        ):
            return subprocess.Popen(
                ["ip", "netns", "exec", self.name, *command.split()],
                cwd=self._folder,
                env=self._environment,
                stdout=out,
                stderr=err,
                text=True,
                start_new_session=True,
            )

    def run(self, command: str) -> tuple[int, str]:
        """Run one to its end: its exit status, and what it said."""
        words = ["ip", "netns", "exec", self.name, *command.split()]
        done = subprocess.run(
            words,
            cwd=self._folder,
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        return done.returncode, done.stdout + done.stderr

    def lose(self) -> None:
        """End all that runs on it."""
        said = subprocess.run(
            ["ip", "netns", "pids", self.name], check=True, capture_output=True, text=True
        )
        for pid in said.stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    def status(self) -> dict[str, Any]:
        """Of the server."""
        code, said = self.run(f"equipoise status --json --url {URL}")
        assert code == 0, said
        status: dict[str, Any] = json.loads(said)
        return status

    def complete(self, prompt: str) -> str:
        """By curl, as the guide has it."""
        body = json.dumps({"prompt": prompt, "max_tokens": 20, "temperature": 0})
        words = [
            "ip", "netns", "exec", self.name, "curl", "--silent", "--fail-with-body",
            f"{URL}/v1/completions", "-H", f"authorization: Bearer {KEYS.api}",
            "-H", "content-type: application/json", "-d", body,
        ]  # fmt: skip
        done = subprocess.run(words, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        text: str = json.loads(done.stdout)["choices"][0]["text"]
        return text


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[tuple[Machine, Machine]]:
    pair = (Machine(0, tmp_path), Machine(1, tmp_path))
    for machine in pair:
        _ip(f"netns add {machine.name}")
    try:
        _ip(f"link add eq0 netns {pair[0].name} type veth peer name eq0 netns {pair[1].name}")
        for machine, address in zip(pair, ADDRESSES, strict=True):
            _ip(f"-n {machine.name} addr add {address}/24 dev eq0")
            for link in ("lo", "eq0"):
                _ip(f"-n {machine.name} link set {link} up")
        yield pair
    finally:
        for machine in pair:
            machine.lose()
            _ip(f"netns del {machine.name}")


def _ip(words: str) -> None:
    subprocess.run(["ip", *words.split()], check=True)


@contextlib.contextmanager
def _ended(*processes: subprocess.Popen[str]) -> Iterator[None]:
    try:
        yield
    finally:
        for process in processes:
            for pid in list_session(process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait(END_S)


def _wait_for_server(folder: Path, said: str, process: subprocess.Popen[str]) -> None:
    def serves() -> bool:
        assert process.poll() is None, (folder / f"{said}.err").read_text()
        return f"serving equipoise-small at {URL}" in (folder / f"{said}.out").read_text()

    wait_until(serves, 300.0)


def test_torchrun_on_two_machines(tmp_path: Path, machines: tuple[Machine, Machine]) -> None:
    first, second = machines
    server = first.start(f"{TORCHRUN.format(0)} --host 10.77.0.1", "first")
    other = second.start(TORCHRUN.format(1), "second")
    with _ended(server, other):
        _wait_for_server(tmp_path, "first", server)
        text = second.complete("def main(")
        status = second.status()
        assert [rank["node"] for rank in status["ranks"]] == ["node-0", "node-1"]
        code, said = second.run(f"equipoise scale --to 3 --url {URL}")
        assert (code, "torchrun started 2 processes" in said) == (2, True)
        code, said = second.run(f"equipoise scale --to 1 --url {URL}")
        assert (code, "leaving: rank-1" in said) == (0, True)
        assert second.complete("def main(") == text
        code, said = second.run(f"equipoise scale --to 2 --url {URL}")
        assert (code, "joining: rank-1" in said) == (0, True)
        # A death leaves the others; torchrun does not see it.
        (pid,) = (r["pid"] for r in second.status()["ranks"] if r["name"] == "rank-1")
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: second.status()["totals"]["recoveries"] == 1)
        assert first.complete("def main(") == text
        assert server.poll() is None
        assert other.poll() is None
        server.send_signal(signal.SIGTERM)
        server.wait(END_S)
        assert other.wait(END_S) == 0
        assert '"drained": true' in (tmp_path / "first.err").read_text()
        assert not list_session(server.pid)


def test_ray_on_two_machines(tmp_path: Path, machines: tuple[Machine, Machine]) -> None:
    first, second = machines
    small = "--object-store-memory 80000000 --include-dashboard false --num-cpus 2 --block"
    head = first.start(f"ray start --head --node-ip-address 10.77.0.1 {small}", "head")
    with _ended(head):
        wait_until(lambda: "Ray runtime started" in (tmp_path / "head.out").read_text(), 120.0)
        join = "ray start --address 10.77.0.1:6379 --node-ip-address 10.77.0.2"
        node = second.start(f"{join} {small.replace('--include-dashboard false ', '')}", "node")
        with _ended(node):
            wait_until(lambda: "Ray runtime started" in (tmp_path / "node.out").read_text(), 120.0)
            serve = "equipoise serve --launcher ray --ranks 2 --device cpu --host 10.77.0.1"
            server = first.start(serve, "server")
            with _ended(server):
                _wait_for_server(tmp_path, "server", server)
                text = second.complete("def main(")
                assert len({rank["node"] for rank in second.status()["ranks"]}) == 2
                code, said = second.run(f"equipoise scale --to 4 --url {URL}")
                assert code == 0, said
                code, said = second.run(f"equipoise scale --to 2 --url {URL}")
                assert code == 0, said
                # The machine is lost, with all that runs on it.
                second.lose()
                wait_until(lambda: first.status()["totals"]["recoveries"] == 1)
                assert first.complete("def main(") == text
                server.send_signal(signal.SIGTERM)
                assert server.wait(END_S) == 0
