"""The text of single tokens, such that the texts of consecutive tokens can be joined without a separator."""

from __future__ import annotations

from typing import Any

import numpy as np

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def describe_tokens(tokenizer: Any, ids: np.ndarray) -> list[str]:
    """Return the text of each token id as it continues a text, with its leading space if it starts a word.

    A part of a character is shown by its bytes, such as `<0xE2>`.
    """
    backend, anchor = tokenizer.backend_tokenizer, tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
    # A token alone loses its leading space in many tokenizers, so it is decoded after another token.
    (before,) = backend.decode_batch([anchor], skip_special_tokens=False)
    decoded = backend.decode_batch([[*anchor, int(number)] for number in ids], skip_special_tokens=False)
    names = tokenizer.convert_ids_to_tokens(ids.tolist())
    bytes_by_character = _byte_level_alphabet()
    out = []
    for text, name in zip(decoded, names, strict=True):
        text = text[len(before) :] if text.startswith(before) else name
        if (not text or REPLACEMENT in text) and name is not None:
            known = all(character in bytes_by_character for character in name)
            text = "".join(f"<0x{bytes_by_character[character]:02X}>" for character in name) if known else name
        out.append(text if text is not None else "")
    return out


def _byte_level_alphabet() -> dict[str, int]:
    """Return {character: byte} of byte-level BPE (Radford et al. 2019)."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {character: byte for byte, character in bytes_to_unicode().items()}
