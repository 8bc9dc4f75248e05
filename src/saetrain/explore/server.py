"""The HTTP server of ``saetrain explore``: pages in memory and two calls, on 127.0.0.1, with a token in the address.

A foreign site may make a browser send requests to this machine, so foreign Host and Origin headers are refused, and no
address answers without the token. No path is ever opened as a file.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import secrets
import socket
from collections.abc import Callable, Mapping
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from saetrain.atomic_io import replace_non_finite
from saetrain.errors import SaetrainError, is_out_of_memory
from saetrain.explore.prompt import PromptModel
from saetrain.explore.requests import ChangeRequest, PromptRequest, parse_request
from saetrain.explore.settings import DEFAULT_PORT
from saetrain.logs.console import log_rank0
from saetrain.report.build import build_policy, read_sources
from saetrain.runs.run_dir import REPORT_FILE
from saetrain.untrusted import show_text

HOST = "127.0.0.1"
HOST_NAMES = (HOST, "localhost")
HTTP_PORT = 80
"""Port that browsers leave out of addresses."""
TRIED_PORTS = 20
MAX_BODY_BYTES = 100_000
SHUTDOWN_S = 5
HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
    "x-frame-options": "DENY",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}
"""Headers of each answer."""
NO_CONTENT_POLICY = "default-src 'none'; frame-ancestors 'none'"
"""Content-security policy of answers that are not pages."""


def open_socket(port: int | None) -> socket.socket:
    """Return a socket that listens on ``port`` of this machine, or on the first free one from DEFAULT_PORT.

    Raises SaetrainError if the port is in use or not allowed.
    """
    ports = range(DEFAULT_PORT, DEFAULT_PORT + TRIED_PORTS) if port is None else [port]
    for number in ports:
        opened = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            opened.bind((HOST, number))
            # Two sockets may be bound to a port as long as neither listens.
            opened.listen()
            return opened
        except OSError as error:
            opened.close()
            if error.errno != errno.EADDRINUSE or port is not None:
                raise SaetrainError(f"--port {number}: {error.strerror}; choose another port, or 0 for any") from error
    raise SaetrainError(f"the ports {ports[0]} to {ports[-1]} are in use; pass another one with --port")


class RequestGuard:
    """Refuses requests with a foreign Host or Origin or without the token, and removes the token from the path."""

    def __init__(self, app: ASGIApp, port: int, token: str) -> None:
        self._app, self._token = app, token
        self._hosts = {name if port == HTTP_PORT else f"{name}:{port}" for name in HOST_NAMES}
        self._origins = {f"http://{host}" for host in self._hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on."""
        assert scope["type"] == "http", scope["type"]

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.setdefault("content-security-policy", NO_CONTENT_POLICY)
                headers.update(HEADERS)
            await send(message)

        refusal = self._refuse_request(scope)
        if refusal is not None:
            await refusal(scope, receive, send_with_headers)
            return
        path = "/" + scope["path"].removeprefix("/").partition("/")[2]
        await self._app({**scope, "path": path}, receive, send_with_headers)

    def _refuse_request(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        hosts, origins = headers.getlist("host"), headers.getlist("origin")
        if len(hosts) != 1 or hosts[0].lower() not in self._hosts or not {*origins} <= self._origins:
            return PlainTextResponse("refused: foreign Host or Origin", 403)
        token, slash, _ = scope["path"].removeprefix("/").partition("/")
        if not secrets.compare_digest(token.encode("utf-8", "replace"), self._token.encode()):
            return PlainTextResponse("not found", 404)
        # Addresses in the page are relative to the folder.
        return None if slash else RedirectResponse(f"/{self._token}/")


class PageServer:
    """Serves the pages of a run, {address relative to the run directory: page}, and the answers of ``model``."""

    def __init__(self, pages: Mapping[str, str], model: PromptModel, opened: socket.socket) -> None:
        self._socket, port, token = opened, opened.getsockname()[1], secrets.token_urlsafe(24)
        self.url = f"http://{HOST}:{port}/{token}/"
        routes = [_route_page(f"/{'' if href == REPORT_FILE else href}", page) for href, page in pages.items()]
        routes += [
            _route_call("/api/encode", PromptRequest, model.encode_prompt),
            _route_call("/api/change", ChangeRequest, model.measure_change),
        ]
        app = RequestGuard(Starlette(routes=routes), port, token)
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                http="h11",
                ws="none",
                loop="asyncio",
                lifespan="off",
                # An access log would contain the token.
                access_log=False,
                proxy_headers=False,
                log_config=None,
                server_header=False,
                timeout_graceful_shutdown=SHUTDOWN_S,
            )
        )

    def serve_requests(self) -> None:
        """Answer requests until Ctrl-C or :meth:`stop_serving`."""
        logger = logging.getLogger("uvicorn.error")
        logger.setLevel(logging.ERROR)
        logger.handlers, logger.propagate = [_EscapingHandler()], False
        with contextlib.suppress(KeyboardInterrupt):
            self._server.run(sockets=[self._socket])

    def stop_serving(self) -> None:
        """Make :meth:`serve_requests` return."""
        self._server.should_exit = True


class _EscapingHandler(logging.Handler):
    """Logs the server's errors, which are errors of ours, as lines without control characters."""

    def emit(self, record: logging.LogRecord) -> None:
        """Log a record with its traceback."""
        for line in self.format(record).splitlines():
            log_rank0(line)


def _route_page(path: str, page: str) -> Route:
    policy = build_policy(*read_sources(is_served=True), is_served=True)
    headers, body = {"content-security-policy": f"{policy}; frame-ancestors 'none'"}, page.encode()

    async def send_page(request: Request) -> Response:
        return HTMLResponse(body, headers=headers)

    return Route(path, send_page)


def _route_call(path: str, schema: type[PromptRequest], answer: Callable[[Any], dict[str, Any]]) -> Route:
    """Return the route of a call: a JSON object for ``answer``, whose errors by the user become one line."""

    async def send_answer(request: Request) -> Response:
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            return _send_error("the content type must be application/json", 415)
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > MAX_BODY_BYTES:
                return _send_error(f"the text is too long: a request has at most {MAX_BODY_BYTES:,} bytes", 413)
        try:
            found = await run_in_threadpool(lambda: answer(parse_request(body, schema)))
        except SaetrainError as error:
            return _send_error(str(error), 400)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return _send_error("out of memory; shorten the text", 400)
        return JSONResponse(replace_non_finite(found))

    return Route(path, send_answer, methods=["POST"])


def _send_error(message: str, status: int) -> Response:
    return JSONResponse({"error": show_text(message)}, status)
