"""What a user sees in a terminal of 80 columns is the recording in the docs, with other figures.

``UPDATE_RECORDING=1 pytest tests/integration/test_terminal.py`` writes the recording again.
"""

from __future__ import annotations

import fcntl
import os
import pty
import re
import shutil
import struct
import sys
import termios
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.conftest import save_tiny_mlm

COLUMNS = 80
RECORDING = Path(__file__).parents[2] / "docs" / "terminal.txt"
COMMAND = (
    "saetrain model texts.jsonl --layers 1-2 --k 8 --num_latents 256 --max_tokens 20000 --batch_size 4 --ctx_len 64 "
    "--lr auto --buffer_tokens 4096 --eval_tokens 3000 --run_name first --kernels torch --compute_dtype float32 "
    "--device cpu"
)


def run_in_terminal(command: str, folder: Path) -> tuple[str, int]:
    """Return (everything that the command writes to a terminal, its exit code)."""
    pid, descriptor = pty.fork()
    if pid == 0:
        os.chdir(folder)
        os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        os.environ.pop("COLUMNS", None)
        # The size must be known before the command asks for it.
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
        os.execv(sys.executable, [sys.executable, "-m", *command.split()])
    out = b""
    while True:
        try:
            part = os.read(descriptor, 65536)
        except OSError:  # Linux reports the end of a terminal so.
            break
        if not part:
            break
        out += part
    return out.decode(), os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def render_screen(raw: str) -> str:
    """Return the lines that stay on the screen, without colours and without bars that have disappeared."""
    plain = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", raw).replace("\r\n", "\n")
    kept = [line.split("\r")[-1].rstrip() for line in plain.split("\n")]
    return "".join(line + "\n" for line in kept if line)


def mask_figures(text: str) -> str:
    """Replace numbers and bars, and the spaces that align them."""
    text = re.sub(r"[█▏▎▍▌▋▊▉]+", "█", text)
    text = re.sub(r"(fails|not judged) [^;\n]*", r"\1", text)
    return re.sub(r" +", " ", re.sub(r"-?\d[\d.,]*k?", "N", text))


@pytest.mark.skipif(not hasattr(pty, "fork"), reason="needs a pseudo-terminal")
def test_the_recording_is_what_a_terminal_shows(tmp_path: Path, minilm: str, topics_jsonl: str) -> None:
    """With all of MiniLM's tokens, random weights happen to lose enough by an ablation to be scored."""
    save_tiny_mlm(tmp_path / "model", AutoTokenizer.from_pretrained(minilm))
    shutil.copy(topics_jsonl, tmp_path / "texts.jsonl")
    raw, code = run_in_terminal(COMMAND, tmp_path)
    assert code == 0, raw
    lines = re.split(r"[\r\n]+", raw)
    for phase in ("tokenizing", "filling the buffer", "scoring", "fitting the baselines", "assessing", "model loss"):
        assert any(re.match(rf"{phase}\b.*(left|s\])$", line) for line in lines), phase
    steps = [line for line in lines if "tok/s" in line]
    assert steps
    for line in steps:
        assert len(line) < COLUMNS
        assert "FVU" in line
        assert "dead" in line
        assert len(re.findall(r"\S+ (.{10,}?) \d+:\d\d left", line)) == 1, line
    screen = render_screen(raw).replace(str(tmp_path.resolve()), "/home/me")
    table = screen[screen.index("held-out tokens of") :]
    assert len(table.splitlines()) + 10 * 2 <= 60, "12 SAEs, of which each has a row and a line"
    if os.environ.get("UPDATE_RECORDING"):
        RECORDING.write_text(f"$ {COMMAND}\n{screen}")
    assert mask_figures(RECORDING.read_text()) == mask_figures(f"$ {COMMAND}\n{screen}")
