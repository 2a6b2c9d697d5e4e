"""Bring a payload to a device, run it there, and fetch the result: the same words over every transport."""

from __future__ import annotations

import contextlib
import json
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from edgekd.core.console import say
from edgekd.core.errors import EdgekdError
from edgekd.core.files import sha256_file
from edgekd.core.readers import parse_json, printable
from edgekd.targets.devices.payload import Payload, agent_name
from edgekd.targets.devices.zipapp import write_agent

RESUME = "Run the same command again: it goes on where it stopped, and nothing is measured twice."
_LONGEST_LINE = 1 << 20
SPARE = 64_000_000
"""Bytes that must stay free on the device beside what is copied: journal and result."""


class Device(Protocol):
    """A machine and the way to it. Make one with `edgekd.targets.devices.find.find_device`."""

    @property
    def name(self) -> str:
        """For the report."""

    @property
    def python(self) -> list[str]:
        """Words that start the device's Python, there."""

    def begin(self, agent: Path, name: str) -> str:
        """Put the agent in its folder on the device under `name`; the folder's absolute path."""

    def command(self, words: Sequence[str]) -> list[str]:
        """What to start here so that `words` run there, with standard input and output passed on."""

    def close(self) -> None: ...


@dataclass(frozen=True)
class Answer:
    """What the agent said last, and how it ended."""

    last: dict[str, Any]
    code: int
    stderr: str


def measure_on(device: Device, payload: Payload, result: Path, *, keep: bool = False) -> None:
    """Run a job on a device and write its result file to `result`; the way to the device stays open.

    What is already there is not sent again. After a failure everything stays on the device, so that the same call goes
    on; after success all of it is removed, or with `keep` only the job.

    Raises:
        EdgekdError: no way to the device, no Python or runtime there, no space, a connection that broke.
    """
    root = device.begin(payload.files[payload.agent], payload.agent)
    agent = [*device.python, f"{root}/{payload.agent}"]
    _send(device, agent, root, payload)
    job = f"{root}/{payload.job_folder}"
    say(f"{device.name}: measuring")
    try:
        told = call(device, [*agent, "run", job, "--stay", *_flags(device.python)])
    except KeyboardInterrupt:
        with contextlib.suppress(EdgekdError, subprocess.TimeoutExpired):
            call(device, [*agent, "stop", job], timeout_s=10.0)
        raise
    place, sha256 = told.get("result"), told.get("sha256")
    if not isinstance(place, str) or not isinstance(sha256, str):
        raise _silent(device)
    _fetch(device, [*agent, "send", place], result, sha256)
    names = {name.partition("/")[0] for name in payload.files} | {payload.job_folder}
    # The agent goes last, since it is what removes.
    leaving = [payload.job_folder] if keep else [*sorted(names - {payload.agent}), payload.agent]
    call(device, [*agent, "remove", root, *leaving])


def unable(device: Device, artifacts: Sequence[Mapping[str, Any]]) -> list[EdgekdError | None]:
    """Of each artifact, why the device has not the runtime that it needs; None where it has. Sends the agent only.

    Args:
        artifacts: what their `artifact.json` says of the runtime: `format` and `details`.

    Raises:
        EdgekdError: no way to the device, or no Python there that runs the agent.
    """
    with tempfile.TemporaryDirectory(prefix="edgekd-agent-") as name:
        path = Path(name) / "agent.pyz"
        write_agent(path)
        root = device.begin(path, agent_name(path))
        told = call(
            device, [*device.python, f"{root}/{agent_name(path)}", "able", json.dumps(artifacts)]
        )
    able = told.get("able")
    if not isinstance(able, list) or len(able) != len(artifacts):
        raise _silent(device)
    return [None if one is None else _said(device, one) for one in able]


def call(
    device: Device,
    words: Sequence[str],
    *,
    stdin: IO[bytes] | None = None,
    timeout_s: float | None = None,
) -> dict[str, Any]:
    """Run words on the device, repeat what the agent says, and return its last message; its error is raised."""
    answer = _run(device, words, stdin, timeout_s)
    if "error" in answer.last:
        raise _said(device, answer.last["error"])
    if answer.code != 0:
        raise explained(device.name, answer.code, answer.stderr)
    return answer.last


def explained(name: str, code: int, stderr: str) -> EdgekdError:
    """Why a command on a device failed, from its exit code and its last words."""
    line = _last_line(stderr)
    if "No space left" in stderr:
        return EdgekdError(f"{name} has no space left.", f"Free some there. {RESUME}")
    if code == 127 or "not found" in line or "No such file" in line:
        return EdgekdError(
            f"{name} cannot start Python ({line}).",
            "Install Python 3.9 or newer there, or name one: ssh://HOST?python=PATH.",
        )
    return EdgekdError(f"The connection to {name} failed or broke ({line}).", RESUME)


def _run(
    device: Device, words: Sequence[str], stdin: IO[bytes] | None, timeout_s: float | None
) -> Answer:
    last: dict[str, Any] = {}
    with tempfile.TemporaryFile() as errors:
        child = _popen(device.command(words), stdin, errors)
        try:
            out = child.stdout
            assert out is not None
            for line in iter(lambda: out.readline(_LONGEST_LINE), b""):
                message = _message(line)
                if set(message) == {"say"}:
                    say(f"{device.name}: {str(message['say'])[:500]}")
                elif message:
                    last = message
            code = child.wait(timeout_s)
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
        errors.seek(0)
        return Answer(last, code, errors.read().decode(errors="replace"))


def _message(line: bytes) -> dict[str, Any]:
    """A line of the agent; what login scripts print is none."""
    with contextlib.suppress(ValueError):
        found = parse_json(line)
        if isinstance(found, dict):
            return found
    return {}


def _said(device: Device, error: Any) -> EdgekdError:
    """The agent's own error: a sentence and a hint."""
    message, hint = error if isinstance(error, list) and len(error) == 2 else (error, "")
    return EdgekdError(f"{device.name}: {str(message)[:500]}", str(hint)[:500])


def _silent(device: Device) -> EdgekdError:
    return EdgekdError(f"The agent on {device.name} does not answer.", RESUME)


def _last_line(stderr: str) -> str:
    return printable((stderr.strip().splitlines() or ["no message"])[-1].strip())[:300]


def _popen(
    command: list[str], stdin: IO[bytes] | None, errors: IO[bytes]
) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            command, stdin=stdin or subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors
        )
    except FileNotFoundError as error:
        raise EdgekdError(
            f"This machine has no {command[0]}.", "Install it, or use --device bundle:DIR."
        ) from error


def _send(device: Device, agent: list[str], root: str, payload: Payload) -> None:
    wanted = {name: path for name, path in payload.files.items() if name != payload.agent}
    told = call(device, [*agent, "probe", root, *wanted])
    there, free = told.get("files"), told.get("free")
    if not isinstance(there, dict) or not isinstance(free, int):
        raise _silent(device)
    hashes = {name: sha256_file(path) for name, path in wanted.items()}
    missing = {name: path for name, path in wanted.items() if there.get(name) != hashes[name]}
    offsets = {
        name: min(found, path.stat().st_size)
        if isinstance(found := there.get(name), int) and found > 0
        else 0
        for name, path in missing.items()
    }
    needed = sum(path.stat().st_size - offsets[name] for name, path in missing.items())
    if needed + SPARE > free:
        raise EdgekdError(
            f"{device.name} has {free / 1e6:.0f} MB free; this needs {(needed + SPARE) / 1e6:.0f} MB.",
            "Free some space there, or measure on fewer images.",
        )
    if missing:
        known = len(wanted) - len(missing)
        say(
            f"{device.name}: copying {needed / 1e6:.1f} MB; {known} of {len(wanted)} files are there already"
        )
    for name, path in missing.items():
        with open(path, "rb") as handle:
            handle.seek(offsets[name])
            call(
                device,
                [*agent, "receive", root, name, str(path.stat().st_size), hashes[name]],
                stdin=handle,
            )


def _fetch(device: Device, words: Sequence[str], path: Path, sha256: str) -> None:
    with open(path, "wb") as out, tempfile.TemporaryFile() as errors:
        code = subprocess.run(
            device.command(words), stdin=subprocess.DEVNULL, stdout=out, stderr=errors, check=False
        ).returncode
        errors.seek(0)
        if code != 0:
            raise explained(device.name, code, errors.read().decode(errors="replace"))
    if sha256_file(path) != sha256:
        raise EdgekdError(f"The result of {device.name} arrived damaged.", RESUME)


def _flags(python: Sequence[str]) -> list[str]:
    return [part for word in python for part in ("--python", word)]


@dataclass
class ShellDevice:
    """A device with a POSIX shell behind a program of this machine (ssh, adb).

    Attributes:
        reach: a shell line → the command to start here.
        found: the Python to use there; a leading `~/` becomes the device's home.
        leave: called at the end.
    """

    name: str
    reach: Callable[[str], list[str]]
    found: str
    leave: Callable[[], None]

    @property
    def python(self) -> list[str]:
        return [self.found]

    def begin(self, agent: Path, name: str) -> str:
        folder = '"$d"/' + shlex.quote(name)
        script = (
            'd="${XDG_CACHE_HOME:-$HOME/.cache}/edgekd-agent" && mkdir -p "$d" && '
            f'cat > {folder}.new && mv {folder}.new {folder} && echo "edgekd:$d" && echo "edgekd:$HOME"'
        )
        with open(agent, "rb") as handle, tempfile.TemporaryFile() as errors:
            child = _popen(self.reach("sh -c " + shlex.quote(script)), handle, errors)
            said, _ = child.communicate()
            errors.seek(0)
            stderr = errors.read().decode(errors="replace")
        told = [
            line[7:]
            for line in said.decode(errors="replace").splitlines()
            if line.startswith("edgekd:")
        ]
        if child.returncode != 0 or len(told) != 2:
            raise _unreached(self.name, child.returncode, stderr)
        if self.found.startswith("~/"):
            self.found = told[1] + self.found[1:]
        return told[0]

    def command(self, words: Sequence[str]) -> list[str]:
        return self.reach(shlex.join(words))

    def close(self) -> None:
        self.leave()


def _unreached(name: str, code: int, stderr: str) -> EdgekdError:
    line = _last_line(stderr)
    if "No space left" in stderr:
        return explained(name, code, stderr)
    return EdgekdError(
        f"{name} cannot be reached or written to ({line}).",
        "Try it by hand: the same ssh or adb must work.",
    )
