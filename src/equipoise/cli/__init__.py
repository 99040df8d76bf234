"""The command line: one file per command; errors are one line and exit status 2."""

from __future__ import annotations

import sys
import traceback

from equipoise.errors import EquipoiseError

DEBUG_FLAG = "--debug"


def main() -> None:
    """Run the command that the process was started with, and end the process."""
    words = [word for word in sys.argv[1:] if word != DEBUG_FLAG]
    debug = len(words) < len(sys.argv) - 1
    try:
        from equipoise.cli.app import app

        app(words, prog_name="equipoise")
    except EquipoiseError as error:
        if debug:
            traceback.print_exc()
        print(f"equipoise: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(2)
    except KeyboardInterrupt:  # while commands are being loaded
        sys.exit(130)
