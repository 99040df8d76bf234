"""Experts over NIXL: the receiver reads them straight out of the sender's memory."""

from equipoise.comm.nixl.agent import has_nixl
from equipoise.comm.nixl.communicator import NixlEplbCommunicator

__all__ = ["NixlEplbCommunicator", "has_nixl"]
