"""What a job is asked to do; the same on every rank."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from equipoise.config import EPLBConfig
from equipoise.errors import ConfigError

DType = Literal["float32", "bfloat16", "float16"]
Dispatch = Literal["torch", "nixl_ep"]


@dataclass(frozen=True)
class Prompt:
    """One text to be continued.

    Attributes:
        kind: of text, for the per-kind figures.
        text: what the tokenizer gets.
    """

    kind: str
    text: str


@dataclass(frozen=True)
class JobSpec:
    """A job of the reference engine.

    Attributes:
        model: a Hugging Face checkpoint directory.
        prompts: served in this order; prompt i belongs to rank i mod R.
        held_out: texts to score the loss on, before and after.
        num_ranks: R.
        config: balancing.
        dtype: of the weights.
        device: "cpu" or "cuda".
        dispatch: what tokens travel by; "nixl_ep" on CUDA and in bfloat16 alone.
        max_new_tokens: per prompt; fewer where the model ends it.
        max_batch_size: sequences in flight per rank.
        max_steps: per pass, None for until all prompts are done.
        check: compare with the plain model at the end.
        seed: of whatever is random.
        timeout_s: longest wait for another rank.
    """

    model: Path
    prompts: tuple[Prompt, ...]
    held_out: tuple[Prompt, ...]
    num_ranks: int
    config: EPLBConfig
    dtype: DType = "float32"
    device: Literal["cpu", "cuda"] = "cpu"
    dispatch: Dispatch = "torch"
    max_new_tokens: int = 32
    max_batch_size: int = 8
    max_steps: int | None = None
    check: bool = True
    seed: int = 0
    timeout_s: float = 60.0


def check_dispatch(dispatch: str, device: str, dtype: str) -> None:
    """Refuse what a dispatcher cannot do, before a rank starts.

    Collective: none.
    Raises: ConfigError.
    """
    if dispatch != "nixl_ep":
        return
    if device == "cpu":
        raise ConfigError("--dispatch nixl_ep sends tokens between GPUs: add --device cuda")
    if dtype != "bfloat16":
        raise ConfigError(f"--dispatch nixl_ep carries bfloat16, not {dtype}: add --dtype bfloat16")
