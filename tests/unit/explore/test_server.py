"""The server: what it refuses, the headers of its answers, and its end."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import urlsplit

import pytest

from saetrain.errors import SaetrainError
from saetrain.explore import server as explore_server
from saetrain.explore.prompt import PromptModel
from saetrain.explore.requests import ChangeRequest, PromptRequest
from saetrain.explore.server import HEADERS, MAX_BODY_BYTES, PageServer, open_socket

PAGES = {"report.html": "<p>index ‘é’", "report/000.html": "<p>first"}
JSON = {"content-type": "application/json"}


@dataclass
class StubModel:
    """Answers with what it was asked, or fails."""

    failure: Exception | None = None
    asked: list[Any] = field(default_factory=list)

    def encode_prompt(self, request: PromptRequest) -> dict[str, Any]:
        self.asked.append(request)
        if self.failure is not None:
            raise self.failure
        return {"text": request.text, "value": float("nan")}

    def measure_change(self, request: ChangeRequest) -> dict[str, Any]:
        self.asked.append(request)
        return {"kl": request.scale}


class Client:
    """Sends single requests to a server that runs in a thread."""

    def __init__(self, model: StubModel) -> None:
        self.model = model
        self.server = PageServer(PAGES, cast(PromptModel, model), open_socket(0))
        parts = urlsplit(self.server.url)
        assert parts.hostname == "127.0.0.1"
        self.port, self.path = parts.port, parts.path
        self._thread = threading.Thread(target=self.server.serve_requests)
        self._thread.start()

    def ask(
        self, path: str, body: Any = None, headers: dict[str, str] | None = None, method: str | None = None
    ) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        connection.request(method or ("GET" if body is None else "POST"), path, content, headers or {})
        return connection.getresponse()

    def call(self, name: str, body: Any, **headers: str) -> tuple[int, Any]:
        answer = self.ask(f"{self.path}api/{name}", body, {**JSON, **headers})
        return answer.status, json.loads(answer.read())

    def close(self) -> None:
        self.server.stop_serving()
        self._thread.join(20)
        assert not self._thread.is_alive()


@pytest.fixture
def client() -> Iterator[Client]:
    found = Client(StubModel())
    yield found
    found.close()


def test_pages_are_served_below_the_token(client: Client) -> None:
    for href, path in (("report.html", ""), ("report/000.html", "report/000.html")):
        answer = client.ask(client.path + path)
        assert answer.status == 200
        assert answer.headers["content-type"] == "text/html; charset=utf-8"
        assert answer.read().decode() == PAGES[href]
    without_slash = client.ask(client.path.rstrip("/"))
    assert (without_slash.status, without_slash.headers["location"]) == (307, client.path)
    assert len(client.path) > 30


def test_each_answer_has_the_headers(client: Client) -> None:
    answers = [
        client.ask(client.path),
        client.ask("/"),
        client.ask(client.path + "nothing"),
        client.ask(client.path, headers={"Host": "evil.example"}),
        client.ask(client.path + "api/encode", {}, JSON),
        client.ask(client.path, method="PUT"),
    ]
    assert [answer.status for answer in answers] == [200, 404, 404, 403, 400, 405]
    for answer in answers:
        for name, value in HEADERS.items():
            assert answer.headers[name] == value
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'")
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["server"] is None
    assert "connect-src 'self'" in answers[0].headers["content-security-policy"]


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "127.0.0.1:{port}.evil.example", ""]
)
def test_foreign_hosts_are_refused(client: Client, host: str) -> None:
    headers = {**JSON, "Host": host.format(port=client.port)}
    assert client.ask(client.path, headers=headers).status == 403
    assert client.ask(client.path + "api/encode", {"text": "a", "sae": "b"}, headers).status == 403
    assert not client.model.asked


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "https://127.0.0.1:{port}", "http://127.0.0.1", ""])
def test_foreign_origins_are_refused(client: Client, origin: str) -> None:
    headers = {**JSON, "Origin": origin.format(port=client.port)}
    assert client.ask(client.path, headers=headers).status == 403
    assert client.ask(client.path + "api/encode", {"text": "a", "sae": "b"}, headers).status == 403
    assert not client.model.asked


def test_own_hosts_and_origins_are_answered(client: Client) -> None:
    for host in ("127.0.0.1", "localhost", "LOCALHOST"):
        headers = {"Host": f"{host}:{client.port}", "Origin": f"http://{host.lower()}:{client.port}"}
        assert client.call("encode", {"text": "a", "sae": "b"}, **headers)[0] == 200
    assert len(client.model.asked) == 3


def test_several_hosts_are_refused(client: Client) -> None:
    for hosts in ([], [f"127.0.0.1:{client.port}", "evil.example"]):
        connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=20)
        connection.putrequest("GET", client.path, skip_host=True)
        for host in hosts:
            connection.putheader("Host", host)
        connection.endheaders()
        assert connection.getresponse().status in (400, 403)


@pytest.mark.parametrize("token", ["", "x", "%C3%A9", "%ff", "%00", "..", "{token}x", "x{token}", "{head}"])
def test_other_tokens_find_nothing(client: Client, token: str) -> None:
    own = client.path.strip("/")
    given = token.format(token=own, head=own[:-1])
    for path in (f"/{given}/", f"/{given}", f"/{given}/api/encode", f"/{given}/report/000.html"):
        assert client.ask(path).status == 404
    assert client.ask(f"/{given}/api/encode", {"text": "a", "sae": "b"}, JSON).status == 404
    assert not client.model.asked


@pytest.mark.parametrize(
    "path",
    [
        "config.yaml",
        "report.html",
        "../../etc/passwd",
        "..%2f..%2fetc/passwd",
        "/etc/passwd",
        "%2fetc%2fpasswd",
        "report/",
    ],
)
def test_no_other_file_is_reachable(client: Client, path: str) -> None:
    answer = client.ask(client.path + path)
    assert answer.status == 404
    assert answer.read() == b"Not Found"


def test_calls_are_answered(client: Client) -> None:
    assert client.call("encode", {"text": "é\u202e<b>", "sae": "b"}) == (200, {"text": "é\u202e<b>", "value": None})
    change = {"text": "a", "sae": "b", "latent": 1, "scale": 0.5}
    assert client.call("change", change) == (200, {"kl": 0.5})
    assert client.ask(client.path + "api/encode").status == 405
    assert [type(request) for request in client.model.asked] == [PromptRequest, ChangeRequest]


def test_wrong_calls_have_one_line(client: Client) -> None:
    assert client.call("encode", {"text": "a"}) == (400, {"error": "sae: Field required"})
    client.model.failure = SaetrainError("there is no SAE \x1b[31m" + "x" * 1000)
    status, answer = client.call("encode", {"text": "a", "sae": "b"})
    assert status == 400
    assert answer["error"].startswith("there is no SAE \\x1b[31mxxx")
    assert len(answer["error"]) < 250
    client.model.failure = MemoryError()
    assert client.call("encode", {"text": "a", "sae": "b"}) == (400, {"error": "out of memory; shorten the text"})


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_calls_of_other_content_types_are_refused(client: Client, kind: str) -> None:
    # A foreign page can send these without asking the server first.
    answer = client.ask(client.path + "api/encode", {"text": "a", "sae": "b"}, {"content-type": kind})
    assert answer.status == 415
    assert not client.model.asked


def test_large_calls_are_refused(client: Client) -> None:
    status, answer = client.call("encode", {"text": "x" * MAX_BODY_BYTES, "sae": "b"})
    assert status == 413
    assert answer == {"error": "the text is too long: a request has at most 100,000 bytes"}
    assert not client.model.asked


def test_an_error_of_ours_is_logged_without_the_token(client: Client, capfd: pytest.CaptureFixture[str]) -> None:
    client.model.failure = RuntimeError("a mistake \x1b[31m")
    answer = client.ask(client.path + "api/encode", {"text": "a", "sae": "b"}, JSON)
    assert answer.status == 500
    client.close()
    err = capfd.readouterr().err
    assert "RuntimeError: a mistake \\x1b[31m" in err
    assert client.path.strip("/") not in err


def test_requests_leave_no_log(client: Client, capfd: pytest.CaptureFixture[str]) -> None:
    client.ask(client.path)
    client.ask("/wrong")
    with socket.create_connection(("127.0.0.1", client.port)) as raw:
        raw.sendall(b"nonsense\r\n\r\n")
        assert b"400" in raw.recv(100)
    assert "".join(capfd.readouterr()) == ""


def test_each_server_has_its_own_token(client: Client) -> None:
    other = PageServer(PAGES, cast(PromptModel, StubModel()), open_socket(0))
    assert urlsplit(other.url).path != client.path
    other._socket.close()


def test_port_80_is_not_part_of_the_host() -> None:
    guard = explore_server.RequestGuard(cast(Any, None), 80, "token")
    assert guard._hosts == {"127.0.0.1", "localhost"}
    assert guard._origins == {"http://127.0.0.1", "http://localhost"}


def test_the_next_free_port_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with open_socket(0) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(explore_server, "DEFAULT_PORT", port)
        with open_socket(None) as found:
            assert port < found.getsockname()[1] < port + explore_server.TRIED_PORTS
            assert found.getsockname()[0] == "127.0.0.1"
        with pytest.raises(SaetrainError, match=f"--port {port}: Address already in use; choose another port"):
            open_socket(port)
        monkeypatch.setattr(explore_server, "TRIED_PORTS", 1)
        with pytest.raises(SaetrainError, match=f"the ports {port} to {port} are in use; pass another one with --port"):
            open_socket(None)
