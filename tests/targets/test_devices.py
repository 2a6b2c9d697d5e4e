from __future__ import annotations

import io
import json
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from artifact_fakes import write_artifact
from benchmark_fakes import ONE_THREAD, SHORT, draw_nothing
from device_fakes import (
    BRIEF,
    Setting,
    artifact_subject,
    be_brief,
    check_measured,
    plant,
    result_of,
    two_suites,
    write_images,
)

from edgekd.benchmark import device as devices
from edgekd.benchmark.benchmark import run_benchmark
from edgekd.benchmark.evaluate.predictions import predict_suite
from edgekd.benchmark.measure.timings import throughput_rows
from edgekd.benchmark.results.storage import read_report
from edgekd.cli import main
from edgekd.configs.benchmark import SpeedOptions
from edgekd.core.errors import EdgekdError
from edgekd.core.files import cache_root
from edgekd.evaluation import gather
from edgekd.targets.agent.messages import converse
from edgekd.targets.agent.store import read_step, write_step
from edgekd.targets.devices import drive
from edgekd.targets.devices.transports import find_device


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    be_brief(monkeypatch)
    draw_nothing(monkeypatch)


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    images = write_images(tmp_path / "images")
    folders = [write_artifact(tmp_path / "artifacts" / name) for name in ("fp32", "other")]
    return [artifact_subject(folder) for folder in folders], two_suites(images)


def change_format(folder: Path, name: str) -> None:
    manifest = json.loads((folder / "artifact.json").read_text()) | {"format": name}
    (folder / "artifact.json").write_text(json.dumps(manifest))


def test_an_endless_error_output_fills_neither_disk_nor_memory() -> None:
    """The device may write no file larger than a megabyte, and prints 50."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "for _ in range(50): sys.stderr.write('x' * 10**6)\n"
        "sys.stderr.write('last words'); print('{\"done\": 1}')"
    )
    last, status, errors = converse([sys.executable, "-c", code], print)
    assert (last, status) == ({"done": 1}, 0)
    assert errors.endswith("last words")
    assert len(errors) < 1 << 20


def test_an_endless_output_ends() -> None:
    flood = [sys.executable, "-c", "import sys\nwhile True: sys.stdout.write('x' * 10**6)"]
    with pytest.raises(EdgekdError, match="sends more"):
        converse(flood, print)
    with pytest.raises(EdgekdError, match="sends more"):
        drive.receive(flood, io.BytesIO(), 1 << 21)


def test_a_path_with_nul_from_a_device_is_one_sentence() -> None:
    device = drive.Device("board", sys.executable)
    with pytest.raises(EdgekdError, match="NUL"):
        drive.call(device, ["run", "/nowhere/x\0y"])
    with pytest.raises(EdgekdError, match="NUL"):
        drive.receive([sys.executable, "/nowhere/x\0y"], io.BytesIO(), 10)


def test_local_agent_gives_a_report_like_any_other(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    """One file cannot run here, one is made for one image at a time, one needs a runtime that the device lacks."""

    def predict(images: object) -> np.ndarray:
        raise AssertionError("it ran here")

    (first, other), suites = setting
    single = artifact_subject(write_artifact(tmp_path / "artifacts" / "single", batch=1))
    change_format(tmp_path / "artifacts" / "other", "openvino")
    plant(monkeypatch, tmp_path / "planted", "openvino", "raise ImportError('lib is missing')")
    speed = SpeedOptions(quick=True, threads=1, batch_sizes=(1, 4), thread_counts=(1,))
    silent = replace(first, predict=predict, here=False)
    found = devices.on_devices([silent, single, other], suites, ["local"], speed, keep=True)
    reason = "local: The device's Python cannot load openvino"
    told = " ".join(capsys.readouterr().err.split())
    assert f"other is left out: {reason} (lib is missing)." in told
    check_measured(found, ([first, single], suites), "local")

    written = run_benchmark(found, suites, tmp_path / "out", speed=SHORT)
    assert {(row.device, row.provider) for row in written.latency} == {
        ("local", "CPUExecutionProvider")
    }
    for one, row in zip(found, written.latency, strict=True):
        assert one.measured is not None
        assert (one.measured.result.whole.samples.samples_ms > one.measured.result.prepare_ms).all()
        assert row.end_to_end_p50_ms is not None
        assert row.end_to_end_p50_ms > row.prepare_p50_ms > 0
        assert row.peak_rss_mb is not None
        assert 20 < row.peak_rss_mb < 1000
    [facts] = written.environment["devices"]
    assert facts["artifacts"] == {
        "r/fp32@local": {"agreement_here": None, "same_pixels": 1.0},
        "r/single@local": {"agreement_here": 1.0, "same_pixels": 1.0},
    }
    assert facts["emulated"] is False
    assert read_report(tmp_path / "out") == written
    row = next(row for row in written.accuracy if row.suite == "id")
    [here] = predict_suite([first], suites[0])
    assert row.top1 == pytest.approx((here.argmax(axis=1) == suites[0].labels).mean())

    rows = throughput_rows(found, [], speed)
    grid = [(f"{name}@local", batch, 1) for name in ("fp32", "single") for batch in (1, 4)]
    assert [(row.subject, row.batch, row.threads) for row in rows] == grid
    rates = [rate for one in found if one.measured for rate in one.measured.result.rates]
    assert (rows[-1].images_per_s, rows[-1].calls, rates[-1].clock) == (None, 0, None)
    assert "made for one image at a time, not for 4" in str(rows[-1].reason)
    for row, rate in zip(rows[:-1], rates[:-1], strict=True):
        assert rate.clock is not None
        times = rate.clock.samples.samples_ms
        assert row.calls == len(times) >= BRIEF.runs
        assert row.images_per_s == pytest.approx(row.batch / (times.mean() / 1000))

    # What is kept there is not sent again, and without `keep` nothing is left behind.
    kept = sorted(path.name.split("-")[0] for path in (cache_root() / "device").iterdir())
    assert kept == ["artifact", "artifact", "edgekd", "images"]
    devices.on_devices([silent, single], suites, ["local"], ONE_THREAD)
    assert "copying 0.0 MB; 5 of 6 files are there" in " ".join(capsys.readouterr().err.split())
    assert not (cache_root() / "device").exists()
    with pytest.raises(EdgekdError, match=reason):
        devices.on_devices([other], suites, ["local"], SHORT)


def test_a_bundle_is_carried_there_and_back(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    """From `--device bundle:` over `--import` to the report, with what a run would give put in place of a run."""
    subjects, suites = setting
    gathered = gather.Gathered(*setting, [], tmp_path)
    monkeypatch.setattr(gather, "gather", lambda *_, **__: gathered)
    folder = tmp_path / "carried"

    def run(*words: str, code: int = 0) -> dict[str, str]:
        with pytest.raises(SystemExit) as left:
            main(["benchmark", str(tmp_path), *words])
        printed = capsys.readouterr()
        assert left.value.code == code, printed.err
        return dict(line.split(":", 1) for line in printed.out.splitlines() if ":" in line)

    images = ("--ood", "a=my pictures", "--unknown", "c=strange", "--texture-shape", "cues")
    grid = ("--batch-sizes", "2", "--thread-counts", "1")
    told = run("--device", f"bundle:{folder}", "--quick", "--threads", "1", *grid, *images)
    after = ["edgekd", "benchmark", str(tmp_path), *images, "--import", "RESULT"]
    assert shlex.split(told["then"]) == after
    assert told["there"].strip() in (folder / "README.txt").read_text()
    there = told["there"].split()
    assert there[:3] == ["python3", "edgekd-agent.pyz", "run"]
    subprocess.run([sys.executable, *there[1:]], cwd=folder, check=True, capture_output=True)
    result = folder / there[3] / "edgekd-result.npz"
    run("--import", str(result), "--out", str(tmp_path / "out"))
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {row["device"] for row in written["latency"]} == {result_of(result).name}
    assert written["quick"] is True
    run("--import", str(result), "--device", "local", code=2)

    measured, quick = devices.from_result(subjects, suites, result)
    assert quick
    check_measured(measured, setting, result_of(result).name)
    rates = [rate for one in measured if one.measured for rate in one.measured.result.rates]
    assert [(rate.batch, rate.threads, rate.reason) for rate in rates] == [(2, 1, None)] * 2
    with pytest.raises(EdgekdError, match="is of other artifacts or images: r/fp32, r/other"):
        devices.from_result(subjects[:1], suites, result)
    with pytest.raises(EdgekdError, match="exists already"):
        devices.bundle(subjects, suites, folder, SHORT)
    arrays, facts = read_step(result)
    facts["job"]["protocol"]["runs"] = 1
    write_step(tmp_path / "other-rule.npz", arrays, facts)
    with pytest.raises(EdgekdError, match="by another rule"):
        devices.from_result(subjects, suites, tmp_path / "other-rule.npz")
    result.write_bytes(result.read_bytes()[:5000])
    with pytest.raises(EdgekdError, match="result"):
        result_of(result)


def test_files_that_the_agent_cannot_run_are_left_out_aloud(
    setting: Setting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    subjects, suites = setting
    change_format(tmp_path / "artifacts" / "other", "coreml")
    devices.bundle(subjects, suites, tmp_path / "bundle", SHORT)
    assert "other is left out" in capsys.readouterr().err
    [job] = (tmp_path / "bundle").glob("job-*/job.json")
    assert [one["name"] for one in json.loads(job.read_text())["artifacts"]] == ["r/fp32"]
    with pytest.raises(EdgekdError, match="no artifact for the device"):
        devices.on_devices(subjects[1:], suites, ["local"], SHORT)


FAKE_ADB = """#!{python}
import shlex, subprocess, sys
assert sys.argv[1:5] == ["-s", "SERIAL1", "shell", "-T"], sys.argv
words = shlex.split(sys.argv[5])
assert words[:2] == ["run-as", "com.termux"]
assert words[2].endswith("/usr/bin/env") and words[-3].endswith("/usr/bin/sh") and words[-2] == "-c"
line = words[-1].replace("/data/data/com.termux/files/usr/bin/python3", sys.executable)
sys.exit(subprocess.run(["sh", "-c", line], env={{"HOME": {home!r}, "PATH": "/usr/bin:/bin"}}).returncode)
"""


def test_adb_speaks_to_termux(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an `adb` that runs here what it is told to run there: no Android device took part."""
    home, program = tmp_path / "home", tmp_path / "bin" / "adb"
    home.mkdir()
    program.parent.mkdir()
    program.write_text(FAKE_ADB.format(python=sys.executable, home=str(home)))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    (tmp_path / "agent").write_bytes(bytes(range(256)))
    device = find_device("adb:SERIAL1")
    root = Path(device.begin(tmp_path / "agent", "a b"))
    assert root.is_relative_to(home)
    assert (root / "a b").read_bytes() == bytes(range(256))
    words = [device.program, "-c", "import sys; sys.stdout.write(sys.argv[1])", "it's $HOME"]
    code, errors = drive.receive(device.command(words), out := io.BytesIO(), 100)
    assert (code, out.getvalue(), errors) == (0, b"it's $HOME", "")


def test_no_space_is_refused_before_anything_is_sent(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    subjects, suites = setting
    monkeypatch.setattr(drive, "SPARE", 10**18)
    with pytest.raises(EdgekdError, match=r"local has \d+ MB free; this needs 1000000000000 MB"):
        devices.on_devices(subjects[:1], suites, ["local"], SHORT)
    assert [path.name.split("-")[0] for path in (cache_root() / "device").iterdir()] == ["edgekd"]


def test_ssh_form_is_taken_apart() -> None:
    device = find_device("ssh://pi@Raspi.local:2222?python=~/venv/bin/python")
    command = device.command(["a", "b c"])
    device.close()
    assert (device.name, device.program) == ("Raspi.local", "~/venv/bin/python")
    assert command[0] == "ssh"
    assert command[command.index("-p") + 1] == "2222"
    assert command[-3:] == ["--", "pi@Raspi.local", "a 'b c'"]
