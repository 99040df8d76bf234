"""Running a command of the command line within the test's process."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import NamedTuple
from unittest.mock import patch

from equipoise.cli import main
from tests.switches import without_switches


class Done(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


def run_command(*words: object) -> Done:
    """Run `equipoise` with these words, 200 columns wide."""
    out, err = io.StringIO(), io.StringIO()
    arguments = ["equipoise", *(str(word) for word in words)]
    code: int | str | None = 0
    with (
        patch.object(sys, "argv", arguments),
        patch.dict(os.environ, {**without_switches(os.environ), "COLUMNS": "200"}, clear=True),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as end:
            code = end.code
    assert isinstance(code, int | None)
    return Done(code or 0, out.getvalue(), err.getvalue())
