"""What a survivor does first when ranks of its generation have died."""

from __future__ import annotations

import contextlib

from equipoise.errors import EquipoiseError
from equipoise.models.parallel import ParallelModel


def abandon(parallel: ParallelModel, wait_s: float = 1.0) -> None:
    """Serve no more in a generation whose step has failed.

    Connections are closed, so that peers which still wait in that step hear of it. A chunk whose
    decision stands is committed; one that could not be asked for is not. Either way the maps say
    what this rank's slots hold, and that is what counts from here on: `planning.describe` tells it
    to whoever plans the recovery. The generation itself is retired by the switch to the next.

    Args:
        parallel: of the generation.
        wait_s: longest wait for this rank's balancing thread.
    Collective: none.
    """
    parallel.state.group.close()
    for dispatcher in parallel.dispatchers:
        dispatcher.close()
    for communicator in parallel.communicators:
        communicator.interrupt()
    # Why balancing cannot end well is of no use any more.
    with contextlib.suppress(EquipoiseError):
        parallel.state.close(wait_s=wait_s)
