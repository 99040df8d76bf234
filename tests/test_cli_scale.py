"""`equipoise scale` where the service does not do what it was asked for in time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from equipoise.elastic.control import ControlSocket
from tests.command_line import run_command


class Slow:
    """A service whose changes take longer than anybody waits."""

    def scale(self, **asked: Any) -> None:
        raise TimeoutError(f"not done within {asked['timeout_s']:g} s; it goes on")


def test_a_change_that_takes_longer_than_it_is_waited_for_is_told(tmp_path: Path) -> None:
    control = ControlSocket(Slow(), tmp_path / "slow.sock")  # type: ignore[arg-type]
    try:
        done = run_command("scale", "--to=3", "--timeout=2", f"--socket={control.path}")
    finally:
        control.close()
    assert (done.code, done.out) == (2, "")
    assert done.err == "equipoise: not done within 2 s; it goes on\n"


@pytest.mark.parametrize("timeout", ["0", "-1", "nan", "inf"])
def test_no_wait_at_all_and_one_without_end_are_refused(timeout: str) -> None:
    done = run_command("scale", "--to=3", f"--timeout={timeout}", "--url=http://127.0.0.1:1")
    assert (done.code, done.out) == (2, "")
    assert done.err == f"equipoise: --timeout must be from 1 to 86400 s, got {timeout}\n"
