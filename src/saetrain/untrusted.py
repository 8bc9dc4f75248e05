"""Text and names that the program did not write: how messages show them, and which may become paths."""

from __future__ import annotations

import hashlib
import reprlib
import unicodedata

from saetrain.errors import SaetrainError

MAX_SHOWN_CHARS = 200
MAX_MESSAGE_CHARS = 800
MAX_NAME_BYTES, MAX_PATH_BYTES = 255, 4096
"""Limits of Linux and macOS."""
FORBIDDEN_CATEGORIES = {"Cc": "a control character", "Cs": "a byte that is not UTF-8", "Zl": "a line separator"}
FORBIDDEN_CATEGORIES["Zp"] = FORBIDDEN_CATEGORIES["Zl"]
BIDI_CONTROLS = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"

_short_repr = reprlib.Repr()
_short_repr.maxstring = _short_repr.maxother = _short_repr.maxlong = MAX_SHOWN_CHARS // 2


def escape_text(text: str) -> str:
    """Return ``text`` in one line, with characters that a terminal would act on as escapes such as ``\\x1b``."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def show_text(text: object, limit: int = MAX_SHOWN_CHARS) -> str:
    """Return :func:`escape_text` of ``text`` with at most ``limit`` characters; the middle of longer text is cut."""
    # The escape of a character has at most 10 characters.
    whole = str(text)
    shown = escape_text(whole if len(whole) <= 2 * limit else whole[:limit] + whole[-limit:])
    cut = limit // 3
    return shown if len(shown) <= limit and len(whole) <= limit else f"{shown[: limit - cut - 3]} … {shown[-cut:]}"


def format_error(prefix: str, error: BaseException) -> str:
    """Return the line in which a terminal shows ``error``; the middle of a message of more than a screen is cut."""
    return prefix + show_text(error, MAX_MESSAGE_CHARS)


def show_value(value: object) -> str:
    """Return the Python notation of ``value`` in one short line, whatever its size and depth."""
    if isinstance(value, int) and value.bit_length() > 400:
        return f"a number of {value.bit_length()} bits"
    return show_text(_short_repr.repr(value))


def require_plain_text(text: str, label: str) -> str:
    """Return ``text``; raise SaetrainError that names ``label`` if it can't be part of a path or name.

    Control characters and text that is not UTF-8 are refused, and names and paths that are too long for a file system.
    """
    for char in () if text.isprintable() else text:
        found = FORBIDDEN_CATEGORIES.get(unicodedata.category(char))
        if found or char in BIDI_CONTROLS:
            found = found or "a character that changes the direction of text"
            raise SaetrainError(f"{label} {show_text(text)}: contains {found} ({ascii(char)[1:-1]})")
    if len(text.encode()) > MAX_PATH_BYTES or any(len(part.encode()) > MAX_NAME_BYTES for part in text.split("/")):
        raise SaetrainError(
            f"{label} {show_text(text)}: is too long; a path has at most {MAX_PATH_BYTES} bytes, and a name "
            f"{MAX_NAME_BYTES}"
        )
    return text


def shorten_name(name: str, max_bytes: int = MAX_NAME_BYTES) -> str:
    """Return ``name``; if it has more than ``max_bytes``, its beginning and a hash of the whole name."""
    whole = name.encode()
    if len(whole) <= max_bytes:
        return name
    digest = hashlib.sha256(whole).hexdigest()[:16]
    return f"{whole[: max_bytes - len(digest) - 1].decode(errors='ignore')}_{digest}"


def require_file_name(name: str, label: str) -> str:
    """Return ``name``; raise SaetrainError that names ``label`` unless it names an entry of a folder, not a path."""
    if not name or name in (".", "..") or "/" in name or "\\" in name:
        raise SaetrainError(f"{label} {show_value(name)}: must be a plain folder name without '/', and not '.' or '..'")
    return require_plain_text(name, label)
