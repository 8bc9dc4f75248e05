"""Suggestions for flags and commands that do not exist: names of other tools, and slips of the keyboard."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import fields

from saetrain.coders import CODERS
from saetrain.errors import SaetrainError, closest_matches
from saetrain.untrusted import show_text

FLAG_SYNONYMS = {
    "lr": ("learning_rate",),
    "save_dir": ("output_dir", "out_dir"),
    "init_seeds": ("seed", "seeds"),
    "max_tokens": ("epochs", "num_train_epochs", "max_steps", "steps", "total_tokens", "training_tokens"),
    "num_latents": ("d_sae", "dict_size", "latents"),
    "ctx_len": ("context_size", "max_length", "max_seq_len", "seq_len"),
    "hookpoints": ("hook_name", "hook_point"),
    "batch_size": ("per_device_train_batch_size", "train_batch_size"),
    "grad_acc_steps": ("gradient_accumulation_steps",),
    "log_to_wandb": ("wandb", "use_wandb", "report_to"),
    "log_to_tensorboard": ("tensorboard",),
    "save_every": ("save_steps",),
    "log_every": ("logging_steps",),
    "dtype": ("bf16", "fp16"),
}
"""{flag: names that other tools give it}."""
DANGEROUS_FLAGS = ("overwrite", "force", "trust_remote_code")
"""Flags that are suggested only for a slip of the keyboard."""
FLAG_SIMILARITY, DANGEROUS_SIMILARITY, COMMAND_SIMILARITY = 0.7, 0.85, 0.75


def describe_unknown_flag(name: str, known: list[str], help_command: str) -> str:
    """Return the error about flag ``name``; ``known``: the flags of the command."""
    owners = [key for key, coder in CODERS.items() if name in {item.name for item in fields(coder.Settings)}]
    # Only training has the settings of an architecture.
    if owners and "num_latents" in known:
        return f"--{name}: a flag of --architecture {', '.join(owners)} only"
    suggested = [flag for flag, names in FLAG_SYNONYMS.items() if name in names and flag in known] or [
        flag
        for flag in closest_matches(name, known, cutoff=FLAG_SIMILARITY)
        if flag not in DANGEROUS_FLAGS or closest_matches(name, [flag], cutoff=DANGEROUS_SIMILARITY)
    ]
    suggestion = f" Did you mean {' or '.join(f'--{flag}' for flag in suggested)}?" if suggested else ""
    return f"--{show_text(name)}: no such flag.{suggestion} '{help_command}' lists all flags"


def require_command_or_model(word: str, commands: Iterable[str]) -> None:
    """Raise SaetrainError if the first word is similar to a command, and neither a command nor a local model."""
    similar = closest_matches(word, commands, n=1, cutoff=COMMAND_SIMILARITY)
    if similar and word not in similar and not os.path.exists(word):
        raise SaetrainError(f"{show_text(word)}: no such command or local model. Did you mean saetrain {similar[0]}?")


def explain_parser_message(printed: str, prog: str) -> str:
    """Return one line instead of the box that the parser of ``prog``'s words printed."""
    # The first line is a heading, and rules or the lines of a box surround the message.
    text = " ".join(re.sub("[╭╮╰╯│─]|-{9,}", " ", printed.partition("\n")[2]).split())
    message = text.partition(" For full helptext")[0]
    missing = re.match(r"Missing from [^:]+: (\S+)", message)
    if missing:
        return f"{missing[1]} is missing ('{prog} --help' shows what the command takes)"
    extra = message.removeprefix("Unrecognized options: ")
    if extra != message and not extra.startswith("-"):
        return f"{extra}: one argument too many ('{prog} --help' shows what the command takes)"
    return f"{message} ('{prog} --help' lists the flags)"
