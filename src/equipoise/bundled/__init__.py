"""What the package carries to run without a network: a small model and held-out text."""

from __future__ import annotations

from pathlib import Path

from equipoise.bundled.texts import KINDS, excerpts, read_kind

__all__ = ["KINDS", "excerpts", "model_directory", "read_kind"]


def model_directory() -> Path:
    """Directory of the bundled model, in Hugging Face format."""
    return Path(__file__).parent / "model"
