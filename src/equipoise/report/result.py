"""A job's figures as one JSON object."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from equipoise.job.records import RebalanceRecord, ResultRecord
from equipoise.report.summary import JobSummary, write_sentence
from equipoise.report.tally import BeforeAfter
from equipoise.report.wording import name_model

FORMAT_VERSION = 1
PACKAGES = ("equipoise", "torch", "transformers", "numpy")


def make_result(summary: JobSummary) -> dict[str, Any]:
    """The object that `--json` writes; docs of its keys are in the README.

    Args:
        summary: of a job that has ended.
    Returns:
        Plain values alone: what was not measured is None.
    """
    job, result, placement = summary.job, summary.result, summary.initial
    assert job is not None
    assert result is not None
    check = result.check
    return {
        "format_version": FORMAT_VERSION,
        "summary": write_sentence(summary),
        "model": name_model(job.model),
        "device": job.device,
        "dtype": job.dtype,
        "ranks": placement.topology.num_ranks,
        "slots_per_rank": placement.topology.slots_per_rank,
        "redundant_experts": placement.num_slots - placement.num_experts,
        "policy": job.policy,
        "communicator": job.communicator,
        "steps": len(summary.points["on"]),
        "prompts": job.num_prompts,
        "new_tokens": summary.num_new_tokens("on"),
        "tokens_per_s": summary.tokens_per_s("on"),
        "seconds": dict(result.seconds),
        "outputs_identical": None if check is None else check.outputs_identical,
        "max_logit_diff": None if check is None else check.max_logit_diff,
        "tokens_compared": None if check is None else check.num_tokens,
        "tokens_identical": None if check is None else check.num_identical,
        "divergence": asdict(check.divergence) if check and check.divergence else None,
        "balancedness": _make_balancedness(summary),
        "expert_cpu_s": {name: summary.expert_cpu_s(name).tolist() for name in ("off", "on")},
        "losses": _make_losses(result),
        "rebalances": [_make_rebalance(rebalance) for rebalance in summary.rebalances],
        "versions": list_versions(),
    }


def write_json(summary: JobSummary) -> str:
    """`make_result` as text that ends with a newline."""
    return json.dumps(make_result(summary), indent=2, allow_nan=False) + "\n"


def list_versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that figures depend on; None if not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return versions


def _make_balancedness(summary: JobSummary) -> dict[str, Any]:
    steps = summary.covered_steps
    return {
        **_pair(summary.covered.balancedness()),
        "first_step": steps[0] if steps else None,
        "last_step": steps[1] if steps else None,
        "per_kind": {
            kind: _pair(tally.balancedness()) for kind, tally in summary.covered_kinds.items()
        },
        "per_layer": [_pair(figure) for figure in summary.covered.balancedness_per_layer()],
    }


def _make_losses(result: ResultRecord) -> dict[str, Any]:
    return {
        loss.kind: {
            "num_tokens": loss.num_tokens,
            "off": loss.off,
            "on": loss.on,
            "plain": loss.plain,
        }
        for loss in result.losses
    }


def _make_rebalance(record: RebalanceRecord) -> dict[str, Any]:
    return {
        "planned_step": record.planned_step,
        "step": record.step,
        "moves": record.moves,
        "local_moves": record.local_moves,
        "bytes": record.bytes,
        "plan_s": record.plan_s,
        "transfer_s": record.transfer_s,
        "forward_s": record.forward_s,
        "balancedness_before": float(record.balancedness_before.mean()),
        "balancedness_after": float(record.balancedness_after.mean()),
    }


def _pair(figure: BeforeAfter) -> dict[str, float]:
    return {"before": figure.before, "after": figure.after}
