"""What the user sees. Everything goes to stderr but a command's result; only process 0 speaks."""

from __future__ import annotations

import sys
from collections import Counter

from rich.console import Console

# Emoji off: a suite called vocab:new: … is no picture.
out = Console(highlight=False, soft_wrap=True, emoji=False)
err = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)


_rank = 0


def set_rank(rank: int) -> None:
    """Record which of the processes of a launch this is, from 0; only `edgekd.distill.launch` decides that."""
    global _rank
    _rank = rank


def is_main_process() -> bool:
    """Return True in the only process, or in rank 0 of several."""
    return _rank == 0


def say(text: str) -> None:
    """One line of progress."""
    if is_main_process():
        err.print(text, markup=False)


def warn(text: str) -> None:
    """One line the user should read."""
    if is_main_process():
        err.print(f"warning: {text}", style="yellow", markup=False)


def warn_counted(what: str, reasons: Counter[str], examples: dict[str, str]) -> None:
    """`what`, with how many for which reason and one example each; silent when nothing happened."""
    if reasons:
        parts = [
            f"{count} × {reason} (for example {examples[reason]})"
            for reason, count in reasons.most_common()
        ]
        warn(f"{what}: " + "; ".join(parts) + ".")


def result(*lines: str) -> None:
    """The last lines of a command: where the result is, and the next command."""
    if is_main_process():
        for line in lines:
            out.print(line, markup=False)
        sys.stdout.flush()
