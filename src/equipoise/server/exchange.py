"""One request of HTTP and its answer, as the log and the metrics tell it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from starlette.types import Scope

_KEY = "equipoise.exchange"


@dataclass
class Exchange:
    """Owner: the event loop.

    Attributes:
        id: stands in the answer's header too.
        method: of the request.
        path: as it was asked for.
        client: address.
        started_s: by time.monotonic().
        status: of the answer; 0 while there is none.
        is_whole: whether all of the answer was sent.
        num_prompt_tokens: where a prompt was read.
        num_generated_tokens: where tokens were generated.
        first_token_s: seconds from the start to the first.
        finish_reason: why the text ended, or what ended it: `gone`, `late` or `failed`.
        refused: what was said instead of an answer that had begun.
        texts: what the client asked and got, where the log shall have it.
    """

    id: str
    method: str
    path: str
    client: str
    started_s: float = field(default_factory=time.monotonic)
    status: int = 0
    is_whole: bool = False
    num_prompt_tokens: int | None = None
    num_generated_tokens: int | None = None
    first_token_s: float | None = None
    finish_reason: str | None = None
    refused: str | None = None
    texts: dict[str, Any] = field(default_factory=dict)

    def attach(self, scope: Scope) -> None:
        """Put it where endpoints find it."""
        scope[_KEY] = self

    def to_line(self) -> dict[str, Any]:
        """What the log says of it."""
        return {
            "id": self.id,
            "method": self.method,
            "path": self.path,
            "client": self.client,
            "status": self.status,
            "seconds": round(time.monotonic() - self.started_s, 6),
            "prompt_tokens": self.num_prompt_tokens,
            "generated_tokens": self.num_generated_tokens,
            "first_token_s": None if self.first_token_s is None else round(self.first_token_s, 6),
            "finish_reason": self.finish_reason,
            "refused": self.refused,
            **self.texts,
        }


def find_exchange(scope: Scope) -> Exchange:
    """The one that was attached."""
    exchange = scope[_KEY]
    assert isinstance(exchange, Exchange)
    return exchange
