"""The spine: when to plan, move and commit."""

from equipoise.balancer.model_state import EplbModelState
from equipoise.balancer.outcome import RebalanceOutcome
from equipoise.balancer.state import EplbState
from equipoise.balancer.stats import EplbStats, ModelStats

__all__ = ["EplbModelState", "EplbState", "EplbStats", "ModelStats", "RebalanceOutcome"]
