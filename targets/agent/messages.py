"""The agent's messages: one JSON object per line of standard output."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

from edgekd.core.errors import EdgekdError
from edgekd.core.readers import parse_json, printable

_LONGEST_LINE = 1 << 20
_MOST_OUTPUT = 1 << 26
_KEPT_ERRORS = 1 << 16
_LAST_WORDS_S = 5.0


def emit(**message: Any) -> None:
    """Print one message, or words on a terminal. A closed output is no reason to stop working."""
    with contextlib.suppress(OSError, ValueError):
        if sys.stdout.isatty():
            words = (" ".join(map(str, v)) if isinstance(v, list) else v for v in message.values())
            print(*words, flush=True)
        else:
            print(json.dumps(message), flush=True)


def converse(
    command: Sequence[str],
    say: Callable[[str], None],
    *,
    stdin: IO[bytes] | None = None,
    timeout_s: float | None = None,
) -> tuple[dict[str, Any], int, str]:
    """Run a command that emits messages; what login scripts print between them is left out.

    `say` takes lines of progress, `{"say": …}`; `timeout_s` counts from the last line. Returns the last message that is
    not progress, the exit code, and the end of standard error.
    """
    last: dict[str, Any] = {}
    taken = 0
    with started(command, stdin) as (child, errors):
        output = child.stdout
        assert output is not None
        for line in iter(lambda: output.readline(_LONGEST_LINE), b""):
            taken += len(line)
            if taken > _MOST_OUTPUT:
                raise EdgekdError(
                    f"The device sends more than {_MOST_OUTPUT:,} bytes.", "Look at it."
                )
            with contextlib.suppress(ValueError):
                message = parse_json(line)
                if isinstance(message, dict) and set(message) == {"say"}:
                    say(str(message["say"])[:500])
                elif isinstance(message, dict):
                    last = message or last
        code = child.wait(timeout_s)
    return last, code, errors()


@contextlib.contextmanager
def started(
    command: Sequence[str], stdin: IO[bytes] | None = None
) -> Iterator[tuple[subprocess.Popen[bytes], Callable[[], str]]]:
    """Start a command whose output is read in the block; killed at the end if it still runs.

    Yields:
        The process, and what returns the end of its standard error, which is read beside it: an endless one fills
        neither memory nor disk.
    """
    child = subprocess.Popen(
        list(command),
        stdin=stdin or subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert child.stdout is not None
    assert child.stderr is not None
    output, kept = child.stderr, bytearray()

    def read() -> None:
        with output:
            for block in iter(lambda: output.read1(_KEPT_ERRORS), b""):  # type: ignore[attr-defined]
                kept.extend(block)
                del kept[:-_KEPT_ERRORS]

    reader = threading.Thread(target=read, daemon=True)
    reader.start()

    def errors() -> str:
        reader.join(_LAST_WORDS_S)  # a process that the command left behind may hold the pipe open
        return kept.decode(errors="replace")

    try:
        yield child, errors
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()
        child.stdout.close()


def last_line(text: str) -> str:
    """Return the last line of an error output, printable and short."""
    return printable((text.strip().splitlines() or ["no message"])[-1].strip())[:300]
