"""What others may reach of a SuperLink: the messages of its SuperNodes, and nothing else.

A SuperLink serves on one port what SuperNodes need (``/v1/fleet/``), what `flwr run` needs (``/v1/control/``: start
runs, that is, code, and register SuperNodes, without a password), and what its own processes need (``/v1/runtime/``).
The gate stands before it with the user's certificate, passes the first on to it and answers everything else with 404.
Bodies are passed on as they come, whatever their size.
"""

from __future__ import annotations

import logging
import re
import ssl
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsplit.engines.embedded import parse_address
from fedsplit.errors import ConnectionFailedError

if TYPE_CHECKING:
    from fedsplit.engines.tls import TlsFiles

log = logging.getLogger("fedsplit")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_ALLOWED = re.compile(rb"/v1/fleet/[a-z][a-z-]*")
# What belongs to one connection and is not passed on to the next.
_OF_THE_CONNECTION = {b"host", b"connection", b"keep-alive", b"transfer-encoding", b"upgrade", b"te", b"trailer"}
_START_S = 10.0


class Gate:
    """Listens at an address in a thread of its own.

    Parameters
    ----------
    address
        ``HOST:PORT`` where SuperNodes come.
    inner_port
        The SuperLink's port on loopback.
    tls
        The user's TLS files; None goes without.
    inner_ca
        CA of the SuperLink's own certificate; None if it goes without TLS.
    """

    def __init__(self, address: str, inner_port: int, *, tls: TlsFiles | None, inner_ca: Path | None) -> None:
        import httpx
        import uvicorn

        host, port = parse_address(address)
        verify: ssl.SSLContext | bool = ssl.create_default_context(cafile=str(inner_ca)) if inner_ca else True
        self._client = httpx.AsyncClient(
            base_url=f"{'https' if inner_ca else 'http'}://127.0.0.1:{inner_port}", verify=verify, timeout=None,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64), trust_env=False,
        )  # fmt: skip
        config = uvicorn.Config(
            self._answer, host=host, port=port, lifespan="off", log_config=None, access_log=False,
            ssl_certfile=str(tls.certificate) if tls else None, ssl_keyfile=str(tls.key) if tls else None,
            interface="asgi3", log_level="critical", proxy_headers=False, server_header=False, date_header=False,
            timeout_graceful_shutdown=2,
        )  # fmt: skip
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, name="gate", daemon=True)
        self._thread.start()
        deadline = time.monotonic() + _START_S
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                raise ConnectionFailedError(f"cannot listen at {address}")
            time.sleep(0.02)

    def close(self) -> None:
        """Stop listening."""
        self._server.should_exit = True
        self._thread.join(5.0)

    async def _answer(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        # The path as it came: what is decoded here could be something else once it is decoded there.
        path = scope.get("raw_path") or scope["path"].encode()
        if scope["method"] != "POST" or not _ALLOWED.fullmatch(path) or scope["query_string"]:
            log.debug("gate: %s %r was turned away", scope["method"], path)
            await _say(send, 404, b"not found")
            return
        await self._pass_on(path.decode(), scope, receive, send)

    async def _pass_on(self, path: str, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        import httpx

        headers = [(name, value) for name, value in scope["headers"] if name not in _OF_THE_CONNECTION]
        request = self._client.build_request("POST", path, headers=headers, content=_body(receive))
        try:
            response = await self._client.send(request, stream=True)
        except httpx.HTTPError as exc:
            log.debug("gate: the SuperLink did not answer: %s", exc)
            await _say(send, 502, b"the SuperLink did not answer")
            return
        try:
            kept = [(name.lower(), value) for name, value in response.headers.raw]
            await send({
                "type": "http.response.start", "status": response.status_code,
                "headers": [(name, value) for name, value in kept if name not in _OF_THE_CONNECTION],
            })  # fmt: skip
            async for chunk in response.aiter_raw():
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            await response.aclose()


async def _body(receive: Receive) -> AsyncIterator[bytes]:
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return
        yield message.get("body", b"")
        if not message.get("more_body"):
            return


async def _say(send: Send, status: int, text: bytes) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": text})
