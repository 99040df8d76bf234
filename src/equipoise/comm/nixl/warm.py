"""Loads NIXL and UCX when it is imported: for a process that ranks are forked from."""

from equipoise.comm.nixl.agent import warm_up

warm_up()
