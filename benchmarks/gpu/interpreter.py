"""Triton's interpreter, which runs the kernels where there is no GPU, at more than twice its speed."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any


def patch_language_once() -> None:
    """Let the interpreter patch Triton's language once per process instead of at every call of a function.

    The process cannot compile kernels afterwards.
    """
    from triton.runtime import interpreter

    patch: Callable[[Any], Any] = interpreter._patch_lang
    patched: set[ModuleType] = set()

    @cache
    def find_languages(function: Any) -> set[ModuleType]:
        languages = (interpreter.tl, interpreter.tl.core)
        return {each for each in languages if any(each is value for value in function.__globals__.values())}

    def patch_new_languages(function: Any) -> Any:
        if not find_languages(function) <= patched:
            patch(function)
            patched.update(find_languages(function))
        # What is restored after a launch: nothing.
        return interpreter._LangPatchScope()

    if patch.__name__ != patch_new_languages.__name__:
        interpreter._patch_lang = patch_new_languages
