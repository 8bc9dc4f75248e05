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
SCRIPTS = sorted((REPOSITORY / "scripts").glob("*"))
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", REPOSITORY / "CHANGELOG.md"]
PAGES += sorted((REPOSITORY / "docs").glob("*.md")) + sorted((REPOSITORY / "benchmarks").glob("*.md"))
BANNED = re.compile(
    r"\b(anew|beside|behind|lies?|lying|stands?|stood|told|tells?|says?|said|saying|goes on|go on|going on|begun"
    r"|mend(s|ed|ing)?|parted|dealt|deals?|wish(es)?|heeds?|hears?|nought|hardly|thereof|whereby"
    r"|nulls|looked at|as they lie|a layer each|mixing buffer|meanwhile)\b",
    re.IGNORECASE,
)
ALLOWED = re.compile(r"`[^`]*`|\"[^\"]*\"|stand-in|standalone|stand(s|ing)? for|says\.py")
"""Quoted words are names of something, not prose."""
MAX_ONE_WORD_SHARE = 0.15


def remarks(text: str) -> Iterator[tuple[int, str]]:
    """(line, text) of the comments and strings of a source file."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.COMMENT, tokenize.STRING):
            yield token.start[0], token.string


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
    for path in SCRIPTS:
        if path.suffix in (".sh", ".py"):
            wrong += banned(enumerate(path.read_text().splitlines(), 1), path.name)
    assert not wrong, "\n".join(wrong)


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


def test_function_names_are_verbs_with_objects() -> None:
    names = [
        node.name
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not node.name.startswith("__")
    ]
    one_word = [name for name in names if "_" not in name.strip("_")]
    share = len(one_word) / len(names)
    print(f"one-word function names: {len(one_word)} of {len(names)} ({share:.0%})")
    assert share < MAX_ONE_WORD_SHARE, sorted(set(one_word))
