"""Checkpoints of small models, as transformers writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.models.tiny import Family, list_families, make_tiny


def find_family(experts: str) -> Family:
    return next(family for family in list_families() if family.experts == experts)


def save(experts: str, directory: Path, **options: Any) -> Any:
    from transformers.utils import logging

    logging.disable_progress_bar()
    plain = make_tiny(find_family(experts))
    plain.save_pretrained(directory, **options)
    return plain
