"""Who is let in."""

from __future__ import annotations

from pathlib import Path

import openai
import pytest

from equipoise.errors import ConfigError
from equipoise.server.app import ACCESS
from equipoise.server.gate import Access
from equipoise.server.settings import ADMIN_KEY, API_KEY, Keys, ServerSettings, read_keys
from tests.server.serving import KEYS, Running

READ = [path for path, access in ACCESS.items() if access is Access.API and path != "/v1/models/"]
CHANGE = [path for path, access in ACCESS.items() if access is Access.ADMIN]
OPEN = [path for path, access in ACCESS.items() if access is Access.OPEN]


def ask(server: Running, path: str, key: str | None) -> int:
    """The status of an answer to something that changes nothing."""
    method = "GET"
    if "completions" in path or "scal" in path:
        method = "POST"
    with server.http(key) as client:
        return int(client.request(method, path).status_code)


def test_every_endpoint_is_of_one_kind() -> None:
    assert CHANGE == ["/scale_elastic_ep", "/rebalance"]
    assert OPEN == ["/health", "/health/live", "/health/ready"]


@pytest.mark.parametrize("key", [None, "wrong", KEYS.api[:-1], KEYS.api + "x"])
def test_without_a_key_only_the_health_is_told(guarded: Running, key: str | None) -> None:
    for path in (*READ, *CHANGE, "/", "/nowhere", "//rebalance"):
        assert ask(guarded, path, key) == 401, path
    for path in OPEN:
        assert ask(guarded, path, key) == 200, path


@pytest.mark.parametrize(
    "header", ["", "Bearer", f"Basic {KEYS.api}", KEYS.api, "Bearer ключ-0123456789"]
)
def test_only_a_bearer_shows_a_key(guarded: Running, header: str) -> None:
    with guarded.http() as client:
        answer = client.get("/status", headers={"authorization": header.encode()})
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")


def test_the_api_key_opens_what_changes_nothing(guarded: Running) -> None:
    for path in READ:
        assert ask(guarded, path, KEYS.api) in (200, 400), path
    for path in CHANGE:
        assert ask(guarded, path, KEYS.api) == 403, path
    assert ask(guarded, "/nowhere", KEYS.api) == 404


def test_the_admin_key_opens_all(guarded: Running) -> None:
    for path in READ:
        assert ask(guarded, path, KEYS.admin) in (200, 400), path
    with guarded.http(KEYS.admin) as client:
        assert client.post("/rebalance").status_code == 200
        assert client.post("/scale_elastic_ep", json={}).status_code == 400


def test_the_public_client_shows_its_key(guarded: Running) -> None:
    assert [model.id for model in guarded.openai(KEYS.api).models.list()] == ["model"]
    with pytest.raises(openai.AuthenticationError):
        guarded.openai("wrong").models.list()


def test_keys_stand_in_no_log_and_no_text(guarded: Running) -> None:
    for key in (KEYS.api, "a-wrong-key-0123456789"):
        with guarded.http(key) as client:
            answer = client.get("/status")
        # Lines are written by a thread, behind the answers.
        guarded.find_line(answer.headers["x-request-id"])
    text = guarded.log_text + repr(ServerSettings(keys=KEYS))
    assert not any(key in text for key in (KEYS.api, KEYS.admin, "a-wrong-key"))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_beyond_this_machine_keys_are_demanded(host: str) -> None:
    with pytest.raises(ConfigError, match=f"--host {host} lets other machines in: set EQ_API_KEY"):
        ServerSettings(host=host)
    assert ServerSettings(host=host, keys=KEYS).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_on_this_machine_they_are_not(host: str) -> None:
    assert ServerSettings(host=host).keys is None


GOOD = {API_KEY: KEYS.api, ADMIN_KEY: KEYS.admin}


def test_keys_come_from_the_environment_or_from_files(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text(KEYS.admin + "\n")
    assert read_keys({}) is None
    assert read_keys(GOOD) == KEYS
    assert read_keys({API_KEY: KEYS.api, f"{ADMIN_KEY}_FILE": str(path)}) == KEYS


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({API_KEY: KEYS.api}, "EQ_ADMIN_KEY is not set: there is one key for the users"),
        ({ADMIN_KEY: KEYS.admin}, "EQ_API_KEY is not set"),
        ({**GOOD, ADMIN_KEY: KEYS.api}, "are the same"),
        ({**GOOD, API_KEY: "short"}, "EQ_API_KEY: a key has at least 16 characters"),
        ({**GOOD, API_KEY: "with a space in it"}, "of printable ASCII characters without spaces"),
        ({**GOOD, API_KEY: ""}, "EQ_API_KEY: a key has at least 16 characters"),
        ({**GOOD, f"{API_KEY}_FILE": "x"}, "EQ_API_KEY and EQ_API_KEY_FILE are both set"),
        ({f"{API_KEY}_FILE": "/nowhere"}, "EQ_API_KEY_FILE /nowhere: cannot be read: No such"),
    ],
)
def test_bad_keys_are_named_and_not_shown(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read_keys(environment)
    assert not any(value in str(caught.value) for value in (KEYS.api, KEYS.admin, "with a"))


def test_keys_do_not_show_themselves() -> None:
    assert KEYS.api not in repr(Keys(KEYS.api, KEYS.admin))
