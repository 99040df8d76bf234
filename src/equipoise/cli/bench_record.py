"""`equipoise bench record`: the kernel that chooses replicas and counts, beside PyTorch."""

from __future__ import annotations

from typing import Annotated

import typer

from equipoise.cli.bench import JsonPath, check_json_path, show_outcome

_COLUMNS = (
    ("way", "way"),
    ("case", "case"),
    ("us on the device", "device_us"),
    ("us per call", "call_us"),
    ("ratio", "ratio"),
    ("of", "goal_of"),
    ("goal", "goal"),
    ("met", "met"),
)


def bench_record(
    tokens: Annotated[int, typer.Option(help="Tokens of this rank.")] = 4096,
    top_k: Annotated[int, typer.Option(help="Experts of each token.")] = 8,
    experts: Annotated[int, typer.Option(help="Experts of the layer.")] = 256,
    slots: Annotated[int, typer.Option(help="Slots of all ranks.")] = 288,
    rounds: Annotated[int, typer.Option(help="How often each side is measured.")] = 15,
    seed: Annotated[int, typer.Option(help="Of the routes and the placement.")] = 0,
    json_path: JsonPath = None,
) -> None:
    """Turn experts into slots and count them, in one launch and by PyTorch; needs a GPU."""
    check_json_path(json_path)
    from equipoise.bench.record import RecordSpec, measure_record

    spec = RecordSpec(tokens, top_k, experts, slots, rounds, seed)
    show_outcome(measure_record(spec), _COLUMNS, json_path)
