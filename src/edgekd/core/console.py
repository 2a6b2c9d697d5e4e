"""Console output of process 0: results of commands go to stdout, everything else to stderr."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import sys
from collections import Counter
from pathlib import Path

from rich.console import Console

from edgekd.core.readers import printable


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Ignore a closed pipe (`| head -1`), so that the work is not lost."""
        self.quiet = True
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


# Without emoji, since suite names such as vocab:new: contain colons.
out = _Console(highlight=False, soft_wrap=True, emoji=False)
err = _Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)


def open_streams() -> None:
    """Reopen closed standard streams (`>&-`), and let all streams accept any character."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            try:
                os.fstat(number)
            except OSError:
                os.open(os.devnull, os.O_RDWR)  # uses the lowest free descriptor
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def clean(text: str) -> str:
    """Return text without control characters other than line breaks."""
    return "\n".join(printable(line) for line in text.split("\n"))


def shell_word(path: Path | str) -> str:
    """Return a path quoted for a shell command, in a form that cannot be read as an option."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


_rank = 0


def set_rank(rank: int) -> None:
    """Set the rank of this process in a launch; called only by `edgekd.distill.launch`."""
    global _rank
    _rank = rank


def is_main_process() -> bool:
    """Return whether this is the only process, or rank 0 of several."""
    return _rank == 0


def say(text: str) -> None:
    """Print a progress message."""
    if is_main_process():
        err.print(clean(text), markup=False)


def warn(text: str) -> None:
    """Print a warning."""
    if is_main_process():
        err.print(f"warning: {clean(text)}", style="yellow", markup=False)


class Tally:
    """Counts of skipped items by reason, with an example of each."""

    def __init__(self) -> None:
        self.reasons: Counter[str] = Counter()
        self.examples: dict[str, str] = {}

    def add(self, reason: str, example: str) -> None:
        """Count an item."""
        self.reasons[reason] += 1
        self.examples.setdefault(reason, example)

    def __str__(self) -> str:
        return ", ".join(f"{count} × {reason}" for reason, count in self.reasons.most_common(3))

    def warn(self, what: str) -> None:
        """Print a warning with all counts in one line that starts with `what`, if there are any."""
        if self.reasons:
            parts = [
                f"{count} × {reason} (for example {self.examples[reason]})"
                for reason, count in self.reasons.most_common()
            ]
            warn(f"{what}: " + "; ".join(parts) + ".")


def result(*lines: str) -> None:
    """Print the result of a command, such as the output path and the next command."""
    if is_main_process():
        for line in lines:
            out.print(clean(line), markup=False)
        out.file.flush()
