"""The agent's command line: `python3 edgekd-agent.pyz VERB …`.

Users need `run JOB`, and for an artifact that ends in an embedding `classify` and `add`. The other commands are called
by `edgekd benchmark --device`, which reads one JSON object per line from standard output.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.core import machine
from edgekd.core.errors import EdgekdError
from edgekd.core.readers import inside, parse_json, sha256_file
from edgekd.targets.agent import steps
from edgekd.targets.agent.job import Job, read_job
from edgekd.targets.agent.messages import converse, emit, last_line
from edgekd.targets.agent.model import check_runtime, open_model, read_manifest
from edgekd.targets.agent.store import Arrays, holder, only_one, read_step, receive, write_step
from edgekd.targets.bank_change import add_by_images, content, describe_last

RESULT = "edgekd-result.npz"
READY = "ready.npz"
"""Entry of the journal with the built engines."""
USAGE = """usage: python3 edgekd-agent.pyz run JOB_FOLDER
       python3 edgekd-agent.pyz classify ARTIFACT_FOLDER IMAGE...
       python3 edgekd-agent.pyz add ARTIFACT_FOLDER CLASS_NAME IMAGE_OR_FOLDER..."""


class _Killed(EdgekdError):
    """The system killed the process of a step, most likely because of its memory."""


def main(arguments: list[str]) -> int:
    """Run the command line; return exit code 0, or 2 after an error message."""
    verbs = {"able": _able, "probe": _probe, "receive": _receive, "run": _run, "ready": _ready, "step": _step,
             "send": _send, "stop": _stop, "remove": _remove, "classify": _classify, "add": _add}  # fmt: skip
    needed = {"run": 1, "classify": 2, "add": 3}
    if not arguments or arguments[0] not in verbs or len(arguments) <= needed.get(arguments[0], 0):
        print(USAGE, file=sys.stderr)
        return 2
    try:
        verbs[arguments[0]](arguments[1:])
    except EdgekdError as error:
        emit(error=[error.message, error.hint])
        return 2
    except OSError as error:
        emit(error=_system_error(error))
        return 2
    except KeyboardInterrupt:
        emit(error=["Stopped.", "Run the same command again to resume."])
        return 130
    return 0


def _system_error(error: OSError) -> list[str]:
    """Return message and hint for an error of the device's system."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        hint = "Free some space and run the same command again to resume."
        return ["The device has no space left.", hint]
    place = error.filename or "A file on the device"
    return [
        f"{place} cannot be used ({error.strerror or error}).",
        "Check the path and its permissions.",
    ]


def _able(arguments: list[str]) -> None:
    """Run `able JSON`: emit for each described artifact null, or the reason why its runtime is not available."""
    found: list[list[str] | None] = []
    for artifact in parse_json(arguments[0]):
        try:
            check_runtime(artifact)
            found.append(None)
        except EdgekdError as error:
            found.append([error.message, error.hint])
    emit(able=found)


def _probe(arguments: list[str]) -> None:
    """Run `probe ROOT NAME…`: emit free space, and the SHA-256 or the partial size of each named file."""
    root = Path(arguments[0])
    root.mkdir(parents=True, exist_ok=True)
    files: dict[str, Any] = {}
    for name in arguments[1:]:
        part = inside(root, name + ".part")
        if inside(root, name).is_file():
            files[name] = sha256_file(root / name)
        elif part.is_file():
            files[name] = part.stat().st_size
    emit(free=shutil.disk_usage(root).free, files=files)


def _receive(arguments: list[str]) -> None:
    """Run `receive ROOT NAME SIZE SHA256 < bytes`: store a file."""
    root, name, size, sha256 = arguments
    receive(Path(root), name, int(size), sha256, sys.stdin.buffer)


def _send(arguments: list[str]) -> None:
    """Run `send FILE > bytes`: write a file to standard output."""
    with open(arguments[0], "rb") as handle:
        shutil.copyfileobj(handle, sys.stdout.buffer)


def _stop(arguments: list[str]) -> None:
    """Run `stop JOB`: stop the agent that works on the job."""
    pid = holder(Path(arguments[0]))
    if pid is not None and hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGTERM)


def _remove(arguments: list[str]) -> None:
    """Run `remove ROOT NAME…`: remove folders and files that were sent by edgekd."""
    for name in arguments[1:]:
        path = inside(Path(arguments[0]), name)
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
        with contextlib.suppress(OSError):
            path.parent.rmdir()  # only if it is empty


def _run(arguments: list[str]) -> None:
    """Run `run JOB [--stay] [--python WORD]…`: make every missing entry of the journal, then the result."""
    folder = Path(arguments[0]).resolve()
    words = [arguments[n + 1] for n, word in enumerate(arguments) if word == "--python"]
    command = [*(words or [sys.executable]), sys.argv[0]]
    if "--stay" in arguments:
        _stay()
    job, done = read_job(folder), folder / "done"
    with only_one(folder) as waiting:
        for second, _ in enumerate(waiting):
            if second == 0:
                _say("an earlier agent is still working on this job; waiting for it")
        done.mkdir(exist_ok=True)
        if not (done / "start.npz").exists():
            write_step(done / "start.npz", {}, machine.state())
        if not (done / READY).exists():
            _child([*command, "ready", str(folder)])
        for group in job.steps():
            missing = [name for name in group if not (done / f"{name}.npz").exists()]
            try:
                if missing:
                    _child([*command, "step", str(folder), *missing])
            except _Killed as killed:
                if not missing[0].startswith("throughput-"):
                    raise
                steps.write_refusal(done / f"{missing[0]}.npz", killed.message)
        result = folder / RESULT
        if not result.exists():
            _write_result(job, done, result)
    emit(result=str(result), size=result.stat().st_size, sha256=sha256_file(result))


def _classify(arguments: list[str]) -> None:
    """Run `classify ARTIFACT IMAGE…`: print each image's most probable class."""
    model = open_model(Path(arguments[0]), threads=None)
    for name in arguments[1:]:
        encoded = content(Path(name))
        logits = model.run(model.prepare(encoded)[None])[0].astype(np.float64)  # [C]
        if logits.shape != (len(model.classes),) or not np.isfinite(logits).all():
            hint = "Copy the artifact again, or export it again."
            raise EdgekdError(f"{arguments[0]} gives no finite number for each class.", hint)
        odds = np.exp(logits - logits.max())
        probability = round(float(odds.max() / odds.sum()), 3)
        emit(image=name, found=model.classes[int(logits.argmax())], probability=probability)


def _add(arguments: list[str]) -> None:
    """Run `add ARTIFACT NAME IMAGE_OR_FOLDER…`: add a class to the artifact."""
    folder, name = Path(arguments[0]), arguments[1]
    session = open_model(folder, threads=None)
    bank = add_by_images(folder, name, [Path(place) for place in arguments[2:]], session)
    _say(f"{folder} has {len(bank.classes)} classes now; {name}: {describe_last(bank)}")


def _stay() -> None:
    """Continue after a broken connection; the next `run` waits for this one."""
    if hasattr(os, "setsid"):
        with contextlib.suppress(OSError):
            os.setsid()
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)


def _child(command: list[str]) -> None:
    """Run a command of the agent in a fresh process, forward its messages, and raise its error."""
    last, code, stderr = converse(command, _say)
    if "error" in last:
        raise EdgekdError(*last["error"])
    ended = f"The device's process ended with code {code}"
    if code == -9:
        raise _Killed(f"{ended} (out of memory?).", "Run the same command again.")
    if code != 0:
        raise EdgekdError(f"{ended} ({last_line(stderr)}).", "Run the same command again.")


def _ready(arguments: list[str]) -> None:
    """`ready JOB`, in a process of its own, before anything is timed: check the runtimes, build missing engines."""
    folder = Path(arguments[0])
    places = [folder.parent / one.folder for one in read_job(folder).artifacts]
    manifests = [read_manifest(place) for place in places]
    openers = [check_runtime(one) for one in manifests]  # all before the first build: that is long
    built = [
        opener.make_ready(manifest, place, _say) if hasattr(opener, "make_ready") else None
        for opener, manifest, place in zip(openers, manifests, places)  # noqa: B905  Python 3.9
    ]
    write_step(folder / "done" / READY, {}, {"boot": steps.boot(), "built": built})


def _step(arguments: list[str]) -> None:
    """Run `step JOB NAME…` in a separate process."""
    folder = Path(arguments[0])
    steps.run_group(read_job(folder), folder, arguments[1:], _say)


def _write_result(job: Job, done: Path, path: Path) -> None:
    arrays: Arrays = {}
    facts: dict[str, Any] = {"job": json.loads(job.to_json()), "steps": {}}
    for name in [name for group in job.steps() for name in group]:
        found, facts["steps"][name] = read_step(done / f"{name}.npz")
        arrays = {**arrays, **{f"{name}/{key}": value for key, value in found.items()}}
    states = {"before": read_step(done / "start.npz")[1], "after": machine.state()}
    facts["environment"] = {**machine.describe(), **states}
    facts["built"] = read_step(done / READY)[1]["built"]
    facts["name"] = platform.node().split(".")[0] or "device"
    facts["emulated"] = steps.emulated()
    write_step(path, arrays, facts)


def _say(text: str) -> None:
    emit(say=text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
