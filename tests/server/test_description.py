"""The server against its own description: whatever is sent, no failure and no open door."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import hypothesis.strategies as st
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from equipoise.server.app import ACCESS
from equipoise.server.gate import Access
from equipoise.server.settings import ServerLimits
from tests.server.serving import KEYS, Running, make_spec, serve

NUM_REQUESTS = int(os.environ.get("SERVER_REQUESTS", "120"))
CHECKS: list[Any] = [
    not_a_server_error,
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
]


@pytest.fixture(scope="module")
def target() -> Iterator[Running]:
    """Whose answers are short, so that many can be asked for."""
    limits = ServerLimits(request_timeout_s=30.0)
    with serve(make_spec(max_len=24), keys=KEYS, limits=limits) as server:
        yield server


def test_it_describes_every_endpoint(target: Running) -> None:
    with target.http(KEYS.api) as client:
        document = client.get("/openapi.json").json()
    # Of itself it says nothing; the entry that ends with a slash has a name behind it.
    described = {path.partition("{")[0] for path in document["paths"]}
    assert described == set(ACCESS) - {"/openapi.json"}
    for path in document["paths"].values():
        for operation in path.values():
            assert {"200", "400", "401", "503"} <= operation["responses"].keys()
            assert "422" not in operation["responses"]


@pytest.mark.timeout(max(120, NUM_REQUESTS // 5))
def test_whatever_is_sent_it_answers_as_described(target: Running) -> None:
    with target.http(KEYS.api) as client:
        document = client.get("/openapi.json").json()
    schema = schemathesis.openapi.from_dict(document)
    operations = [result.ok() for result in schema.get_all_operations()]
    kinds = [
        operation.as_strategy(generation_mode=mode)
        for operation in operations
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
        if mode is GenerationMode.POSITIVE or operation.body or operation.path_parameters
    ]
    session = requests.Session()
    seen: list[tuple[str, int]] = []

    @settings(
        max_examples=NUM_REQUESTS,
        database=None,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=st.one_of(kinds), shows_key=st.booleans())
    def send(case: Any, shows_key: bool) -> None:
        headers = {"authorization": f"Bearer {KEYS.api}"} if shows_key else {}
        answer = case.call(base_url=target.url, headers=headers, session=session, timeout=60)
        case.validate_response(answer, checks=CHECKS)
        seen.append((case.path, answer.status_code))
        access = ACCESS.get(case.path, Access.API)
        if access is Access.ADMIN or (access is Access.API and not shows_key):
            assert answer.status_code in (401, 403, 404), case.path

    send()
    assert len(seen) >= NUM_REQUESTS * 0.9
    paths, described = {path for path, _ in seen}, {operation.path for operation in operations}
    # A few of them may miss an endpoint; many do not.
    assert paths <= described
    assert len(paths) >= len(described) - (3 if NUM_REQUESTS < 1000 else 0)
    assert {200, 400, 401, 403} <= {status for _, status in seen}
    assert not [line for line in target.lines() if line["event"] == "failure"]
    service = target.service
    assert service is not None
    assert service.status().ready
