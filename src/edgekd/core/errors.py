"""Errors for users: one sentence, one hint, and exit code 2 (1 for a failed gate)."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Collection, Iterable
from typing import Any


class EdgekdError(Exception):
    """An error that the user can fix: what happened and what to do, one sentence each.

    The command line prints it without a traceback.
    """

    exit_code = 2

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


class NotHere(EdgekdError):
    """The runtime of a valid artifact is not on this machine."""


def optional(module: str, extra: str, what: str) -> Any:
    """Import a module of an optional extra; raise `NotHere`, with `what` needs it, if it cannot be imported."""
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:
        raise NotHere(
            f"{what} needs {module}, which cannot be imported ({first_line(error)}).",
            f'Install it: pip install "edgekd[{extra}]".',
        ) from error


class GateFailed(EdgekdError):
    """A parity or accuracy gate failed."""

    exit_code = 1


_GO_ON = "Resume a training with --resume, and a study with the same command."


class Stopped(KeyboardInterrupt):
    """A signal stopped the command. It is not an `EdgekdError`, so code that continues after errors stops as well.

    `number` is SIGINT or SIGTERM.
    """

    def __init__(self, number: int, message: str = "Stopped.", hint: str = _GO_ON) -> None:
        super().__init__(number, message, hint)
        self.message = message
        self.hint = hint
        self.exit_code = 128 + number
        """Exit code as in shells: 130 or 143."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `Did you mean "x"?` with the closest known word, else a list of known words (at most 12)."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if close:
        return f'Did you mean "{close[0]}"?'
    return "Known: " + ", ".join(names[:12]) + (", …" if len(names) > 12 else "") + "."


def check_known(word: str, known: Collection[str], message: str, more: str = "") -> None:
    """Raise an `EdgekdError` if `word` is unknown, with the closest known word and `more` as hint."""
    if word not in known:
        raise EdgekdError(message, did_you_mean(word, known) + more)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text (at most 200 characters, no full stop), or its type."""
    lines = str(error).strip().splitlines()
    return (lines[0].strip() if lines else type(error).__name__).rstrip(".")[:200]
