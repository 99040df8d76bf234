"""What --device stands for on this machine."""

from __future__ import annotations

from typing import Literal

from equipoise.errors import ConfigError


def find_device(asked: str) -> Literal["cpu", "cuda"]:
    """The kind of device that ranks compute on.

    Args:
        asked: auto, cpu or cuda.
    Collective: none.
    Raises: ConfigError if CUDA devices are asked for and there are none.
    """
    if asked == "cpu":
        return "cpu"
    import torch  # here, so that who asks for the CPU does not wait for it

    if torch.cuda.is_available():
        return "cuda"
    if asked == "cuda":
        raise ConfigError("--device cuda: torch sees no CUDA device here; use --device cpu")
    return "cpu"
