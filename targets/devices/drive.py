"""Copy a payload to a device, run it there, and fetch the result: the same steps over every transport."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from edgekd.core.console import say
from edgekd.core.errors import EdgekdError
from edgekd.core.files import cache_folder, disk_errors
from edgekd.core.readers import sha256_file
from edgekd.targets.agent.messages import converse, last_line, started
from edgekd.targets.devices.payload import Payload, agent_name, write_agent

RESUME = "Run the same command again: it goes on where it stopped, and nothing is measured twice."
LARGEST_RESULT = 1 << 32
"""Bytes; a device that sends more is cut off."""
_BLOCK = 1 << 20
SPARE = 64_000_000
"""Bytes that must stay free on the device beside what is copied: journal and result."""


@dataclass
class Device:
    """A machine and the way to it: here this machine, with the agent that others get in a process of its own.

    Attributes:
        name: for the report.
        program: the Python to use there.
    """

    name: str
    program: str

    def begin(self, agent: Path, name: str) -> str:
        """Put the agent in its folder on the device under `name`; return the folder's absolute path."""
        root = cache_folder("device")
        with disk_errors(root):
            shutil.copy(agent, root / name)
        return str(root.resolve())

    def command(self, words: Sequence[str]) -> list[str]:
        """Return what to start here so that `words` run there, with standard input and output passed on."""
        return list(words)

    def close(self) -> None:
        """Close the connection."""


def measure_on(device: Device, payload: Payload, result: Path, *, keep: bool = False) -> None:
    """Run a job on a device and write its result file to `result`; the connection stays open.

    What is already there is not sent again. After a failure, which is an `EdgekdError`, everything stays on the device,
    so that the same call goes on; after success all of it is removed, or with `keep` only the job.
    """
    root = device.begin(payload.files[payload.agent], payload.agent)
    agent = [device.program, f"{root}/{payload.agent}"]
    _send(device, agent, root, payload)
    job = f"{root}/{payload.job_folder}"
    say(f"{device.name}: measuring")
    try:
        answer = call(device, [*agent, "run", job, "--stay", "--python", device.program])
    except KeyboardInterrupt:
        with contextlib.suppress(EdgekdError, subprocess.TimeoutExpired):
            call(device, [*agent, "stop", job], timeout_s=10.0)
        raise
    place, sha256 = answer.get("result"), answer.get("sha256")
    if not isinstance(place, str) or not isinstance(sha256, str):
        raise _silent(device)
    _fetch(device, [*agent, "send", place], result, sha256)
    names = {name.partition("/")[0] for name in payload.files} - {payload.agent}
    # The agent goes last, since it is what removes.
    leaving = [payload.job_folder] if keep else [*sorted(names), payload.agent]
    call(device, [*agent, "remove", root, *leaving])


def unable(device: Device, artifacts: Sequence[Mapping[str, Any]]) -> list[EdgekdError | None]:
    """Return for each artifact why the device lacks its runtime; None where it has it. Sends the agent only.

    Of `artifact.json`, `format` and `details` are needed.
    """
    with tempfile.TemporaryDirectory(prefix="edgekd-agent-") as name:
        path = Path(name) / "agent.pyz"
        write_agent(path)
        root = device.begin(path, agent_name(path))
        agent = [device.program, f"{root}/{agent_name(path)}"]
        able = call(device, [*agent, "able", json.dumps(artifacts)]).get("able")
    if not isinstance(able, list) or len(able) != len(artifacts):
        raise _silent(device)
    return [None if one is None else _agent_error(device, one) for one in able]


def call(
    device: Device,
    words: Sequence[str],
    *,
    stdin: IO[bytes] | None = None,
    timeout_s: float | None = None,
) -> dict[str, Any]:
    """Run words on the device, log the agent's progress, and return its last message; its error is raised."""
    command = device.command(words)
    with present(command):
        last, code, stderr = converse(
            command, lambda text: say(f"{device.name}: {text}"), stdin=stdin, timeout_s=timeout_s
        )
    if "error" in last:
        raise _agent_error(device, last["error"])
    if code != 0:
        raise explained(device.name, code, stderr)
    return last


def explained(name: str, code: int, stderr: str) -> EdgekdError:
    """Return why a command on a device failed, from its exit code and the end of its standard error."""
    line = last_line(stderr)
    if "No space left" in stderr:
        return EdgekdError(f"{name} has no space left.", f"Free some there. {RESUME}")
    if code == 127 or "not found" in line or "No such file" in line:
        return EdgekdError(
            f"{name} cannot start Python ({line}).",
            "Install Python 3.9 or newer there, or name one: ssh://HOST?python=PATH.",
        )
    return EdgekdError(f"The connection to {name} failed or broke ({line}).", RESUME)


def receive(
    command: Sequence[str], out: IO[bytes], most: int, stdin: IO[bytes] | None = None
) -> tuple[int, str]:
    """Write the output of a command, at most `most` bytes, to `out`; return its exit code and the end of its errors."""
    with present(command), started(command, stdin) as (child, errors):
        assert child.stdout is not None
        while block := child.stdout.read1(_BLOCK):  # type: ignore[attr-defined]
            if out.tell() + len(block) > most:
                raise EdgekdError(f"The device sends more than {most:,} bytes.", "Look at it.")
            out.write(block)
        code = child.wait()
    return code, errors()


@contextlib.contextmanager
def present(command: Sequence[str]) -> Iterator[None]:
    """Turn a program that this machine lacks, and words that none can take, into an `EdgekdError`."""
    if any("\0" in word for word in command):
        raise EdgekdError("The device names a path that holds a NUL character.", "Look at it.")
    try:
        yield
    except FileNotFoundError as error:
        raise EdgekdError(
            f"This machine has no {command[0]}.", "Install it, or use --device bundle:DIR."
        ) from error


def _agent_error(device: Device, error: Any) -> EdgekdError:
    """Return the agent's own error: a sentence and a hint."""
    message, hint = error if isinstance(error, list) and len(error) == 2 else (error, "")
    return EdgekdError(f"{device.name}: {str(message)[:500]}", str(hint)[:500])


def _silent(device: Device) -> EdgekdError:
    return EdgekdError(f"The agent on {device.name} does not answer.", RESUME)


def _send(device: Device, agent: list[str], root: str, payload: Payload) -> None:
    """Copy the files that the device lacks; a partial one from where it ends."""
    wanted = {name: path for name, path in payload.files.items() if name != payload.agent}
    answer = call(device, [*agent, "probe", root, *wanted])
    there, free = answer.get("files"), answer.get("free")
    if not isinstance(there, dict) or not isinstance(free, int):
        raise _silent(device)
    hashes = {name: sha256_file(path) for name, path in wanted.items()}
    sizes = {n: p.stat().st_size for n, p in wanted.items() if there.get(n) != hashes[n]}
    partial = {name: size for name in sizes if isinstance(size := there.get(name), int)}
    offsets = {name: max(0, min(partial.get(name, 0), size)) for name, size in sizes.items()}
    needed = sum(size - offsets[name] for name, size in sizes.items())
    if needed + SPARE > free:
        raise EdgekdError(
            f"{device.name} has {free / 1e6:.0f} MB free; this needs {(needed + SPARE) / 1e6:.0f} MB.",
            "Free some space there, or measure on fewer images.",
        )
    if sizes:
        present = f"{len(wanted) - len(sizes)} of {len(wanted)} files are there already"
        say(f"{device.name}: copying {needed / 1e6:.1f} MB; {present}")
    for name, size in sizes.items():
        with open(wanted[name], "rb") as handle:
            handle.seek(offsets[name])
            words = [*agent, "receive", root, name, str(size), hashes[name]]
            call(device, words, stdin=handle)


def _fetch(device: Device, words: Sequence[str], path: Path, sha256: str) -> None:
    with disk_errors(path), open(path, "wb") as out:
        code, stderr = receive(device.command(words), out, LARGEST_RESULT)
    if code != 0:
        raise explained(device.name, code, stderr)
    if sha256_file(path) != sha256:
        raise EdgekdError(f"The result of {device.name} arrived damaged.", RESUME)
