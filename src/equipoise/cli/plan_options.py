"""The options of `equipoise plan`, as typer reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Load = Annotated[Path, typer.Argument(help="Load file: trace, recorder dump or counts.")]
Ranks = Annotated[int | None, typer.Option(help="Expert-parallel ranks.")]
SlotsPerRank = Annotated[int | None, typer.Option(help="Slots of each rank.")]
RedundantExperts = Annotated[
    int | None,
    typer.Option(help="Slots beyond one per expert; by default the fewest that leave spares."),
]
Policy = Annotated[str, typer.Option(help="Who plans; `equipoise policies` lists them.")]
Previous = Annotated[Path | None, typer.Option(help="Placement that stands; plan from it.")]
MoveBudget = Annotated[
    float | None, typer.Option(help="Most slots that flow may refill, as a fraction.")
]
Hierarchy = Annotated[
    Literal["off", "strict", "relaxed"] | None,
    typer.Option(help="How flow keeps groups on nodes."),
]
Survival = Annotated[
    Literal["off", "rank", "node"] | None,
    typer.Option(help="Whose death shall lose no expert, by flow."),
]
MinCopies = Annotated[
    int | None, typer.Option(help="Ranks or nodes that must hold each expert then.")
]
Output = Annotated[Path | None, typer.Option(help="Write the placement.")]
Format = Annotated[
    Literal["equipoise", "sglang", "tensorrt-llm", "vllm-ascend"],
    typer.Option(help="Whose placement file to write."),
]
