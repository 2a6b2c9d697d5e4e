"""Kill edgekd at random moments, resume it as a user would, and compare the files with those of an undisturbed run.

    python scripts/kill_test.py --moments 20
    python scripts/kill_test.py --moments 20 --load 2 --only train,export

Each of five commands runs once undisturbed. Then, for every moment, it is started in a new folder, killed with SIGKILL
together with its child processes, and started again with the same command (training with `--resume` if there is a
checkpoint). All files without times or dates must be identical, and earlier files must still exist. `repeats` runs the
training several times instead, with a cold and a warm cache. Prints a Markdown table and exits with code 1 if anything
differs. Needs os.fork.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

Hashes = Mapping[str, str]
SETTINGS = [
    "--student=test_efficientnet", "--pretrained=scratch", "--teacher=toy", "--size=32", "--batch-size=8",
    "--set=checkpoint_every=5", "--set=log_every=1", "--set=accelerator=cpu",
]  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One command.

    Attributes:
        prepare: creates a folder for one run and returns the arguments of the command, and of the one that resumes it.
        read: returns the hashes of the command's files in the folder.
    """

    name: str
    prepare: Callable[[Path], tuple[list[str], Callable[[], list[str]]]]
    read: Callable[[Path], Hashes]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--moments", type=int, default=20, help="kills of each command, and repeats"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--load", type=int, default=0, help="busy processes beside the commands")
    parser.add_argument("--only", default="", help="commands, with commas")
    options = parser.parse_args()
    _import_everything()
    with tempfile.TemporaryDirectory(prefix="edgekd-kill-") as name, _busy(options.load):
        root = Path(name)
        os.environ["EDGEKD_CACHE"] = str(root / "cache")
        cases = _cases(root)
        wanted = options.only.split(",") if options.only else [*cases, "repeats"]
        print(
            "| command | undisturbed | killed | done before the kill | went on | the same files |"
        )
        print("|---|---:|---:|---:|---:|---:|", flush=True)
        good = True
        for one in wanted:
            if one == "repeats":
                good &= _repeat(cases["train"], root, options.moments)
            else:
                good &= _kill(
                    cases[one], root, options.moments, random.Random(f"{options.seed} {one}")
                )
    return 0 if good else 1


def _kill(case: Case, root: Path, moments: int, chance: random.Random) -> bool:
    reference = root / f"{case.name}-reference"
    words, _ = case.prepare(reference)
    took = run(words, reference)
    assert took is not None
    expected = case.read(reference)
    early = went_on = same = 0
    for number in range(moments):
        folder = root / f"{case.name}-{number}"
        words, onward = case.prepare(folder)
        if run(words, folder, kill_after=chance.uniform(0, 0.8 * took)) is not None:
            early += 1
        elif run(onward(), folder, may_be_done=True) is None:
            early += 1  # killed between its last file and its exit
        else:
            went_on += 1
        found = case.read(folder)
        same += found == expected
        for name in sorted({*found, *expected}):
            if found.get(name) != expected.get(name):
                print(f"{case.name} {number}: {name} differs", file=sys.stderr)
        shutil.rmtree(folder)
    print(
        f"| {case.name} | {took:.1f} s | {moments} | {early} | {went_on} | {same} of {moments} |",
        flush=True,
    )
    return same == moments


def _repeat(case: Case, root: Path, times: int) -> bool:
    found = []
    for number in range(times):
        folder = root / f"repeat-{number}"
        words, _ = case.prepare(folder)
        if number % 2:  # warm cache, filled by another run with the same settings
            run(words, folder)
            shutil.rmtree(folder / "run")
        run(words, folder)
        found.append(case.read(folder))
        shutil.rmtree(folder)
    same = sum(one == found[0] for one in found)
    print(f"| repeats of train, cache cold and warm | | | | | {same} of {times} |", flush=True)
    return same == times


def run(
    words: Sequence[str],
    folder: Path,
    kill_after: float | None = None,
    *,
    may_be_done: bool = False,
) -> float | None:
    """Run `edgekd WORDS…` in a separate process; return seconds, or None if it was killed or its output exists.

    Raises:
        SystemExit: it was not killed and its exit code is not 0.
    """
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        log = os.open(folder / "log.txt", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ["EDGEKD_CACHE"] = str(folder / "cache")
        from edgekd import cli

        code = 1
        try:
            cli.main(list(words))
            code = 0
        except SystemExit as leaving:
            code = (
                leaving.code if isinstance(leaving.code, int) else 0 if leaving.code is None else 1
            )
        finally:
            os._exit(code)
    os.setpgid(child, child)  # also in the parent, since the child may be killed before it starts
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        if kill_after is not None and time.monotonic() - started > kill_after:
            os.killpg(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            break
        time.sleep(0.005)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL and kill_after is not None:
        return None
    refused = may_be_done and os.WEXITSTATUS(status) == 2
    if refused and "exists already" in (folder / "log.txt").read_text()[-500:]:
        return None
    if status:
        sys.exit(
            f"edgekd {' '.join(words)} ended with status {status}:\n{(folder / 'log.txt').read_text()[-2000:]}"
        )
    return time.monotonic() - started


def _cases(root: Path) -> dict[str, Case]:
    data = _draw(root / "images")
    common = [f"--data={data}", *SETTINGS]

    def trains(*more: str) -> Callable[[Path], tuple[list[str], Callable[[], list[str]]]]:
        def prepare(folder: Path) -> tuple[list[str], Callable[[], list[str]]]:
            folder.mkdir()
            out = folder / "run"
            words = ["train", *common, *more, f"--out={out}"]

            def onward() -> list[str]:
                return (
                    ["train", "--resume", f"--out={out}"]
                    if (out / "checkpoint.pt").exists()
                    else words
                )

            return words, onward

        return prepare

    base = root / "base"
    words, _ = trains("--steps=10", "--views=2")(base)
    run(words, base)
    run(["benchmark", str(base / "run"), "--quick"], base)  # an earlier report that must be kept

    def of_run(*command: str) -> Callable[[Path], tuple[list[str], Callable[[], list[str]]]]:
        def prepare(folder: Path) -> tuple[list[str], Callable[[], list[str]]]:
            shutil.copytree(base, folder)
            words = [command[0], str(folder / "run"), *command[1:]]
            return words, lambda: words

        return prepare

    def study(folder: Path) -> tuple[list[str], Callable[[], list[str]]]:
        folder.mkdir()
        given = [one for one in common if not one.startswith("--set")]
        given += [one for one in common if one.startswith("--set")]
        words = [
            "study",
            "--recipes=erm,vl2v-adip",
            "--seeds=1",
            "--test-domains=sketch",
            "--steps=10",
            *given,
        ]
        words += ["--set=views=1", f"--out={folder / 'study'}"]
        return words, lambda: words

    cases = (
        Case("train", trains("--steps=30", "--views=2"), _run_files),
        Case("teacher caching", trains("--steps=1", "--views=24"), _run_and_cache),
        Case("export", of_run("export", "--int8", "--min-agreement=1"), _artifact_files),
        Case("benchmark", of_run("benchmark", "--quick"), _report_files),
        Case("study", study, _study_files),
    )
    return {case.name: case for case in cases}


def _run_files(folder: Path) -> Hashes:
    names = ("student.safetensors", "text_bank.safetensors", "split.json", "config.json")
    return {name: _sha256((folder / "run" / name).read_bytes()) for name in names}


def _run_and_cache(folder: Path) -> Hashes:
    """Hash the run's files and every embedding, not the shards, since these depend on the interruption."""
    rows: set[bytes] = set()
    for keys in (folder / "cache" / "embeddings").glob("*/[!.]*.keys.npy"):
        vectors = np.load(keys.with_name(keys.name.replace(".keys.", ".vectors.")))
        rows |= {
            key.tobytes() + row.tobytes() for key, row in zip(np.load(keys), vectors, strict=True)
        }
    return {**_run_files(folder), "embeddings": _sha256(b"".join(sorted(rows)))}


def _artifact_files(folder: Path) -> Hashes:
    found = _kept_report(folder)
    for path in sorted((folder / "run" / "artifacts").glob("[!.]*/**/*")):
        if path.is_file():
            content = path.read_bytes()
            if path.name == "artifact.json":
                facts = json.loads(content)
                del facts["created"]
                content = json.dumps(facts).encode()
            found[str(path.relative_to(folder))] = _sha256(content)
    return found


def _report_files(folder: Path) -> Hashes:
    """Hash all files of the earlier report, and the predictions of the new one."""
    predictions = folder / "run" / "benchmark-2" / "predictions.npz"
    with np.load(predictions) as arrays:
        content = b"".join(name.encode() + arrays[name].tobytes() for name in arrays.files)
    return {
        **_kept_report(folder),
        "predictions": _sha256(content),
        "predictions.npz": _sha256(predictions.read_bytes()),
    }


def _kept_report(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): _sha256(p.read_bytes())
        for p in (folder / "run" / "benchmark").iterdir()
    }


def _study_files(folder: Path) -> Hashes:
    study = folder / "study"
    with open(study / "table.csv", encoding="utf-8", newline="") as handle:
        table = [row for row in csv.reader(handle) if "train_seconds" not in row]
    found = {path.name: _sha256(path.read_bytes()) for path in (study / "cells").iterdir()}
    settings = (study / "study.json").read_bytes()
    return {
        **found,
        "table.csv": _sha256(json.dumps(table).encode()),
        "study.json": _sha256(settings),
    }


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _draw(root: Path) -> Path:
    """Write `domain/class/00.png` of three domains and two classes: noise with a tint for each class."""
    for d, domain in enumerate(("art", "photo", "sketch")):
        for c, name in enumerate(("cat", "dog")):
            (root / domain / name).mkdir(parents=True)
            for number in range(10):
                pixels = np.random.default_rng(1000 * d + 100 * c + number).integers(
                    0, 160, (32, 40, 3)
                )
                pixels[..., c] += 60
                Image.fromarray(pixels.astype(np.uint8)).save(
                    root / domain / name / f"{number:02d}.png"
                )
    return root


@contextlib.contextmanager
def _busy(count: int) -> Iterator[None]:
    """Keep `count` processors busy during the block."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_spin, daemon=True) for _ in range(count)]
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            process.kill()


def _spin() -> None:
    while True:
        pass


def _import_everything() -> None:
    """Import the modules of all runs once before forking, without computing anything."""
    import onnx
    import onnxruntime
    import onnxscript
    import torch
    from torch.utils.tensorboard import SummaryWriter

    del onnx, onnxruntime, onnxscript, SummaryWriter
    torch.set_num_threads(1)


if __name__ == "__main__":
    sys.exit(main())
