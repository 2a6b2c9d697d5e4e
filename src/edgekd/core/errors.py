"""What can go wrong through no fault of edgekd: one sentence, one hint, exit code 2 (1 for a failed gate)."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Collection, Iterable
from typing import Any


class EdgekdError(Exception):
    """A mistake or a circumstance the user can mend: what happened and what to do, one sentence each.

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
    """An artifact is sound, but its runtime does not exist on this machine."""


def optional(module: str, extra: str, what: str) -> Any:
    """Return a module of an extra of edgekd; it is `NotHere` that `what` needs it where it does not load."""
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:
        raise NotHere(
            f"{what} needs {module}, which cannot be loaded here ({first_line(error)}).",
            f'Install it: pip install "edgekd[{extra}]".',
        ) from error


class GateFailed(EdgekdError):
    """A parity or accuracy gate failed: everything ran, the result is not good enough."""

    exit_code = 1


_GO_ON = "A training run goes on with --resume, a study with the same command."


class Stopped(KeyboardInterrupt):
    """A signal ended the command. Not an `EdgekdError`: what goes on after a mistake does not go on after a signal.

    `number` is SIGINT or SIGTERM.
    """

    def __init__(self, number: int, message: str = "Stopped.", hint: str = _GO_ON) -> None:
        super().__init__(number, message, hint)
        self.message = message
        self.hint = hint
        self.exit_code = 128 + number
        """As shells count it: 130 or 143."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `Did you mean "x"?` for the closest known word, else the list of them all (at most 12)."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if close:
        return f'Did you mean "{close[0]}"?'
    return "Known: " + ", ".join(names[:12]) + (", …" if len(names) > 12 else "") + "."


def check_known(word: str, known: Collection[str], message: str, more: str = "") -> None:
    """Raise an `EdgekdError` with the closest known word as its hint, and `more` behind it, for an unknown `word`."""
    if word not in known:
        raise EdgekdError(message, did_you_mean(word, known) + more)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text (at most 200 characters, no full stop), or its type."""
    lines = str(error).strip().splitlines()
    return (lines[0].strip() if lines else type(error).__name__).rstrip(".")[:200]
