"""Carries a plan out: staging, exchange, commit to slots."""

from equipoise.transfer.executor import TransferStats, rearrange_expert_weights_inplace

__all__ = ["TransferStats", "rearrange_expert_weights_inplace"]
