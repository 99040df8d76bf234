"""The engine over every family: it serves the plain model's tokens, or refuses."""

from __future__ import annotations

import copy
import os

import pytest
import torch

from equipoise import EPLBConfig, parallelize
from equipoise.engine.engine import Engine, EngineLimits
from equipoise.engine.requests import Request, SamplingParams
from equipoise.errors import ModelError
from tests.models.tiny import VOCABULARY, Family, list_families, make_tiny
from tests.test_models import make_lone_group

ALL = bool(os.environ.get("EQUIPOISE_ALL_FAMILIES"))
CONFIG = EPLBConfig(communicator="torch_gloo", use_async=False)
SERVED = ("deepseek_v3", "gpt_oss")
"""Of other attention than the families of the engine's own tests: keys and values of different
sizes; sinks, by eager attention, with windows in every other layer."""


FAMILIES = [family for family in list_families() if ALL or family.folder in SERVED]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.experts)
def test_tokens_are_the_plain_models_or_it_is_refused(family: Family) -> None:
    plain = make_tiny(family)
    parallel = parallelize(copy.deepcopy(plain), make_lone_group(), CONFIG)
    limits = EngineLimits(3, 48, prefill_chunk=7, end_tokens=frozenset())
    try:
        engine = Engine(parallel, limits)
    except ModelError:
        assert family.folder not in SERVED
        return
    random = torch.Generator().manual_seed(1)
    requests = []
    for number, length in enumerate((3, 3, 5, 1, 17, 9)):
        tokens = torch.randint(3, VOCABULARY, (length,), generator=random).tolist()
        requests.append(Request(str(number), tuple(tokens), SamplingParams(max_new_tokens=8)))
    engine.submit(*requests)
    while engine.has_work:
        engine.step()
    for request in requests:
        tokens = torch.tensor([[*request.tokens, *request.generated[:-1]]])
        with torch.inference_mode():
            logits = plain(input_ids=tokens, use_cache=False).logits[0, -8:]
        assert logits.argmax(1).tolist() == request.generated
