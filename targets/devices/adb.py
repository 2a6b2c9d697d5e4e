"""An Android device behind the user's own `adb`, with Termux's Python.

`run-as` reaches Termux where its build is debuggable (the one from its project's releases is); elsewhere start Termux's
own sshd and use `ssh://`, as docs/devices.md says.
"""

from __future__ import annotations

import re
import shlex

from edgekd.core.errors import EdgekdError
from edgekd.core.readers import printable
from edgekd.targets.devices.drive import ShellDevice

_FILES = "/data/data/com.termux/files"
_SETTINGS = (
    f"HOME={_FILES}/home",
    f"PREFIX={_FILES}/usr",
    f"PATH={_FILES}/usr/bin",
    f"LD_LIBRARY_PATH={_FILES}/usr/lib",
    f"TMPDIR={_FILES}/usr/tmp",
)


def adb_device(serial: str) -> ShellDevice:
    """The device with this serial number, as `adb devices` lists it.

    Raises:
        EdgekdError: not a serial number.
    """
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,127}", serial):
        raise EdgekdError(
            f"adb:{printable(serial)} is not a device.",
            "Write adb:SERIAL, as adb devices lists it.",
        )

    def reach(line: str) -> list[str]:
        inner = shlex.join(
            [f"{_FILES}/usr/bin/env", *_SETTINGS, f"{_FILES}/usr/bin/sh", "-c", line]
        )
        return ["adb", "-s", serial, "shell", "-T", f"run-as com.termux {inner}"]

    return ShellDevice(serial, reach, f"{_FILES}/usr/bin/python3", lambda: None)
