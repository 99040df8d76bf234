"""Options of the commands that read load files."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from equipoise.errors import ConfigError

Number = TypeVar("Number")

DEEPSEEK_EXPERT_BYTES = 44_040_192
_MODEL, _COST = "Model and ranks", "Cost"

NumNodes = Annotated[
    int, typer.Option("--nodes", help="Hosts that the ranks are on.", rich_help_panel=_MODEL)
]
NumGroups = Annotated[
    int,
    typer.Option(
        "--groups", help="Equal groups that consecutive experts form.", rich_help_panel=_MODEL
    ),
]
NumExperts = Annotated[
    int | None,
    typer.Option(
        "--num-experts",
        help="Experts of each layer, where routes may lack the last ones.",
        rich_help_panel=_MODEL,
    ),
]
FirstLayer = Annotated[
    int,
    typer.Option(
        "--first-layer",
        help="Dense layers at the front, where a file counts them.",
        rich_help_panel=_MODEL,
    ),
]
ExpertBytes = Annotated[
    int | None,
    typer.Option(
        "--expert-bytes",
        help="Bytes of one expert of one layer; DeepSeek-V3's in FP8 where not given.",
        rich_help_panel=_COST,
    ),
]
LinkGbPerS = Annotated[
    float,
    typer.Option(
        "--link-gb-per-s", help="GB/s that a rank receives and sends.", rich_help_panel=_COST
    ),
]
JsonPath = Annotated[
    Path | None, typer.Option("--json", help="Write the figures as one JSON object.")
]


def parse_list(text: str, flag: str, convert: Callable[[str], Number]) -> list[Number]:
    """Read values separated by commas.

    Raises: ConfigError naming the flag and the value that cannot be one.
    """
    values = []
    for word in text.split(","):
        try:
            values.append(convert(word.strip()))
        except ValueError as error:
            raise ConfigError(
                f"{flag}: {word.strip()!r} cannot be one of its values, in {text!r}"
            ) from error
    return values


def read_measurements(path: Path) -> tuple[list[float], list[float]]:
    """Read tokens and seconds of one layer's experts.

    Args:
        path: JSON with lists `tokens` and `seconds`, or CSV with two such columns.
    Raises: ConfigError naming the file and what would be right.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if text.lstrip().startswith("{"):
            record = json.loads(text)
            columns = [[float(value) for value in record[key]] for key in ("tokens", "seconds")]
        else:
            rows = list(csv.DictReader(text.splitlines()))
            columns = [[float(row[key]) for row in rows] for key in ("tokens", "seconds")]
    except OSError as error:
        raise ConfigError(f"--measurements {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"--measurements {path}: must be JSON or CSV with numbers `tokens` and `seconds`"
        ) from error
    return columns[0], columns[1]
