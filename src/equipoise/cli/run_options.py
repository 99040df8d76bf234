"""Options of `equipoise run`, and their defaults where others need them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

DEFAULT_PROMPTS = 256
DEFAULT_TIMEOUT_S = 60.0
DEFAULT_REPORT = Path("equipoise-report.html")

Ranks = Annotated[int | None, typer.Option(help="Processes that share the experts.  [4]")]
Model = Annotated[
    Path | None, typer.Option(help="Hugging Face checkpoint directory.  [the bundled model]")
]
Input = Annotated[
    Path | None, typer.Option(help="Text file to continue.  [bundled texts of four kinds]")
]
Prompts = Annotated[
    int | None, typer.Option(help=f"How many prompts.  [{DEFAULT_PROMPTS}; all of --input]")
]
MaxNewTokens = Annotated[int, typer.Option(help="Tokens per prompt.")]
BatchSize = Annotated[int, typer.Option(help="Sequences in flight per rank.")]
Steps = Annotated[int | None, typer.Option(help="Most steps per pass.  [no limit]")]
RedundantExperts = Annotated[str | None, typer.Option(help="auto, or a number.  [auto]")]
Policy = Annotated[str | None, typer.Option(help="See `equipoise policies`.  [flow]")]
Communicator = Annotated[str | None, typer.Option(help="Wire for weights.  [auto]")]
StepInterval = Annotated[int | None, typer.Option(help="Steps between plans.  [16]")]
WindowSize = Annotated[int | None, typer.Option(help="Steps planned from.  [16]")]
Sync = Annotated[bool, typer.Option("--sync", help="Not in the background.")]
NoBalance = Annotated[bool, typer.Option("--no-balance", help="Make no plans.")]
ConfigFile = Annotated[
    Path | None, typer.Option(help="YAML or JSON file of options: see `equipoise config`.")
]
EplbConfig = Annotated[
    str | None, typer.Option(help="JSON object of options; or --eplb-config.OPTION VALUE.")
]
DType = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Dispatch = Annotated[str, typer.Option(help="Of tokens: torch or nixl_ep.")]
Seed = Annotated[int, typer.Option(help="Of whatever is random.")]
Timeout = Annotated[float, typer.Option(help="Longest wait for another rank, s.")]
Check = Annotated[bool, typer.Option(help="Compare with the plain model.")]
Json = Annotated[Path | None, typer.Option(help="Write figures here; - for stdout.")]
Report = Annotated[Path, typer.Option(help="Write one HTML file here.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show nothing while it runs.")]
Kill = Annotated[list[str] | None, typer.Option(help="RANK@STEP: kill a rank; may repeat.")]
Hang = Annotated[
    list[str] | None, typer.Option(help="RANK@STEP: stop a rank, unheard; may repeat.")
]
