"""A client that costs little: reads many streams at once, and counts their tokens.

    python -m equipoise.server.streams HOST PORT

For each line of JSON that it reads, {"streams": N, "body": {...}}, it asks for N streams and
answers with a line, {"seconds": s, "tokens": n}. It imports nothing but the standard library, so
that a measurement is of the server.
"""

from __future__ import annotations

import json
import re
import selectors
import socket
import sys
import time
from typing import Any

DEADLINE_S = 300.0
_TOKENS = re.compile(rb'"completion_tokens":(\d+)')
_END = b"data: [DONE]\n\n"
_TAIL = 1024


def read_streams(host: str, port: int, num_streams: int, body: dict[str, Any]) -> tuple[float, int]:
    """Ask for the same completion so many times at once, and read all answers to their end.

    Args:
        host: of the server.
        port: of the server.
        num_streams: at once.
        body: of each request; streaming and usage are added.
    Returns:
        Seconds from the first request to the last token, and tokens of all.
    Collective: none.
    Raises: OSError; ValueError if an answer is not whole; TimeoutError.
    """
    asked = json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}})
    request = (
        f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(asked)}\r\n\r\n{asked}"
    ).encode()
    selector = selectors.DefaultSelector()
    tails: dict[socket.socket, bytes] = {}
    try:
        for _ in range(num_streams):
            connection = socket.create_connection((host, port), timeout=DEADLINE_S)
            tails[connection] = b""
            selector.register(connection, selectors.EVENT_READ)
        began_s = time.monotonic()
        for connection in tails:
            connection.sendall(request)
        num_tokens, num_open = 0, num_streams
        while num_open:
            ready = selector.select(began_s + DEADLINE_S - time.monotonic())
            if not ready:
                raise TimeoutError(f"{num_open} streams did not end within {DEADLINE_S:g} s")
            for key, _ in ready:
                connection = key.fileobj  # type: ignore[assignment]
                data = connection.recv(65536)
                tails[connection] = (tails[connection] + data)[-_TAIL:]
                if _END in tails[connection]:
                    num_tokens += int(_TOKENS.findall(tails[connection])[-1])
                elif data:
                    continue
                else:
                    raise ValueError(f"a stream ended early: {tails[connection][-200:]!r}")
                selector.unregister(connection)
                num_open -= 1
        return time.monotonic() - began_s, num_tokens
    finally:
        for connection in tails:
            connection.close()
        selector.close()


def main() -> None:
    """Answer line by line."""
    host, port = sys.argv[1], int(sys.argv[2])
    for line in sys.stdin:
        asked = json.loads(line)
        seconds, tokens = read_streams(host, port, asked["streams"], asked["body"])
        sys.stdout.write(json.dumps({"seconds": seconds, "tokens": tokens}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
