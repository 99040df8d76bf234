"""What a job shows where there is no terminal: a line when something changes."""

from __future__ import annotations

from rich.console import Console

from equipoise.job.records import (
    JobRecord,
    LoadRecord,
    PhaseRecord,
    RebalanceRecord,
    Record,
    StepRecord,
)
from equipoise.report.closing import render_closing
from equipoise.report.summary import JobSummary
from equipoise.report.wording import PHASES, name_model, say_loading, say_rebalance


def describe_job(record: JobRecord) -> str:
    """One line on what is about to run."""
    placement = record.placement
    topology = placement.topology
    redundant = placement.num_slots - placement.num_experts
    return (
        f"{name_model(record.model)}: {record.num_parameters / 1e6:,.1f} M parameters in "
        f"{record.dtype}, {placement.num_layers} MoE layers of {placement.num_experts} experts "
        f"and {redundant} redundant slots on {topology.num_ranks} ranks ({record.device}); "
        f"policy {record.policy}, weights travel by {record.communicator}"
    )


class PlainDisplay:
    """Lines at the start, at each phase, rebalance and change of text, and the closing tables."""

    def __init__(self, console: Console, summary: JobSummary) -> None:
        self._console = console
        self._summary = summary
        self._kind: str | None = None

    def show(self, record: Record) -> None:
        """Take a record that the summary has taken already."""
        match record:
            case LoadRecord():
                self._say(say_loading(record))
            case JobRecord():
                self._say(describe_job(record))
            case PhaseRecord():
                self._kind = None
                self._say(PHASES[record.phase])
            case StepRecord(kind=str(kind)) if kind != self._kind:
                self._kind = kind
                self._say(f"step {record.step}: text is {kind}")
            case RebalanceRecord():
                self._say(say_rebalance(record))

    def close(self) -> None:
        """Show the closing tables, if the job has ended."""
        if self._summary.result is not None:
            self._console.print(render_closing(self._summary))

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)
