"""What commands ask of a running server."""

from __future__ import annotations

import http.client
import json
import os
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from equipoise.errors import ConfigError, EquipoiseError
from equipoise.server.settings import ADMIN_KEY, API_KEY, read_key

ANSWER_S = 10.0
SCALE_S = 600


class ServerRefused(EquipoiseError):  # noqa: N818 - says what is the matter
    """The server did not do what was asked for.

    Attributes:
        status: of HTTP; None where no answer came.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class ServerClient:
    """Asks a server by HTTP, one thing at a time. Any thread may call.

    Args:
        url: of the server, like http://127.0.0.1:8000.
        environment: where a key is looked for.
    Raises: ConfigError if it is no address of a server.
    """

    def __init__(self, url: str, environment: Mapping[str, str] = os.environ) -> None:
        self.url = check_url(url)
        self._key = read_key(environment, ADMIN_KEY) or read_key(environment, API_KEY)

    def status(self) -> dict[str, Any]:
        """How the service is, as `ServiceStatus.to_json`.

        Raises: ServerRefused.
        """
        return self._ask("GET", "/status")

    def placement(self) -> dict[str, Any]:
        """Which expert each slot holds.

        Raises: ServerRefused.
        """
        return self._ask("GET", "/placement")

    def rebalance(self) -> dict[str, Any]:
        """Have a rebalance begin at the next occasion.

        Raises: ServerRefused.
        """
        return self._ask("POST", "/rebalance")

    def scale(
        self,
        to: int | None = None,
        remove: Sequence[str] = (),
        *,
        dry_run: bool = False,
        timeout_s: int = SCALE_S,
    ) -> dict[str, Any]:
        """Change the set of ranks, and wait for it.

        Args:
            to: ranks that there shall be.
            remove: names of ranks that shall leave; instead of `to`.
            dry_run: only say what it would do.
            timeout_s: longest that it is waited for; the change goes on beyond it.
        Returns:
            As `ScaleReport.to_json`.
        Raises: ServerRefused.
        """
        body: dict[str, Any] = {"drain_timeout": timeout_s, "dry_run": dry_run}
        if to is not None:
            body["new_data_parallel_size"] = to
        if remove:
            body["remove"] = list(remove)
        report: dict[str, Any] = self._ask("POST", "/scale_elastic_ep", body, timeout_s + ANSWER_S)[
            "report"
        ]
        return report

    def _ask(
        self, method: str, path: str, body: object = None, timeout_s: float = ANSWER_S
    ) -> dict[str, Any]:
        headers = {"content-type": "application/json"}
        if self._key is not None:
            headers["authorization"] = f"Bearer {self._key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(  # noqa: S310 - checked to be http(s)
            self.url + path, data, headers, method=method
        )
        try:
            with _OPENER.open(request, timeout=timeout_s) as answer:
                read: dict[str, Any] = json.load(answer)
                return read
        except urllib.error.HTTPError as error:
            with error:
                raise ServerRefused(f"{self.url}: {_explain(error)}", error.code) from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            said = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
            raise ServerRefused(f"{self.url}: does not answer: {said}") from None
        except ValueError:
            raise ServerRefused(f"{self.url}: is no server of Equipoise: no JSON came") from None


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A key is for the server that it is sent to, not for where that one points."""

    def redirect_request(self, *_args: Any, **_named: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirects)


def check_url(url: str) -> str:
    """An address of a server, without a slash at its end.

    Raises: ConfigError if it is none.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ConfigError(f"{url}: is no address of a server, like http://127.0.0.1:8000")
    return url.rstrip("/")


def _explain(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.load(error)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"answers {error.code} {error.reason}"
