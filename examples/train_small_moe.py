"""Train the small Mixture-of-Experts model that the package bundles.

Four steps: `prepare` gathers text of four kinds from this machine, `train` trains within a time
budget, `evaluate` measures a model on held-out text, `card` writes the model card. Only `prepare`
needs the package itself; the others need torch, transformers and safetensors alone.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from small_moe_corpus import SOURCES, gather_corpus, read_corpus
from small_moe_metrics import (
    END_ID,
    SEQUENCE,
    list_byte_ids,
    measure_model,
    print_metrics,
    write_card,
)
from transformers import ByT5Tokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.utils import logging

STARTED = time.monotonic()


def configure_model(aux_coefficient: float) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        vocab_size=384,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=32,
        num_experts_per_tok=4,
        moe_intermediate_size=48,
        intermediate_size=192,  # of layers without experts, of which there are none
        decoder_sparse_step=1,
        norm_topk_prob=True,
        router_aux_loss_coef=aux_coefficient,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=END_ID,
    )


class Sampler:
    """Draws batches from text that lies on the device, as many sequences of every kind."""

    def __init__(self, texts: dict[str, bytes], batch: int, device: torch.device) -> None:
        lengths = torch.tensor([len(text) for text in texts.values()])
        kind = torch.arange(batch) % len(texts)
        text = bytearray(b"".join(texts.values()))
        self._text = torch.frombuffer(text, dtype=torch.uint8).to(device)
        self._first = (lengths.cumsum(0) - lengths)[kind].to(device)
        self._room = (lengths - SEQUENCE - 1)[kind].to(device)
        self._within = torch.arange(SEQUENCE + 1, device=device)
        self._ids = list_byte_ids(device)

    def draw(self) -> torch.Tensor:
        offset = (torch.rand(len(self._room), device=self._room.device) * self._room).long()
        return self._ids[self._text[(self._first + offset)[:, None] + self._within].long()]


class MasterWeights:
    """float32 copies that AdamW steps, for a model that computes in bfloat16.

    The model itself is bfloat16, instead of float32 under autocast: grouped matrix products take
    part in no autocast, and what is trained is then exactly what is saved.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = [p for p in model.parameters() if p.requires_grad]
        self._masters = [p.detach().float().clone() for p in self._model]
        for master in self._masters:
            master.grad = torch.zeros_like(master)
        groups = [
            {"params": [m for m in self._masters if m.dim() > 1], "weight_decay": 0.1},
            {"params": [m for m in self._masters if m.dim() == 1], "weight_decay": 0.0},
        ]
        self._adam = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)

    def step(self, rate: float) -> None:
        grads = [master.grad for master in self._masters]
        torch._foreach_copy_(grads, [p.grad for p in self._model])
        torch.nn.utils.clip_grad_norm_(self._masters, 1.0)
        for group in self._adam.param_groups:
            group["lr"] = rate
        self._adam.step()
        with torch.no_grad():
            torch._foreach_copy_(self._model, self._masters)
        for parameter in self._model:
            parameter.grad = None


def measure_balance(router_logits: tuple[torch.Tensor, ...], top_k: int) -> torch.Tensor:
    """Switch Transformer's auxiliary loss, layer by layer; top_k where every layer is flat."""
    losses = []
    for logits in router_logits:
        probabilities = logits.float().softmax(-1)
        chosen = probabilities.detach().topk(top_k, -1).indices
        share = torch.zeros_like(probabilities).scatter_(-1, chosen, 1.0).mean(0)
        losses.append(logits.shape[-1] * (share * probabilities.mean(0)).sum())
    return torch.stack(losses).mean()


def forward(model: Qwen3MoeForCausalLM, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean cross entropy and balance loss."""
    output = model(input_ids=ids[:, :-1], use_cache=False, output_router_logits=True)
    loss = F.cross_entropy(output.logits.flatten(0, 1).float(), ids[:, 1:].flatten())
    return loss, measure_balance(output.router_logits, model.config.num_experts_per_tok)


def try_experts(model: Qwen3MoeForCausalLM, ids: torch.Tensor, name: str) -> tuple[float, float]:
    """Loss and seconds of a forward and backward pass through one experts implementation."""
    model.set_experts_implementation(name)
    for _ in range(3):
        begun = time.monotonic()
        loss, balance = forward(model, ids)
        (loss + balance).backward()
        grads = [p.grad for p in model.parameters()]
        if any(grad is None or not grad.isfinite().all() for grad in grads):
            raise RuntimeError("a gradient is missing or not finite")
        model.zero_grad()
        value, seconds = loss.item(), time.monotonic() - begun
    return value, seconds


def choose_experts(model: Qwen3MoeForCausalLM, ids: torch.Tensor, wanted: str) -> str:
    """Set the first implementation that runs and agrees with the plain one."""
    with torch.no_grad():
        model.set_experts_implementation("eager")
        expected = forward(model, ids)[0].item()
    for name in dict.fromkeys((wanted, "eager", "batched_mm")):
        try:
            loss, seconds = try_experts(model, ids, name)
            if abs(loss - expected) > 0.02:
                raise RuntimeError(f"loss {loss:.4f} differs from {expected:.4f}")
        except (RuntimeError, ValueError, KeyError, ImportError) as error:
            print(f"experts {name}: does not work here: {error}", flush=True)
            model.zero_grad()
            continue
        print(f"experts {name}: loss {loss:.4f}, {seconds * 1000:.0f} ms a pass", flush=True)
        return name
    raise SystemExit("No experts implementation works here")


def save_model(model: Qwen3MoeForCausalLM, out: Path) -> None:
    """Save in bfloat16; a whole model is at `out` at any time."""
    fresh, old = out.with_name(out.name + ".new"), out.with_name(out.name + ".old")
    for folder in (fresh, old):
        shutil.rmtree(folder, ignore_errors=True)
    copy.deepcopy(model).to("cpu", torch.bfloat16).save_pretrained(fresh)
    ByT5Tokenizer().save_pretrained(fresh)
    if out.exists():
        out.rename(old)
    fresh.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def run_steps(
    model: Qwen3MoeForCausalLM, sampler: Sampler, deadline: float, args: argparse.Namespace
) -> dict[str, Any]:
    """Train until the deadline; the learning rate follows the time that has passed."""
    weights = MasterWeights(model)
    begun = reported = time.monotonic()
    steps, halfway = 0, False
    while (now := time.monotonic()) < deadline:
        passed = (now - begun) / (deadline - begun)
        loss, balance = forward(model, sampler.draw())
        (loss + args.aux * balance).backward()
        weights.step(args.lr * min(passed / 0.02 + 0.01, 1.0) * (1.0 - passed))
        steps += 1
        if now - reported > args.report_seconds or steps == 1:
            reported, value = now, loss.item()
            print(
                f"{now - STARTED:6.1f} s  step {steps:5d}  loss {value:.4f} nats  "
                f"balance {balance.item():.3f}",
                flush=True,
            )
            if not math.isfinite(value):
                raise SystemExit("The loss is not finite; try a smaller --lr")
            if passed > 0.5 and not halfway:
                halfway = True
                save_model(model, args.out)
    return {"steps": steps, "seconds": round(time.monotonic() - begun, 1)}


def train(args: argparse.Namespace) -> None:
    device = torch.device("cpu" if args.cpu else "cuda")
    torch.manual_seed(args.seed)
    texts = read_corpus(args.data, "train")
    model = Qwen3MoeForCausalLM(configure_model(args.aux)).to(device)
    if not args.cpu:
        for parameter in model.parameters():  # not buffers: rotations stay in float32
            parameter.data = parameter.data.to(torch.bfloat16)
    count = sum(p.numel() for p in model.parameters())
    print(f"{count:,} parameters, {sum(map(len, texts.values())):,} bytes of text", flush=True)
    sampler = Sampler(texts, args.batch, device)
    experts = choose_experts(model, sampler.draw(), args.experts_implementation)
    model.set_experts_implementation(experts)
    reserve = min(30.0, 0.15 * args.max_seconds)
    result = run_steps(model, sampler, STARTED + args.max_seconds - reserve, args)
    save_model(model, args.out)
    print(f"{result['steps']} steps in {result['seconds']} s; saved {args.out}", flush=True)
    metrics = {
        **measure_model(args.out, args.data, device, args.eval_bytes),
        "training": {
            **result,
            "device": torch.cuda.get_device_name() if not args.cpu else "CPU",
            "batch": args.batch,
            "lr": args.lr,
            "aux": args.aux,
            "seed": args.seed,
            "experts_implementation": experts,
            "max_seconds": args.max_seconds,
        },
        "data": json.loads((args.data / "manifest.json").read_text()),
    }
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    print_metrics(metrics)


def prepare(args: argparse.Namespace) -> None:
    gather_corpus(args.out)


def evaluate(args: argparse.Namespace) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() and not args.cpu else "cpu")
    metrics = measure_model(args.model, args.data, device, args.eval_bytes)
    if args.json:
        print(json.dumps(metrics, indent=1))
    else:
        print_metrics(metrics)


def card(args: argparse.Namespace) -> None:
    write_card(args.model, json.loads(args.metrics.read_text()))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    packages = ", ".join(dict.fromkeys(s.package for s in SOURCES if s.kind != "python"))
    reads = f"Reads Python's standard library and the Debian packages {packages}, and runs groff."
    step = commands.add_parser("prepare", help="gather text of four kinds", description=reads)
    step.add_argument("--out", type=Path, required=True)
    step.set_defaults(run=prepare)

    step = commands.add_parser("train", help="train within a time budget, then evaluate")
    step.add_argument("--data", type=Path, required=True)
    step.add_argument("--out", type=Path, required=True)
    step.add_argument("--max-seconds", type=float, required=True, help="from start to end")
    step.add_argument("--cpu", action="store_true", help="train on the CPU, in float32")
    step.add_argument("--batch", type=int, default=128, help="sequences a step")
    step.add_argument("--lr", type=float, default=2e-3)
    step.add_argument("--aux", type=float, default=0.003, help="weight of the balance loss")
    step.add_argument("--seed", type=int, default=0)
    step.add_argument("--experts-implementation", default="grouped_mm")
    step.add_argument("--report-seconds", type=float, default=5.0)
    step.add_argument("--eval-bytes", type=int, default=200_000, help="held-out bytes a kind")
    step.set_defaults(run=train)

    step = commands.add_parser("evaluate", help="measure a model on held-out text")
    step.add_argument("--model", type=Path, required=True)
    step.add_argument("--data", type=Path, required=True)
    step.add_argument("--cpu", action="store_true")
    step.add_argument("--eval-bytes", type=int, default=200_000, help="held-out bytes a kind")
    step.add_argument("--json", action="store_true", help="print JSON instead of tables")
    step.set_defaults(run=evaluate)

    step = commands.add_parser("card", help="write the model card")
    step.add_argument("--model", type=Path, required=True)
    step.add_argument("--metrics", type=Path, required=True)
    step.set_defaults(run=card)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    logging.disable_progress_bar()
    args.run(args)


if __name__ == "__main__":
    main()
