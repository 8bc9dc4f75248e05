"""Prose is plain English and function names are verbs with objects; some words of earlier versions are banned."""

from __future__ import annotations

import ast
import io
import itertools
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import saetrain

REPOSITORY = Path(__file__).parents[2]
SOURCES = sorted(Path(saetrain.__file__).parent.rglob("*.py"))
BENCHMARKS = sorted((REPOSITORY / "benchmarks").rglob("*.py"))
OTHER_FILES = [*sorted((REPOSITORY / "scripts").glob("*.*")), *sorted(Path(saetrain.__file__).parent.rglob("*.cpp"))]
OTHER_FILES += [
    REPOSITORY / name for name in ("Makefile", ".ci/run", "pyproject.toml", "constraints.txt", "benchmarks/gpu.sh")
]
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", REPOSITORY / "CHANGELOG.md"]
PAGES += sorted((REPOSITORY / "docs").glob("*.md")) + sorted((REPOSITORY / "benchmarks").glob("*.md"))
BANNED = re.compile(
    r"\b(anew|beside|behind|lies?|lying|stands?|stood|told|tells?|says?|said|saying|goes on|go on|going on|begun"
    r"|mend(s|ed|ing)?|parted|dealt|deals?|wish(es)?|heeds?|hears?|nought|hardly|thereof|whereby"
    r"|nulls|looked at|as they lie|a layer each|mixing buffer|meanwhile)\b",
    re.IGNORECASE,
)
ALLOWED = re.compile(r"`[^`]*`|\"[^\"]*\"|stand-in|standalone|stand(s|ing)? for")
"""Quoted words are names of something, not prose."""
MAX_ONE_WORD_SHARE = 0.10
MAX_README_WORDS, MAX_DOCS_WORDS = 900, 9800


def remarks(text: str) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of each line of comments, docstrings and other strings of a Python file."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(text)):
        # A string of one word is a key.
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            for number, line in enumerate(node.value.splitlines()):
                yield node.lineno + number, line


def banned(lines: Iterator[tuple[int, str]], name: str) -> list[str]:
    """The places of ``lines`` that use a banned word."""
    found = []
    for number, line in lines:
        for word in BANNED.finditer(ALLOWED.sub("", line)):
            found.append(f"{name}:{number}: {word[0]!r} in {line.strip()[:100]}")
    return found


def test_pages_use_plain_words() -> None:
    wrong = []
    for page in PAGES:
        # Fenced blocks are commands and output.
        text = re.sub(
            r"^```.*?^```$", lambda m: "\n" * m[0].count("\n"), page.read_text(), flags=re.DOTALL | re.MULTILINE
        )
        wrong += banned(enumerate(text.splitlines(), 1), str(page.relative_to(REPOSITORY)))
    assert not wrong, "\n".join(wrong)


def test_sources_use_plain_words() -> None:
    wrong = []
    for path in [*SOURCES, *BENCHMARKS]:
        wrong += banned(remarks(path.read_text()), path.name)
    for path in OTHER_FILES:
        wrong += banned(enumerate(path.read_text().splitlines(), 1), path.name)
    assert not wrong, "\n".join(wrong)


def test_banned_words_are_found_in_comments_docstrings_messages_and_f_strings() -> None:
    source = '# anew\ndef f(x):\n    """It lies here."""\n    print("he told", f"{x} stands")\n'
    assert len(banned(remarks(source), "f")) == 4
    assert not banned(remarks("# `says` is quoted\n"), "f")


def test_readme_and_docs_are_short() -> None:
    assert len((REPOSITORY / "README.md").read_text().split()) <= MAX_README_WORDS
    lines = [line for page in (REPOSITORY / "docs").glob("*.md") for line in page.read_text().splitlines()]
    assert sum(len(line.split()) for line in lines if not line.startswith("|")) <= MAX_DOCS_WORDS


def test_help_texts_are_one_line() -> None:
    """The parser keeps the line breaks of a docstring, which breaks lines of --help in mid-sentence."""
    long = []
    for path in SOURCES:
        for cls in ast.walk(ast.parse(path.read_text())):
            if not isinstance(cls, ast.ClassDef) or not cls.name.endswith(("Settings", "Config")):
                continue
            for field, doc in itertools.pairwise(cls.body):
                if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr) and "\n" in ast.unparse(doc):
                    long.append(f"{path.name}: {ast.unparse(field.target)}")
    assert not long, long


PRESCRIBED_BY_TORCH = {"forward", "backward", "step"}


def test_few_function_names_are_one_word() -> None:
    names = [
        node.name
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not node.name.startswith("__")
    ]
    one_word = [name for name in names if "_" not in name.strip("_") and name not in PRESCRIBED_BY_TORCH]
    share = len(one_word) / len(names)
    print(f"one-word function names: {len(one_word)} of {len(names)} ({share:.0%})")
    assert share < MAX_ONE_WORD_SHARE, sorted(set(one_word))
