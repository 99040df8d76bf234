"""A service under a constant stream of requests: what benchmarks of its ranks have in common."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Literal

from equipoise.bench.random_model import write_random_model
from equipoise.bench.request_stream import RequestStream
from equipoise.bundled import model_directory
from equipoise.elastic.controller import Controller
from equipoise.elastic.spec import ServiceSpec
from equipoise.launch.processes import LocalLauncher

WAIT_S = 120.0


@contextmanager
def take_model(
    model: Path | None,
    size_gb: float | None,
    seed: int,
    say: Callable[[str], None],
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> Iterator[Path]:
    """The directory of the checkpoint to serve.

    Args:
        model: given; None for the bundled one.
        size_gb: of experts, to make one of random weights instead, for as long as it is needed.
        seed: of those.
        say: told that it is written.
        dtype: of random weights.
    """
    if size_gb is None:
        yield model or model_directory()
        return
    with tempfile.TemporaryDirectory(prefix="equipoise-model-") as directory:
        say(f"writing a model of {size_gb:g} GB")
        write_random_model(Path(directory), size_gb * 1e9, seed, dtype=dtype)
        yield Path(directory)


@contextmanager
def serve_stream(
    spec: ServiceSpec, num_in_flight: int, num_new_tokens: int, seed: int
) -> Iterator[tuple[Controller, RequestStream]]:
    """Ranks of this machine that serve, and requests that have not begun; ranks end with it.

    Args:
        spec: of the service.
        num_in_flight: requests at any time.
        num_new_tokens: of each.
        seed: of the prompts.
    Collective: none; starts those who meet.
    Raises: MembershipError if they do not come to serve.
    """
    controller = Controller(spec, LocalLauncher(spec.device, spec.model))
    controller.start()
    try:
        encode = make_encoder(spec.model)
        yield controller, RequestStream(controller, encode, num_in_flight, num_new_tokens, seed)
    finally:
        controller.close()


def make_encoder(model: Path) -> Callable[[str], list[int]]:
    """What makes a text the model's tokens, without special ones."""
    from equipoise.models.loading import load_tokenizer

    tokenizer = load_tokenizer(model)
    return partial(_encode, tokenizer)


def _encode(tokenizer: Callable[..., dict[str, list[int]]], text: str) -> list[int]:
    return list(tokenizer(text, verbose=False, add_special_tokens=False)["input_ids"])
