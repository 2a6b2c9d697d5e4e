from __future__ import annotations

import json
import os
import shlex
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from artifact_fakes import write_artifact
from benchmark_fakes import ONE_THREAD, SHORT
from device_fakes import (
    BRIEF,
    Setting,
    artifact_subject,
    be_brief,
    check_measured,
    plant,
    result_of,
    run_agent,
    two_suites,
    write_images,
)

from edgekd.benchmark import device as devices
from edgekd.benchmark.benchmark import run_benchmark
from edgekd.benchmark.evaluate.predictions import predict_suite
from edgekd.benchmark.measure.timings import throughput_rows
from edgekd.benchmark.report import write
from edgekd.benchmark.results.storage import read_report
from edgekd.cli import main
from edgekd.configs.benchmark import SpeedOptions
from edgekd.core.errors import EdgekdError
from edgekd.core.files import cache_root
from edgekd.evaluation import gather
from edgekd.targets.agent.messages import converse
from edgekd.targets.devices import drive
from edgekd.targets.devices.transports import find_device


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    be_brief(monkeypatch)


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    images = write_images(tmp_path / "images")
    folders = [write_artifact(tmp_path / "artifacts" / name) for name in ("fp32", "other")]
    return [artifact_subject(folder) for folder in folders], two_suites(images)


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
    code = "import sys\nwhile True: sys.stdout.write('x' * 10**6)"
    with pytest.raises(EdgekdError, match="sends more"):
        converse([sys.executable, "-c", code], print)


def test_a_path_with_nul_from_a_device_is_one_sentence(tmp_path: Path) -> None:
    device = drive.Device("board", sys.executable)
    with pytest.raises(EdgekdError, match="NUL"):
        drive.call(device, ["run", "/nowhere/x\0y"])
    with open(tmp_path / "result", "wb") as out, pytest.raises(EdgekdError, match="NUL"):
        drive.receive([sys.executable, "/nowhere/x\0y"], out, 10)


def test_local_agent_gives_a_report_like_any_other(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subjects, suites = setting
    found = devices.on_devices(subjects, suites, ["local"], ONE_THREAD)
    check_measured(found, setting, "local")
    assert not (cache_root() / "device").exists(), "nothing is left behind"
    monkeypatch.setattr(write, "draw_picture", lambda _, path: path.touch())
    written = run_benchmark(found, suites, tmp_path / "out", speed=SHORT)
    assert {(row.device, row.provider) for row in written.latency} == {
        ("local", "CPUExecutionProvider")
    }
    for one in found:
        assert one.measured is not None
        assert (one.measured.result.whole.samples.samples_ms > one.measured.result.prepare_ms).all()
    for row in written.latency:
        assert row.end_to_end_p50_ms is not None
        assert row.end_to_end_p50_ms > row.prepare_p50_ms > 0
        assert row.peak_rss_mb is not None
        assert 20 < row.peak_rss_mb < 1000
    [facts] = written.environment["devices"]
    assert facts["artifacts"]["r/fp32@local"] == {"agreement_here": 1.0, "same_pixels": 1.0}
    assert facts["emulated"] is False
    assert read_report(tmp_path / "out") == written
    assert "local" in (tmp_path / "out" / "report.md").read_text()


def test_files_that_the_agent_cannot_run_are_left_out_aloud(
    setting: Setting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    subjects, suites = setting
    manifest = tmp_path / "artifacts" / "other" / "artifact.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": "coreml"}))
    devices.bundle(subjects, suites, tmp_path / "bundle", SHORT)
    assert "other is left out: the agent on a device runs" in (said := capsys.readouterr().err)
    assert "files, not coreml" in " ".join(said.split())
    [job] = (tmp_path / "bundle").glob("job-*/job.json")
    assert [one["name"] for one in json.loads(job.read_text())["artifacts"]] == ["r/fp32"]
    with pytest.raises(EdgekdError, match="no artifact for the device"):
        devices.on_devices(subjects[1:], suites, ["local"], SHORT)


def test_a_runtime_that_the_device_lacks_leaves_its_artifacts_out(
    setting: Setting,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The others are measured; and this machine need not have the runtime either."""
    subjects, suites = setting
    folder = tmp_path / "artifacts" / "other"
    manifest = json.loads((folder / "artifact.json").read_text()) | {"format": "openvino"}
    (folder / "artifact.json").write_text(json.dumps(manifest))
    plant(monkeypatch, tmp_path / "planted", "openvino", "raise ImportError('lib is missing')")
    found = devices.on_devices(subjects, suites, ["local"], ONE_THREAD)
    check_measured(found, (subjects[:1], suites), "local")
    said = " ".join(capsys.readouterr().err.split())
    reason = "local: The device's Python cannot load openvino"
    assert f"other is left out: {reason} (lib is missing)." in said
    with pytest.raises(EdgekdError, match=reason):
        devices.on_devices(subjects[1:], suites, ["local"], SHORT)


def test_an_artifact_that_does_not_run_here_is_measured_all_the_same(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subjects, suites = setting
    monkeypatch.setattr(write, "draw_picture", lambda _, path: path.touch())

    def predict(images: object) -> np.ndarray:
        raise AssertionError("it ran here")

    silent = replace(subjects[0], predict=predict, here=False)
    found = devices.on_devices([silent], suites, ["local"], ONE_THREAD)
    written = run_benchmark(found, suites, tmp_path / "out", speed=SHORT)
    [facts] = written.environment["devices"]
    assert facts["artifacts"]["r/fp32@local"] == {"agreement_here": None, "same_pixels": 1.0}
    [row] = [row for row in written.accuracy if row.suite == "id"]
    [here] = predict_suite(subjects[:1], suites[0])
    assert row.top1 == pytest.approx((here.argmax(axis=1) == suites[0].labels).mean())


def test_keep_leaves_what_need_not_be_sent_again(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    subjects, suites = setting
    said: list[str] = []
    monkeypatch.setattr(drive, "say", said.append)
    devices.on_devices(subjects[:1], suites, ["local"], ONE_THREAD, keep=True)
    kept = sorted(path.name.split("-")[0] for path in (cache_root() / "device").iterdir())
    assert kept == ["artifact", "edgekd", "images"]
    said.clear()
    devices.on_devices(subjects[:1], suites, ["local"], ONE_THREAD)
    assert [line for line in said if "copying" in line] == [
        "local: copying 0.0 MB; 3 of 4 files are there already"
    ]
    assert not (cache_root() / "device").exists()


def test_the_agent_measures_the_throughput_too(setting: Setting, tmp_path: Path) -> None:
    """One process for each entry; a file made for one image at a time says so and stops nothing."""
    subjects, suites = setting
    single = artifact_subject(write_artifact(tmp_path / "artifacts" / "single", batch=1))
    speed = SpeedOptions(quick=True, threads=1, batch_sizes=(1, 4), thread_counts=(1,))
    found = devices.on_devices([subjects[0], single], suites, ["local"], speed)
    rows = throughput_rows(found, [], speed)
    names = ("fp32@local", "single@local")
    grid = [(name, batch, 1) for name in names for batch in (1, 4)]
    assert [(row.subject, row.batch, row.threads) for row in rows] == grid
    rates = [rate for one in found if one.measured for rate in one.measured.result.rates]
    assert (rows[-1].images_per_s, rows[-1].calls, rates[-1].clock) == (None, 0, None)
    assert "made for one image at a time, not for 4" in str(rows[-1].reason)
    for row, rate in zip(rows[:-1], rates[:-1], strict=True):
        assert rate.clock is not None
        times = rate.clock.samples.samples_ms
        assert row.calls == len(times) >= BRIEF.runs
        assert row.images_per_s == pytest.approx(row.batch / (times.mean() / 1000))


def test_bundle_is_carried_there_and_back(setting: Setting, tmp_path: Path) -> None:
    subjects, suites = setting
    folder, grid = tmp_path / "bundle", {"batch_sizes": (2,), "thread_counts": (1,)}
    line = devices.bundle(subjects, suites, folder, ONE_THREAD.model_copy(update=grid))
    assert line in (folder / "README.txt").read_text()
    words = line.split()
    assert words[:3] == ["python3", "edgekd-agent.pyz", "run"]
    subprocess.run([sys.executable, *words[1:]], cwd=folder, check=True, capture_output=True)
    result = folder / words[3] / "edgekd-result.npz"
    measured, quick = devices.from_result(subjects, suites, result)
    assert quick
    rates = [rate for one in measured if one.measured for rate in one.measured.result.rates]
    assert [(rate.batch, rate.threads, rate.reason) for rate in rates] == [(2, 1, None)] * 2
    check_measured(measured, setting, result_of(result).name)
    with pytest.raises(EdgekdError, match="is of other artifacts or images: r/fp32, r/other"):
        devices.from_result(subjects[:1], suites, result)
    with pytest.raises(EdgekdError, match="exists already"):
        devices.bundle(subjects, suites, folder, SHORT)
    result.write_bytes(result.read_bytes()[:5000])
    with pytest.raises(EdgekdError, match="result"):
        result_of(result)


FAKE_ADB = """#!{python}
import shlex, subprocess, sys
assert sys.argv[1:5] == ["-s", "SERIAL1", "shell", "-T"], sys.argv
words = shlex.split(sys.argv[5])
assert words[:2] == ["run-as", "com.termux"]
assert words[2].endswith("/usr/bin/env") and words[-3].endswith("/usr/bin/sh") and words[-2] == "-c"
line = words[-1].replace("/data/data/com.termux/files/usr/bin/python3", sys.executable)
sys.exit(subprocess.run(["sh", "-c", line], env={{"HOME": {home!r}, "PATH": "/usr/bin:/bin"}}).returncode)
"""


def test_adb_speaks_to_termux(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an `adb` that runs here what it is told to run there: no Android device took part."""
    subjects, suites = setting
    home, program = tmp_path / "home", tmp_path / "bin" / "adb"
    home.mkdir()
    program.parent.mkdir()
    program.write_text(FAKE_ADB.format(python=sys.executable, home=str(home)))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    found = devices.on_devices(subjects[:1], suites, ["adb:SERIAL1"], ONE_THREAD)
    check_measured(found, (subjects[:1], suites), "SERIAL1")
    assert not (home / ".cache" / "edgekd-agent").exists()


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
    assert command[-2:] == ["pi@Raspi.local", "a 'b c'"]


@pytest.mark.parametrize("when", ["at the first words", "with its result"])
def test_a_device_that_sends_on_and_on_fills_nothing(
    setting: Setting,
    tmp_path: Path,
    when: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A program called `ssh` that runs everything here, and floods in the given place."""
    part = "mkdir" if when == "at the first words" else " send "
    own = tmp_path / "bin" / "ssh"
    own.parent.mkdir()
    own.write_text(
        f'#!/bin/sh\nfor line; do :; done\ncase "$line" in *{part!r}*) exec cat /dev/zero;; esac\nexec sh -c "$line"\n'
    )
    own.chmod(0o755)
    monkeypatch.setenv("PATH", f"{own.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "there"))
    monkeypatch.setattr(drive, "LARGEST_RESULT", 1 << 21)
    subjects, suites = setting
    device = f"ssh://board?python={sys.executable}"
    with pytest.raises(EdgekdError, match="sends more"):
        devices.on_devices(subjects[:1], suites, [device], ONE_THREAD)


def test_a_result_for_another_rule_is_refused(setting: Setting, tmp_path: Path) -> None:
    subjects, suites = setting
    line = devices.bundle(subjects[:1], suites, tmp_path / "b", ONE_THREAD)
    job = tmp_path / "b" / line.split()[3]
    told = json.loads((job / "job.json").read_text())
    (job / "job.json").write_text(json.dumps(told | {"protocol": told["protocol"] | {"runs": 1}}))
    code, _ = run_agent(sys.executable, tmp_path / "b" / "edgekd-agent.pyz", "run", str(job))
    assert code == 0
    with pytest.raises(EdgekdError, match="by another rule"):
        devices.from_result(subjects[:1], suites, job / "edgekd-result.npz")


def test_the_command_line_carries_a_bundle_too(
    setting: Setting,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """From `--device bundle:` over `--import` to the report, with what a run would give put in place of a run."""
    gathered = gather.Gathered(*setting, [], tmp_path)
    monkeypatch.setattr(gather, "gather", lambda *_, **__: gathered)
    monkeypatch.setattr(write, "draw_picture", lambda _, path: path.touch())
    folder = tmp_path / "carried"

    def run(*words: str, code: int = 0) -> dict[str, str]:
        with pytest.raises(SystemExit) as left:
            main(["benchmark", str(tmp_path), *words])
        printed = capsys.readouterr()
        assert left.value.code == code, printed.err
        return dict(line.split(":", 1) for line in printed.out.splitlines() if ":" in line)

    images = ("--ood", "a=my pictures", "--unknown", "c=strange", "--texture-shape", "cues")
    told = run("--device", f"bundle:{folder}", "--quick", "--threads", "1", *images)
    after = ["edgekd", "benchmark", str(tmp_path), *images, "--import", "RESULT"]
    assert shlex.split(told["then"]) == after
    there = told["there"].split()
    subprocess.run([sys.executable, *there[1:]], cwd=folder, check=True, capture_output=True)
    result = folder / there[3] / "edgekd-result.npz"
    run("--import", str(result), "--out", str(tmp_path / "out"))
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {row["device"] for row in written["latency"]} == {result_of(result).name}
    assert written["quick"] is True
    run("--import", str(result), "--device", "local", code=2)
