"""``saetrain explore`` as a command: its address, Ctrl-C, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
import signal
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from saetrain.cli import main
from tests.processes import ForkedCommand, finish
from tests.unit.explore.prompt_models import write_random_saes


@pytest.fixture
def run(tmp_path: Path, tiny_gpt2: str) -> Path:
    write_random_saes(tmp_path / "run", tiny_gpt2, ["h.1"], causal=True)
    return tmp_path / "run"


def test_the_command_serves_until_ctrl_c(run: Path) -> None:
    process = ForkedCommand(["explore", str(run), "--port", "0", "--device", "cpu"])
    url = process.wait_for_match(r"^http://127\.0\.0\.1:\d+/[\w-]{30,}/$")[0]
    with urllib.request.urlopen(url, timeout=20) as answer:
        assert b"saetrain report" in answer.read()
    body = json.dumps({"text": "The while statement", "sae": "h.1"}).encode()
    request = urllib.request.Request(f"{url}api/encode", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert len(json.load(answer)["tokens"]) > 3
    process.send_signal(signal.SIGINT)
    output = finish(process, 0, timeout_s=30)
    assert output.count(url) == 1
    assert "Traceback" not in output
    # Nothing was written into the run.
    assert {path.name for path in run.iterdir()} == {"sae"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{run}/nothing"], "there is no such folder; pass the directory of a run"),
        (["{run}/sae/h.1"], "contains no folder sae/; pass the directory of a finished run"),
        (["{run}", "--port", "70000"], "--port 70000: must be at most 65535"),
        (["{run}", "--port", "-1"], "--port -1: must be at least 0"),
        (["{run}", "--port", "{taken}"], "--port {taken}: Address already in use; choose another port, or 0 for any"),
        (["{run}", "--model", "{run}/nothing"], "nothing"),
        (["{run}", "--device", "tpu"], "--device tpu: "),
        (["{run}", "--share", "true"], "--share: no such flag"),
    ],
)
def test_mistakes_are_one_line(run: Path, capfd: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    from saetrain.explore.server import open_socket

    with open_socket(0) as opened:
        taken = str(opened.getsockname()[1])
        with pytest.raises(SystemExit) as stop:
            main(["explore", *(word.format(run=run, taken=taken) for word in words)])
    assert stop.value.code == 2
    out, err = capfd.readouterr()
    assert err.splitlines()[-1].startswith("saetrain: error: ")
    assert message.format(taken=taken) in err
    assert out == ""


def test_another_model_is_refused(run: Path, tmp_path: Path, tiny_bert: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["explore", str(run), "--model", tiny_bert, "--port", "0"])
    assert "its hookpoint" in capfd.readouterr().err


@pytest.mark.parametrize("package", ["starlette", "uvicorn"])
def test_a_missing_package_is_named(
    run: Path, package: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    find_spec = importlib.util.find_spec

    def find_none(name: str, *rest: Any) -> Any:
        return None if name == package else find_spec(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", find_none)
    with pytest.raises(SystemExit) as stop:
        main(["explore", str(run)])
    assert stop.value.code == 2
    found = f"explore: the package {package} is not installed; run pip install 'saetrain[explore]'"
    assert capfd.readouterr().err.splitlines() == [f"saetrain: error: {found}"]
