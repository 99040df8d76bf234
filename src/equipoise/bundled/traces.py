"""A real load trace, to replay without having one; its origin is in traces/README.md."""

from __future__ import annotations

from pathlib import Path


def gptoss_routes() -> Path:
    """Routes of gpt-oss-20b: 35,258 tokens, 12 layers, 32 experts, top-4, three domains."""
    return Path(__file__).parent / "traces" / "gptoss20b.npz"
