"""How well the small model predicts held-out text, and how unevenly it loads its experts."""

from __future__ import annotations

import math
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from small_moe_corpus import read_corpus
from transformers import Qwen3MoeForCausalLM

SEQUENCE = 512
NUM_RANKS = 4
FIRST_BYTE_ID = 3  # ByT5: 0 pads, 1 ends a text, 2 is unknown, then the 256 bytes
END_ID = 1


def list_byte_ids(device: torch.device) -> torch.Tensor:
    """The token of each byte; the zero byte, which no text has, ends a document."""
    ids = torch.arange(256, device=device) + FIRST_BYTE_ID
    ids[0] = END_ID
    return ids


@torch.no_grad()
def measure_text(model: Qwen3MoeForCausalLM, ids: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Nats per byte of windows [N, SEQUENCE], and how often each expert of a layer is chosen."""
    config = model.config
    loads = torch.zeros(config.num_hidden_layers, config.num_experts, device=ids.device)
    total = 0.0
    for window in ids.split(32):
        output = model(input_ids=window, use_cache=False, output_router_logits=True)
        logits = output.logits[:, :-1].flatten(0, 1).float()
        total += F.cross_entropy(logits, window[:, 1:].flatten(), reduction="sum").item()
        for layer, router in enumerate(output.router_logits):
            chosen = router.float().softmax(-1).topk(config.num_experts_per_tok, -1).indices
            loads[layer] += chosen.flatten().bincount(minlength=config.num_experts)
    return total / (ids.shape[0] * (ids.shape[1] - 1)), loads.cpu()


def measure_model(
    model_folder: Path, data: Path, device: torch.device, max_bytes: int
) -> dict[str, Any]:
    """Loss and routing on held-out text, each kind by itself."""
    model, rounded = (
        Qwen3MoeForCausalLM.from_pretrained(
            model_folder, dtype=dtype, experts_implementation="eager"
        ).to(device)
        for dtype in (torch.float32, torch.bfloat16)
    )
    metrics: dict[str, Any] = {"loss": {}, "imbalance": {}, "largest_expert": {}, "cosine": {}}
    loads = {}
    for kind, text in read_corpus(data, "heldout").items():
        count = min(len(text), max_bytes) // SEQUENCE
        windows = torch.frombuffer(bytearray(text), dtype=torch.uint8)[: count * SEQUENCE]
        ids = list_byte_ids(device)[windows.view(count, SEQUENCE).to(device).long()]
        nats, loads[kind] = measure_text(model, ids)
        nats_bf16, _ = measure_text(rounded, ids)
        metrics["loss"][kind] = {
            "bytes": ids.numel(),
            "nats": round(nats, 4),
            "bits_per_byte": round(nats / math.log(2), 4),
            "bits_per_byte_bf16": round(nats_bf16 / math.log(2), 4),
        }
        ranks = loads[kind].view(len(loads[kind]), NUM_RANKS, -1).sum(-1)
        for name, load in (("imbalance", ranks), ("largest_expert", loads[kind])):
            values = load.max(-1).values / load.mean(-1)
            metrics[name][kind] = [round(value, 3) for value in values.tolist()]
    for one, other in combinations(loads, 2):
        cosines = F.cosine_similarity(loads[one], loads[other], dim=-1)
        metrics["cosine"][f"{one} {other}"] = [round(value, 3) for value in cosines.tolist()]
    return metrics


def tabulate_loss(metrics: dict[str, Any]) -> list[list[str]]:
    rows = [["kind", "nats per byte", "bits per byte", "bits per byte, bf16", "bytes"]]
    for kind, loss in metrics["loss"].items():
        bits = f"{loss['bits_per_byte']:.3f}", f"{loss['bits_per_byte_bf16']:.3f}"
        rows.append([kind, f"{loss['nats']:.3f}", *bits, f"{loss['bytes']:,}"])
    return rows


def tabulate_layers(metrics: dict[str, Any], name: str) -> list[list[str]]:
    layers = range(len(next(iter(metrics[name].values()))))
    rows = [["kinds" if name == "cosine" else "kind", *(f"layer {layer}" for layer in layers)]]
    return rows + [[kind, *map("{:.2f}".format, row)] for kind, row in metrics[name].items()]


TABLES = {
    "imbalance": f"Imbalance: the most loaded of {NUM_RANKS} ranks over their mean",
    "largest_expert": "The most loaded expert over the mean",
    "cosine": "Cosine of expert loads between kinds",
}


def print_metrics(metrics: dict[str, Any]) -> None:
    tables = {"Held-out loss": tabulate_loss(metrics)}
    tables |= {title: tabulate_layers(metrics, name) for name, title in TABLES.items()}
    for title, rows in tables.items():
        print(f"\n{title}")
        for row in rows:
            print(f"  {row[0]:18}" + "".join(f"{cell:>21}" for cell in row[1:]))


CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
# A small Mixture-of-Experts model of four kinds of text

A byte-level language model with the architecture of Qwen3-MoE: 4 layers of 32 experts, of which
every token takes 4. It exists to show and test how expert loads differ between kinds of text, on
any machine and without a network. Its routing was learned, with an auxiliary loss so weak
(coefficient {aux}) that experts keep to kinds of text.

## Use and limits

Measuring, placing and moving experts. It writes no useful text, and nobody checked what it writes.

## Data

Held-out text took no part in training. Licences are those of the text that was read.

{sources}

## Held-out loss

{loss}

## Routing on held-out text

{routing}

## Training

{steps} steps of {batch} x {sequence} bytes in {seconds} s on one {device}: AdamW, learning rate
{lr} with linear decay, bfloat16 with float32 master weights. To train it again on a Debian machine
that has the packages above:

    python examples/train_small_moe.py prepare --out corpus
    python examples/train_small_moe.py train --data corpus --out model \\
        --max-seconds {max_seconds:.0f} --batch {batch} --lr {lr} --aux {aux} --seed {seed}
    python examples/train_small_moe.py card --model model --metrics model/metrics.json
"""


def format_table(rows: list[list[str]]) -> str:
    lines = [" | ".join(row) for row in rows]
    lines.insert(1, " | ".join(["---"] + ["--:"] * (len(rows[0]) - 1)))
    return "\n".join(f"| {line} |" for line in lines)


def write_card(model_folder: Path, metrics: dict[str, Any]) -> None:
    """Write README.md beside the weights."""
    sources = [["kind", "package", "licence", "bytes"]]
    for source in metrics["data"]["sources"]:
        names = [source[key] for key in ("kind", "package", "licence")]
        sources.append([*names, f"{source['bytes']:,}"])
    routing = (
        f"{title}:\n\n{format_table(tabulate_layers(metrics, name))}"
        for name, title in TABLES.items()
    )
    card = CARD.format(
        **metrics["training"],
        sequence=SEQUENCE,
        sources=format_table(sources),
        loss=format_table(tabulate_loss(metrics)),
        routing="\n\n".join(routing),
    )
    (model_folder / "README.md").write_text(card, encoding="utf-8")
