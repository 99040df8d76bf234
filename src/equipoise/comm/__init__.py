"""The wires that expert weights travel on."""

from equipoise.comm.base import EplbCommunicator, ExpertMoves, ExpertWeights
from equipoise.comm.nixl.agent import has_nixl
from equipoise.comm.registry import create_eplb_communicator, list_communicators

__all__ = [
    "EplbCommunicator",
    "ExpertMoves",
    "ExpertWeights",
    "create_eplb_communicator",
    "has_nixl",
    "list_communicators",
]
