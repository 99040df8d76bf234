"""What a rebalance did."""

from __future__ import annotations

from dataclasses import dataclass

from equipoise.placement import Placement
from equipoise.topology import FloatArray, IntArray


@dataclass(frozen=True)
class RebalanceOutcome:
    """One plan and what became of it.

    Attributes:
        model: name of the model in its `EplbState`.
        planned_step: the step whose window it was planned from, counted from 1.
        step: the step after which the last slots and maps switched.
        moves: experts that a rank received from another, over all layers and ranks.
        local_moves: slots filled from another slot of their own rank, or by a fan-out copy.
        moves_per_layer: [L] int64, `moves` by layer.
        bytes: bytes that travelled between ranks.
        plan_s: seconds for reducing the load and planning, on the slowest rank.
        transfer_s: seconds for moving, on the slowest rank; in the background without waiting for
            the forward thread, and with the models that moved before in the same rebalance.
        forward_s: seconds that the forward thread of this rank spent on it; alone of all figures
            they differ between ranks.
        balancedness_before: [L] float64, the standing placement on the window's load.
        balancedness_after: [L] float64, the new placement on the same load, which is what the plan
            predicts.
        placement: the one now in force.
        balancedness_realised: [L] float64, the new placement on the load of the steps after the
            commit, over all ranks; None until these are served.
    """

    model: str
    planned_step: int
    step: int
    moves: int
    local_moves: int
    moves_per_layer: IntArray
    bytes: int
    plan_s: float
    transfer_s: float
    forward_s: float
    balancedness_before: FloatArray
    balancedness_after: FloatArray
    placement: Placement
    balancedness_realised: FloatArray | None = None

    @property
    def num_steps(self) -> int:
        """Steps from the plan to the last commit."""
        return self.step - self.planned_step

    def __str__(self) -> str:
        realised = self.balancedness_realised
        came = "" if realised is None else f", {realised.mean():.3f} on the steps since"
        return (
            f"step {self.step}, {self.model}: {self.moves} experts received "
            f"({self.bytes / 1e6:.1f} MB) in {self.transfer_s:.3f} s and {self.num_steps} steps, "
            f"planned in {self.plan_s:.3f} s, {self.forward_s * 1e3:.1f} ms of the forward thread; "
            f"balancedness {self.balancedness_before.mean():.3f} -> "
            f"{self.balancedness_after.mean():.3f} on the window's load{came}"
        )
