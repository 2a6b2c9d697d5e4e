"""The end of a command: one-sentence errors, signals, and exit codes."""

from __future__ import annotations

import signal
import sys
import threading
from typing import NoReturn

import typer

from edgekd.core.console import clean
from edgekd.core.errors import EdgekdError, Stopped


def leave(error: EdgekdError | Stopped) -> NoReturn:
    """Print the error, or the signal that stopped the command, with its hint, and exit."""
    hint = f"\nhint:  {error.hint}" if error.hint else ""
    if sys.getfilesystemencoding() != "utf-8" and not error.message.isascii():
        hint += "\nhint: File names are not decoded as UTF-8; set PYTHONUTF8=1 if they should be."
    kind = "error: " if isinstance(error, EdgekdError) else ""
    typer.echo(clean(f"{kind}{error.message}{hint}"), err=True)
    sys.exit(error.exit_code)


def raise_on_sigterm() -> None:
    """Make SIGTERM unwind like Ctrl-C, so that locks and half-written files are removed."""

    def stop(number: int, frame: object) -> None:
        raise Stopped(number)

    if (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGTERM) != signal.SIG_IGN
    ):
        signal.signal(signal.SIGTERM, stop)


def stopped_by(leaving: BaseException) -> Stopped:
    """Return the `Stopped` that ended typer, or one for Ctrl-C."""
    error: BaseException | None = leaving
    while error is not None:
        if isinstance(error, Stopped):
            return error
        error = error.__cause__ or error.__context__
    return Stopped(signal.SIGINT)
