"""`--device SPEC` → a device: this machine, or one behind the user's own `ssh` or `adb`.

The user's configuration, agent and jump hosts of ssh count; edgekd sees no key. On Android the agent runs in Termux's
Python, which `run-as` reaches where Termux is debuggable (the one from its project's releases is); elsewhere start
Termux's own sshd and use `ssh://`, see docs/devices.md.
"""

from __future__ import annotations

import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl

from edgekd.core.errors import EdgekdError
from edgekd.core.readers import printable
from edgekd.targets.agent.messages import last_line
from edgekd.targets.devices.drive import Device, explained, receive

_FORMS = "local, local:PYTHON, ssh://[USER@]HOST[:PORT], adb:SERIAL or bundle:DIR"
_SSH_FORM = "Write ssh://[USER@]HOST[:PORT][?python=PATH]."
_SSH = re.compile(
    r"(?:(?P<user>[A-Za-z0-9_][A-Za-z0-9_.+-]{0,63})@)?"
    r"(?P<host>[A-Za-z0-9_][A-Za-z0-9_.-]{0,254}|\[[0-9A-Fa-f:.]{2,45}(?:%[A-Za-z0-9_.-]{1,32})?\])"
    r"(?::(?P<port>[0-9]{1,5}))?/?(?:\?(?P<query>.*))?"
)
"""None of the parts begins with `-`, so none can become an option of ssh."""
_LONGEST_ANSWER = 1 << 20
_TERMUX = "/data/data/com.termux/files"
_TERMUX_SETTINGS = (
    f"HOME={_TERMUX}/home",
    f"PREFIX={_TERMUX}/usr",
    f"PATH={_TERMUX}/usr/bin",
    f"LD_LIBRARY_PATH={_TERMUX}/usr/lib",
    f"TMPDIR={_TERMUX}/usr/tmp",
)


def find_device(spec: str) -> Device:
    """Return the device that `spec` names, without contacting it; another form is an `EdgekdError`."""
    if spec == "local" or spec.startswith("local:"):
        return _local_device(spec.removeprefix("local").removeprefix(":"))
    if spec.startswith("ssh://"):
        return _ssh_device(spec.removeprefix("ssh://"))
    if spec.startswith("adb:"):
        return _adb_device(spec.removeprefix("adb:"))
    raise EdgekdError(f'"{printable(spec)}" is not a device.', f"Write {_FORMS}.")


def _local_device(program: str) -> Device:
    if not program:
        return Device("local", sys.executable)
    found = shutil.which(program)
    if found is None:
        raise EdgekdError(
            f"There is no program {program}.", "Name a Python 3.9 or newer: --device local:PATH."
        )
    name = Path(found).resolve().parent.name if "/" in program else Path(program).stem
    return Device(name, found)


@dataclass
class ShellDevice(Device):
    """A device with a POSIX shell behind a program of this machine (ssh, adb).

    Attributes:
        program: a leading `~/` becomes the device's home.
        reach: a shell line → the command to start here.
        leave: called at the end.
    """

    reach: Callable[[str], list[str]]
    leave: Callable[[], None]

    def begin(self, agent: Path, name: str) -> str:
        """Put the agent into its folder; see `Device`."""
        folder = '"$d"/' + shlex.quote(name)
        script = (
            'd="${XDG_CACHE_HOME:-$HOME/.cache}/edgekd-agent" && mkdir -p "$d" && '
            f'cat > {folder}.new && mv {folder}.new {folder} && echo "edgekd:$d" && echo "edgekd:$HOME"'
        )
        command = self.reach("sh -c " + shlex.quote(script))
        with open(agent, "rb") as handle:
            code, stderr = receive(command, answer := io.BytesIO(), _LONGEST_ANSWER, handle)
        output = answer.getvalue().decode(errors="replace")
        answers = [line[7:] for line in output.splitlines() if line.startswith("edgekd:")]
        if "No space left" in stderr:
            raise explained(self.name, code, stderr)
        if code != 0 or len(answers) != 2:
            raise EdgekdError(
                f"{self.name} cannot be reached or written to ({last_line(stderr)}).",
                "Try it by hand: the same ssh or adb must work.",
            )
        root, home = answers
        if self.program.startswith("~/"):
            self.program = home + self.program[1:]
        return root

    def command(self, words: Sequence[str]) -> list[str]:
        """Return what runs these words there."""
        return self.reach(shlex.join(words))

    def close(self) -> None:
        """Close the connection."""
        self.leave()


def _ssh_device(rest: str) -> ShellDevice:
    """Return the device of `ssh://rest`. HOST may be an alias of the user's ssh configuration."""
    match = _SSH.fullmatch(rest)
    if match is None:
        raise EdgekdError(f"ssh://{printable(rest)} is not a device.", _SSH_FORM)
    if match["port"] and not 1 <= int(match["port"]) <= 65_535:
        raise EdgekdError(f"There is no port {match['port']}.", "Give one from 1 to 65535.")
    options = dict(parse_qsl(match["query"] or "", strict_parsing=False))
    if unknown := set(options) - {"python"}:
        raise EdgekdError(f"ssh:// has no option {printable(min(unknown))}.", _SSH_FORM)
    host = match["host"].strip("[]")
    destination = f"{match['user']}@{host}" if match["user"] else host
    # A dead line is noticed within 45 s. One connection serves all commands, so a password is given once; it is
    # open while images are packed.
    settings = ["ServerAliveInterval=15", "ServerAliveCountMax=3", "ConnectTimeout=20"]
    sockets = None if os.name == "nt" else Path(tempfile.mkdtemp(prefix="edgekd-"))
    if sockets is not None:
        settings += ["ControlMaster=auto", f"ControlPath={sockets}/s", "ControlPersist=600"]
    common = ["-T", *(part for one in settings for part in ("-o", one))]
    common += ["-p", match["port"]] if match["port"] else []

    def leave() -> None:
        if sockets is not None:
            if (sockets / "s").exists():
                end = ["ssh", *common, "-O", "exit", "--", destination]
                subprocess.run(end, capture_output=True, check=False)
            shutil.rmtree(sockets, ignore_errors=True)

    def reach(line: str) -> list[str]:
        return ["ssh", *common, "--", destination, line]

    return ShellDevice(host, options.get("python", "python3"), reach, leave)


def _adb_device(serial: str) -> ShellDevice:
    """Return the device with this serial number, as `adb devices` lists it."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,127}", serial):
        raise EdgekdError(
            f"adb:{printable(serial)} is not a device.",
            "Write adb:SERIAL, as adb devices lists it.",
        )

    def reach(line: str) -> list[str]:
        words = [f"{_TERMUX}/usr/bin/env", *_TERMUX_SETTINGS, f"{_TERMUX}/usr/bin/sh", "-c", line]
        return ["adb", "-s", serial, "shell", "-T", f"run-as com.termux {shlex.join(words)}"]

    return ShellDevice(serial, f"{_TERMUX}/usr/bin/python3", reach, lambda: None)
