"""A device behind the user's own `ssh`: its configuration, agent and jump hosts count; edgekd sees no key."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from urllib.parse import parse_qsl

from edgekd.core.errors import EdgekdError
from edgekd.core.readers import printable
from edgekd.targets.devices.drive import ShellDevice

_FORM = "Write ssh://[USER@]HOST[:PORT][?python=PATH]."
_SPEC = re.compile(
    r"(?:(?P<user>[A-Za-z0-9_][A-Za-z0-9_.+-]{0,63})@)?"
    r"(?P<host>[A-Za-z0-9_][A-Za-z0-9_.-]{0,254}|\[[0-9A-Fa-f:.]{2,45}(?:%[A-Za-z0-9_.-]{1,32})?\])"
    r"(?::(?P<port>[0-9]{1,5}))?/?(?:\?(?P<query>.*))?"
)
"""None of the parts begins with `-`, so none can become an option of ssh."""


def ssh_device(rest: str) -> ShellDevice:
    """`rest` is what follows `ssh://`. HOST may be an alias of the user's ssh configuration.

    Raises:
        EdgekdError: not of that form, or an option that does not exist.
    """
    match = _SPEC.fullmatch(rest)
    if match is None:
        raise EdgekdError(f"ssh://{printable(rest)} is not a device.", _FORM)
    if match["port"] and not 1 <= int(match["port"]) <= 65_535:
        raise EdgekdError(f"There is no port {match['port']}.", "Give one from 1 to 65535.")
    options = dict(parse_qsl(match["query"] or "", strict_parsing=False))
    if set(options) - {"python"}:
        unknown = printable(min(set(options) - {"python"}))
        raise EdgekdError(f"ssh:// knows no option {unknown}.", _FORM)
    host = match["host"].strip("[]")
    destination = f"{match['user']}@{host}" if match["user"] else host
    # A dead line is noticed within 45 s. One connection serves all commands, so a password is asked for once; it is
    # kept while images are packed.
    common = [
        "-o",
        "ServerAliveInterval=15",
        "-o",
        "ServerAliveCountMax=3",
        "-o",
        "ConnectTimeout=20",
        "-T",
    ]
    common += ["-p", match["port"]] if match["port"] else []
    sockets = None if os.name == "nt" else Path(tempfile.mkdtemp(prefix="edgekd-"))
    if sockets is not None:
        common += [
            "-o",
            "ControlMaster=auto",
            "-o",
            f"ControlPath={sockets}/s",
            "-o",
            "ControlPersist=600",
        ]

    def leave() -> None:
        if sockets is not None:
            if (sockets / "s").exists():
                subprocess.run(
                    ["ssh", *common, "-O", "exit", "--", destination],
                    capture_output=True,
                    check=False,
                )
            shutil.rmtree(sockets, ignore_errors=True)

    def reach(line: str) -> list[str]:
        return ["ssh", *common, "--", destination, line]

    return ShellDevice(host, reach, options.get("python", "python3"), leave)
