"""`equipoise doctor`: wires tried for real, sound ones and others; what it says is missing."""

from __future__ import annotations

import ast
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import time
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from equipoise.comm.registry import list_communicators
from equipoise.doctor.advice import explain_no_gpu, give_advice
from equipoise.doctor.examination import Examination
from equipoise.doctor.machine import Machine, look_at_machine
from equipoise.doctor.probes import Gpu, GpuReport, NixlReport
from equipoise.doctor.ucx import Ucx
from equipoise.doctor.wires import Memory, Status, WireReport
from equipoise.errors import DependencyError
from tests.command_line import run_command

ROOT = Path(__file__).parent.parent

# What others might plug in. `lies` does nothing at all.
WIRES = """
import os, signal, sys, threading
from equipoise.comm.base import EplbCommunicator
from equipoise.errors import CommunicatorUnavailable

class Base(EplbCommunicator):
    name = "plugged"
    def __init__(self, *arguments): ...
    def add_send(self, tensor, dst_rank): ...
    def add_recv(self, tensor, src_rank): ...
    def add_moves(self, moves): ...
    def start(self): ...
    def finish(self): ...
    def set_stream(self, stream): ...
    def close(self): ...

class Raises(Base):
    def __init__(self, *arguments):
        os.write(1, b"adapter 7: link down\\n")
        raise RuntimeError("no link on adapter 7")

class Hangs(Base):
    def finish(self):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        threading.Event().wait()

class Refuses(Base):
    def __init__(self, *arguments):
        raise CommunicatorUnavailable("refuses needs an adapter: buy one")

class Dies(Base):
    def finish(self):
        os.kill(os.getpid(), signal.SIGKILL)

class Lies(Base):
    name = "lies"
"""
ENTRIES = """
[equipoise.communicators]
raises = plugged_wires:Raises
hangs = plugged_wires:Hangs
refuses = plugged_wires:Refuses
dies = plugged_wires:Dies
lies = plugged_wires:Lies
absent = plugged_absent:Wire
"""
TRIAL_S = 30
"""For a trial: its two processes load NIXL in it, and one wire takes all of it."""
PLUGGED = {"raises", "hangs", "refuses", "dies", "lies", "absent"}


def plug_in(folder: Path) -> None:
    """Install a package that brings wires, as pip would."""
    (folder / "plugged_wires.py").write_text(WIRES)
    (folder / "plugged_absent.py").write_text("import a_driver_that_is_not_installed\n")
    info = folder / "plugged_wires-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugged-wires\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRIES)


def find_processes(mark: str) -> list[int]:
    """Processes that have this mark in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:  # it has ended, or is another user's
            continue
    return found


def run_python(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python on this tree, 80 columns wide."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("THP_", "UCX_"))}
    path = f"{ROOT / 'src'}:{os.environ.get('PYTHONPATH', '')}"
    environment |= {"PYTHONPATH": path, "COLUMNS": "80", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *words],
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=250,
    )


class Seen(NamedTuple):
    """A whole run of the command."""

    code: int
    out: str
    err: str
    found: dict[str, Any]
    left: list[int]

    def wire(self, name: str, memory: str = "CPU") -> dict[str, Any]:
        both = [each for each in self.found["wires"] if each["communicator"] == name]
        (wire,) = (each for each in both if each["memory"] == memory)
        return dict(wire)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """Every wire of this version, and those that do not work, at a terminal of 80 columns."""
    folder = tmp_path_factory.mktemp("plugged")
    plug_in(folder)
    mark = uuid.uuid4().hex
    path = folder / "found.json"
    done = run_python(
        *("-m", "equipoise", "doctor", "--timeout", str(TRIAL_S), "--json", str(path)),
        PYTHONPATH=f"{folder}{os.pathsep}{ROOT / 'src'}",
        EQUIPOISE_TEST_MARK=mark,
    )
    # The forkserver notices that its parent has ended, and ends.
    deadline = time.monotonic() + 60
    while (left := find_processes(mark)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return Seen(done.returncode, done.stdout, done.stderr, json.loads(path.read_text()), left)


pytestmark = pytest.mark.timeout(360)


def test_sound_wires_are_measured_and_auto_is_among_them(seen: Seen) -> None:
    for name in ("nixl", "torch_gloo"):
        wire = seen.wire(name)
        assert (wire["status"], wire["reason"]) == ("works", None)
        assert wire["chosen"] == name
        assert wire["choice"] == "as asked for"
        seconds = wire["seconds_of_rounds"]
        assert len(seconds) == 5
        rate = wire["bytes_per_round"] / sorted(seconds)[2] / 1e9
        assert wire["gb_per_s"] == pytest.approx(rate)
        assert rate > 0.01
    auto = seen.wire("auto")
    assert (auto["status"], auto["chosen"]) == ("works", "nixl")
    assert auto["choice"] == "auto; every rank has NIXL"
    assert "auto takes nixl, which works (" in seen.found["verdict"]
    assert seen.found["verdict"] in " ".join(seen.out.split())


def test_all_wires_there_are_get_a_row_and_a_status(seen: Seen) -> None:
    names = [wire["communicator"] for wire in seen.found["wires"] if wire["memory"] == "CPU"]
    assert names == ["auto", *sorted({*list_communicators(), *PLUGGED})]
    rows = [" ".join(line.split()) for line in seen.out.splitlines()]
    for name in names[1:]:
        row = f"{name} {seen.wire(name)['status']}"
        assert any(each == row or each.startswith((f"{row},", f"{row} ")) for each in rows), row
    assert all(len(line) <= 80 for line in seen.out.splitlines())


@pytest.mark.parametrize(
    ("name", "status", "reason"),
    [
        ("raises", "fails", "rank 0 failed: RuntimeError: no link on adapter 7"),
        ("hangs", "hangs", f"no answer within {TRIAL_S} s, while experts travel"),
        ("refuses", "unavailable", "refuses needs an adapter: buy one"),
        ("lies", "fails", "rank 0, lies: experts of rank 1 arrived with wrong bytes"),
        (
            "absent",
            "unavailable",
            "communicator 'absent' cannot be loaded from plugged_absent:Wire: "
            "No module named 'a_driver_that_is_not_installed'",
        ),
    ],
)
def test_a_wire_that_does_not_work_says_why(
    seen: Seen, name: str, status: str, reason: str
) -> None:
    wire = seen.wire(name)
    assert (wire["status"], wire["gb_per_s"]) == (status, None)
    # Which of the two ranks is told of is theirs to settle.
    assert wire["reason"].replace("rank 1", "rank 0") == reason.replace("rank 1", "rank 0")
    assert wire["reason"] in " ".join(seen.out.split())


def test_a_wire_whose_process_dies_is_told_from_one_that_raises(seen: Seen) -> None:
    wire = seen.wire("dies")
    assert wire["status"] == "fails"
    assert "was killed by SIGKILL, while experts travel" in wire["reason"]


def test_what_a_wire_prints_is_kept_with_it_and_off_the_terminal_of_others(seen: Seen) -> None:
    assert "adapter 7: link down" in seen.wire("raises")["output"]
    assert "raises in CPU memory printed:" in seen.out
    assert seen.err == ""


def test_the_wires_that_fail_do_not_decide_unless_they_are_asked_for(seen: Seen) -> None:
    assert seen.code == 0
    assert seen.found["works"] is True
    assert seen.found["needed"]["communicators"] == ["auto"]


def test_nothing_is_left_running(seen: Seen) -> None:
    assert seen.left == []


def test_the_machine_is_told(seen: Seen) -> None:
    machine, packages = seen.found["machine"], seen.found["packages"]
    assert packages["torch"] == str(torch.__version__)
    assert seen.found["torch"]["cuda"] == torch.version.cuda
    assert machine["python"] == platform.python_version()
    assert machine["shm_bytes"] == shutil.disk_usage("/dev/shm").total
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    limits = [None if limit == resource.RLIM_INFINITY else limit for limit in (soft, hard)]
    assert [machine["locked_bytes"], machine["most_locked_bytes"]] == limits
    assert machine["cores"] == len(os.sched_getaffinity(0))
    assert 0 < machine["free_memory_bytes"] < machine["memory_bytes"]
    # What the user set, and not the defaults that ranks are started with.
    assert machine["settings"].keys() >= {"EQUIPOISE_TEST_MARK", "OMP_NUM_THREADS"}
    assert "THP_MEM_ALLOC_ENABLE" not in machine["settings"]
    for fact in (str(torch.__version__), "locked memory", "huge pages", "shared memory"):
        assert fact in seen.out


def test_ucx_lists_its_transports_itself(seen: Seen) -> None:
    ucx = seen.found["ucx"]
    assert seen.found["nixl"] == {"works": True, "problem": None}
    assert Path(ucx["library"]).name.startswith("libucp")
    assert "tcp" in ucx["transports"]
    assert {resource.partition("/")[0] for resource in ucx["resources"]} == set(ucx["transports"])
    assert f"{ucx['version']}: {', '.join(ucx['transports'])}" in " ".join(seen.out.split())


def test_ucx_lists_what_its_settings_leave() -> None:
    code = (
        "import torch; from equipoise.comm.nixl.agent import Agent; "
        "from equipoise.doctor.ucx import ask_ucx; agent = Agent(torch.device('cpu')); "
        "print(*ask_ucx().transports); agent.close()"
    )
    done = run_python("-c", code, UCX_TLS="tcp")
    assert (done.returncode, done.stdout) == (0, "tcp\n"), done.stderr


def test_without_a_ucx_in_the_process_there_is_nothing_to_ask() -> None:
    code = "from equipoise.doctor.ucx import ask_ucx; ask_ucx()"
    done = run_python("-c", code)
    assert f"{DependencyError.__name__}: no libucp is loaded in this process" in done.stderr


def test_communicators_that_are_named_must_work() -> None:
    # With these transports alone no rank reaches another's memory.
    words = ("--communicator", "torch_gloo", "--communicator", "nixl", "--json", "-")
    patience = ("--timeout", "60")
    done = run_python("-m", "equipoise", "doctor", *words, *patience, UCX_TLS="self,posix")
    assert done.returncode == 1
    found = json.loads(done.stdout)
    assert found["works"] is False
    memory = "GPU" if torch.cuda.is_available() else "CPU"
    assert found["verdict"] == f"nixl does not work in {memory} memory here."
    assert found["needed"]["communicators"] == ["torch_gloo", "nixl"]
    status = {each["communicator"]: each["status"] for each in found["wires"][::2]}
    assert status == {"torch_gloo": "works", "nixl": "unavailable"}
    assert found["nixl"]["works"] is False
    (advice,) = found["advice"]
    assert "NIXL is installed and cannot start UCX here" in advice
    assert advice.endswith("unset UCX_TLS")
    # With JSON on standard output, tables are for the terminal.
    assert found["verdict"] in " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("--communicator nixel", "unknown communicator 'nixel': did you mean 'nixl'? there are"),
        ("--timeout 0", "--timeout must be a number of seconds above 0, got 0.0"),
        ("--timeout nan", "--timeout must be a number of seconds above 0, got nan"),
        ("--timeout inf", "--timeout must be a number of seconds above 0, got inf"),
        ("--json /nowhere/at/all.json", "--json /nowhere/at/all.json: there is no directory"),
    ],
)
def test_what_cannot_be_is_one_line_and_exit_2(words: str, complaint: str) -> None:
    done = run_command("doctor", *words.split())
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"equipoise: {complaint}")
    assert done.err.count("\n") == 1


@pytest.mark.gpu
def test_wires_are_tried_on_the_gpus_that_are_there() -> None:
    num_gpus = torch.cuda.device_count()
    named = [w for name in ("nixl", "torch_gloo", "torch_nccl") for w in ("--communicator", name)]
    # A machine with many tests on it takes long to start CUDA in each process.
    done = run_python("-m", "equipoise", "doctor", *named, "--timeout", "80", "--json", "-")
    assert done.stdout, done.stderr
    found = json.loads(done.stdout)
    on_gpus = {w["communicator"]: w for w in found["wires"] if w["memory"] == "GPU"}
    for name in ("nixl", "torch_gloo"):
        assert on_gpus[name]["status"] == "works", on_gpus[name]
        assert len(set(on_gpus[name]["devices"])) == min(num_gpus, 2)
        assert on_gpus[name]["gb_per_s"] > 0.1
    assert found["needed"]["memory"] == "GPU"
    assert [gpu["name"] for gpu in found["gpus"]] == [
        torch.cuda.get_device_name(number) for number in range(num_gpus)
    ]
    assert found["torch"]["nccl"]
    assert found["driver"]["version"]
    assert "cuda_copy" in found["ucx"]["transports"]
    # NCCL needs a GPU for each of the two.
    assert (on_gpus["torch_nccl"]["status"] == "works") is (num_gpus > 1)
    assert done.returncode == (0 if num_gpus > 1 else 1)


FINE = Machine(4, 1 << 34, 1 << 33, 1 << 33, 1 << 33, None, None, "madvise", (0, 0), False, {})
TWO_GPUS = (Gpu("H200", 2, 1, (1,)), Gpu("H200", 2, 1, (0,)))
IPC = NixlReport(works=True, ucx=Ucx("1.23.0", "libucp.so", ("cuda_ipc/cuda", "cma/memory")))


def test_a_machine_on_which_all_is_well_gets_no_advice() -> None:
    assert give_advice(FINE, GpuReport(TWO_GPUS, "580", "13.0", "2.28"), IPC) == ()


@pytest.mark.parametrize(
    ("machine", "command"),
    [
        (replace(FINE, shm_bytes=64 << 20), "--shm-size=8g"),
        (replace(FINE, has_infiniband=True, locked_bytes=8 << 20), "--ulimit memlock=-1"),
        (replace(FINE, huge_pages="never"), "/sys/kernel/mm/transparent_hugepage/enabled"),
    ],
)
def test_a_limit_in_the_way_comes_with_the_command_that_lifts_it(
    machine: Machine, command: str
) -> None:
    (advice,) = give_advice(machine, GpuReport(), IPC)
    assert command in advice


def test_locked_memory_is_no_matter_without_infiniband() -> None:
    assert give_advice(replace(FINE, locked_bytes=8 << 20), GpuReport(), IPC) == ()


def test_gpus_that_do_not_reach_each_other_are_named() -> None:
    three = (Gpu("A", 2, 1, (2,)), Gpu("B", 2, 1, ()), Gpu("C", 2, 1, (0,)))
    (advice,) = give_advice(FINE, GpuReport(three, "580", "13.0", "2.28"), IPC)
    assert advice.startswith("GPUs 1 and 0, 2 and 1 cannot reach each other's memory")
    without = NixlReport(works=True, ucx=Ucx("1.23.0", "libucp.so", ("cma/memory",)))
    (advice,) = give_advice(FINE, GpuReport(TWO_GPUS, "580", "13.0", "2.28"), without)
    assert "UCX lists no cuda_ipc" in advice


def test_cuda_that_does_not_start_is_told_from_no_cuda() -> None:
    broken = GpuReport(is_broken=True, problem="no answer within 20 s")
    assert explain_no_gpu(broken) == "CUDA does not work here: no answer within 20 s"
    if torch.version.cuda is None and torch.version.hip is None:
        assert "is built without CUDA, and there is no NVIDIA driver" in explain_no_gpu(GpuReport())
        assert "pip install" in explain_no_gpu(GpuReport(driver="580"))


def make_examination(memory: Memory, *wires: tuple[str, Memory, Status]) -> Examination:
    reports = tuple(
        WireReport(name, where, (), status, chosen="nixl", num_bytes=10**9, seconds=(0.5,))
        for name, where, status in wires
    )
    needed = ("auto",)
    return Examination(reports, needed, memory, FINE, GpuReport(), IPC, {}, ())


def test_with_gpus_it_is_their_memory_that_counts() -> None:
    both: tuple[tuple[str, Memory, Status], ...] = (
        ("auto", "CPU", "works"),
        ("auto", "GPU", "not tried"),
    )
    assert make_examination("CPU", *both).verdict == (
        "auto takes nixl, which works (2 GB/s in CPU memory)."
    )
    on_gpus = make_examination("GPU", *both)
    assert not on_gpus.is_well
    assert on_gpus.verdict == "auto does not work in GPU memory here."


def test_this_machine_reads_its_own_limits() -> None:
    machine = look_at_machine()
    words = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if words.exists():
        assert f"[{machine.huge_pages}]" in words.read_text()


def list_literals() -> list[str]:
    """Every piece of text in the source that is written in one go."""
    trees = [ast.parse(path.read_text()) for path in (ROOT / "src").rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    return [node.value for node in nodes if isinstance(node.value, str)]


def test_the_errors_that_the_documents_explain_are_those_that_wires_raise() -> None:
    text = (ROOT / "docs" / "expert_parallel_deployment.md").read_text()
    errors = text.partition("## Errors")[2]
    quoted = re.findall(r"^(?:\| |- )`([^`]+)`", errors, re.MULTILINE)
    assert len(quoted) > 20
    literals = "\0".join(re.sub(r"%[ds]", "\0", literal) for literal in list_literals())
    for quote in quoted:
        # What is shorter than a word or two may stand anywhere.
        parts = [part for part in quote.split("…") if len(part) > 8]
        assert parts, quote
        for part in parts:
            assert part.strip(" ,;:") in literals, (quote, part)
