"""This machine as a device: the very agent that others get, in a process of its own."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgekd.core.errors import EdgekdError
from edgekd.core.files import cache_folder, disk_errors


@dataclass(frozen=True)
class LocalDevice:
    """`--device local`, or `local:PYTHON` for another Python on this machine."""

    name: str
    program: str

    @property
    def python(self) -> list[str]:
        return [self.program]

    def begin(self, agent: Path, name: str) -> str:
        root = cache_folder("device")
        with disk_errors(root):
            shutil.copy(agent, root / name)
        return str(root.resolve())

    def command(self, words: Sequence[str]) -> list[str]:
        return list(words)

    def close(self) -> None:
        return


def local_device(rest: str) -> LocalDevice:
    """`rest` is what follows `local`: nothing, or the path of another Python after a colon."""
    program = rest.removeprefix(":")
    if not program:
        return LocalDevice("local", sys.executable)
    found = shutil.which(program)
    if found is None:
        raise EdgekdError(
            f"There is no program {program}.", "Name a Python 3.9 or newer: --device local:PATH."
        )
    return LocalDevice(
        Path(program).stem if "/" not in program else Path(found).resolve().parent.name, found
    )
