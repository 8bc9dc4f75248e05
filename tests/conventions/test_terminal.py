"""Text reaches the terminal through few functions, which escape what a terminal would act on."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import saetrain

ROOT = Path(saetrain.__file__).parent
WRITERS = {"print", "tqdm.write", "sys.stdout.write", "sys.stderr.write", "console.input", "traceback.print_exc"}
ESCAPING = {"escape_text", "format_error"}
WITH_A_TRACEBACK = {"process_group.py"}
"""Files that may print the traceback of an error that only we can cause."""


def find_raw_output(source: str, name: str) -> Iterator[str]:
    """Yield the calls in ``source`` that write text to the terminal which is neither constant nor escaped."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        function = ast.unparse(node.func)
        if function == "traceback.print_exc" and name in WITH_A_TRACEBACK:
            continue
        for text in node.args if function in WRITERS else ():
            is_constant = isinstance(text, ast.Constant) or (isinstance(text, ast.Name) and text.id.isupper())
            is_escaped = isinstance(text, ast.Call) and ast.unparse(text.func) in ESCAPING
            if not is_constant and not is_escaped:
                yield f"{name}:{node.lineno}: {ast.unparse(node)[:80]}"
        if function == "traceback.print_exc" or function.split(".")[-1] == "Console":
            yield f"{name}:{node.lineno}: {function}"


def test_all_text_for_the_terminal_is_escaped() -> None:
    assert not [found for path in sorted(ROOT.rglob("*.py")) for found in find_raw_output(path.read_text(), path.name)]


def test_raw_output_is_found() -> None:
    raw = 'print(f"{name}")\nprint(error, file=sys.stderr)\ntqdm.write(text)\nConsole()\ntraceback.print_exc()\n'
    assert len(list(find_raw_output(raw, "x.py"))) == 5
    assert not list(find_raw_output('print("text")\nprint(HELP)\nprint(escape_text(name))\nEscapingConsole()', "x.py"))
