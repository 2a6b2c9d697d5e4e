"""Artifacts measured by the agent: the same answers as here, in the same report, whatever lies between."""

from __future__ import annotations

import json
import shlex
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from benchmark_fakes import ONE_THREAD, SHORT
from device_fakes import (
    BRIEF,
    artifact_subject,
    result_of,
    run_agent,
    two_suites,
    write_artifact,
    write_images,
)

from edgekd.benchmark import device as devices
from edgekd.benchmark.benchmark import run_benchmark
from edgekd.benchmark.evaluate.logits import predict_suite
from edgekd.benchmark.measure import timings
from edgekd.benchmark.measure.timings import throughput_rows
from edgekd.benchmark.report import write
from edgekd.benchmark.results.storage import read_report
from edgekd.benchmark.subjects import Subject, Suite
from edgekd.configs.benchmark import SpeedOptions
from edgekd.core.errors import EdgekdError
from edgekd.core.files import cache_root
from edgekd.targets.devices import drive
from edgekd.targets.devices.transports import find_device
from edgekd.targets.timing import stopwatch


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    monkeypatch.setattr(devices, "QUICK", BRIEF)
    monkeypatch.setattr(stopwatch, "QUICK", BRIEF)
    monkeypatch.setattr(timings, "RATE_QUICK", replace(BRIEF, name="throughput, quick"))


@pytest.fixture
def setting(tmp_path: Path) -> tuple[list[Subject], list[Suite]]:
    images = write_images(tmp_path / "images")
    subjects = [
        artifact_subject(write_artifact(tmp_path / "artifacts" / name))
        for name in ("fp32", "other")
    ]
    return subjects, two_suites(images)


def check_measured(
    found: list[Subject], subjects: list[Subject], suites: list[Suite], device: str
) -> None:
    """Every answer is the one given here, every process has its samples."""
    assert [one.name for one in found] == [f"{one.name}@{device}" for one in subjects]
    for one, original in zip(found, subjects, strict=True):
        assert one.measured is not None
        assert one.measured.same_pixels == 1.0
        for n, suite in enumerate(suites):
            [here] = predict_suite([original], suite)
            np.testing.assert_allclose(one.measured.logits[n], here, rtol=1e-5)
        [clock] = one.measured.result.model
        assert (clock.provider, clock.threads) == ("CPUExecutionProvider", 1)
        assert len(clock.samples.samples_ms) >= BRIEF.runs
        assert clock.samples.complete
        assert (one.measured.result.whole.samples.samples_ms > one.measured.result.prepare_ms).all()
        assert one.measured.result.whole.peak_rss_mb is not None
        assert 20 < one.measured.result.whole.peak_rss_mb < 1000


def test_local_agent_gives_a_report_like_any_other(
    setting: tuple[list[Subject], list[Suite]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subjects, suites = setting
    found = devices.on_devices(subjects, suites, ["local"], ONE_THREAD)
    check_measured(found, subjects, suites, "local")
    assert not (cache_root() / "device").exists(), "nothing is left behind"
    monkeypatch.setattr(write, "draw_picture", lambda _, path: path.touch())
    written = run_benchmark(found, suites, tmp_path / "out", speed=SHORT)
    assert [row.device for row in written.latency] == ["local", "local"]
    for row in written.latency:
        assert row.end_to_end_p50_ms is not None
        assert row.end_to_end_p50_ms > row.prepare_p50_ms > 0
    [facts] = written.environment["devices"]
    assert facts["artifacts"]["r/fp32@local"] == {"agreement_here": 1.0, "same_pixels": 1.0}
    assert facts["emulated"] is False
    assert read_report(tmp_path / "out") == written
    assert "local" in (tmp_path / "out" / "report.md").read_text()


def test_files_that_the_agent_cannot_run_are_left_out_aloud(
    setting: tuple[list[Subject], list[Suite]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
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
    setting: tuple[list[Subject], list[Suite]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The others are measured; and this machine need not have the runtime either."""
    subjects, suites = setting
    folder = tmp_path / "artifacts" / "other"
    manifest = json.loads((folder / "artifact.json").read_text()) | {"format": "openvino"}
    (folder / "artifact.json").write_text(json.dumps(manifest))
    (tmp_path / "planted").mkdir()
    (tmp_path / "planted" / "openvino.py").write_text(
        "raise ImportError('libopenvino.so is missing')"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "planted"))
    found = devices.on_devices(subjects, suites, ["local"], ONE_THREAD)
    check_measured(found, subjects[:1], suites, "local")
    said = " ".join(capsys.readouterr().err.split())
    assert (
        "other is left out: local: The device's Python cannot load openvino (libopenvino.so is missing)."
        in said
    )
    with pytest.raises(EdgekdError, match="local: The device's Python cannot load openvino"):
        devices.on_devices(subjects[1:], suites, ["local"], SHORT)


def test_an_artifact_that_does_not_run_here_is_measured_all_the_same(
    setting: tuple[list[Subject], list[Suite]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subjects, suites = setting
    monkeypatch.setattr(write, "draw_picture", lambda _, path: path.touch())

    def predict(images: object) -> np.ndarray:
        raise AssertionError("it was asked here")

    silent = replace(subjects[0], predict=predict, here=False)
    found = devices.on_devices([silent], suites, ["local"], ONE_THREAD)
    written = run_benchmark(found, suites, tmp_path / "out", speed=SHORT)
    [facts] = written.environment["devices"]
    assert facts["artifacts"]["r/fp32@local"] == {"agreement_here": None, "same_pixels": 1.0}
    assert read_report(tmp_path / "out") == written
    assert "| r/fp32@local | 100.0 |" in (tmp_path / "out" / "report.md").read_text()
    [row] = [row for row in written.accuracy if row.suite == "id"]
    [here] = predict_suite(subjects[:1], suites[0])
    assert row.top1 == pytest.approx((here.argmax(axis=1) == suites[0].labels).mean())


def test_keep_leaves_what_need_not_be_sent_again(
    setting: tuple[list[Subject], list[Suite]], monkeypatch: pytest.MonkeyPatch
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


def test_the_agent_takes_the_throughput_too(
    setting: tuple[list[Subject], list[Suite]], tmp_path: Path
) -> None:
    """One process for each entry; a file made for one image at a time says so and stops nothing."""
    subjects, suites = setting
    single = artifact_subject(write_artifact(tmp_path / "artifacts" / "single", batch=1))
    speed = SpeedOptions(quick=True, threads=1, batch_sizes=(1, 4), thread_counts=(1, 2))
    found = devices.on_devices([subjects[0], single], suites, ["local"], speed)
    rows = throughput_rows(found, [], speed)
    assert [(row.subject, row.batch, row.threads) for row in rows] == [
        (f"{name}@local", batch, threads)
        for name in ("fp32", "single")
        for batch in (1, 4)
        for threads in (1, 2)
    ]
    rates = [rate for one in found if one.measured for rate in one.measured.result.rates]
    for row, rate in zip(rows, rates, strict=True):
        assert row.device == "local"
        if (row.subject, row.batch) == ("single@local", 4):
            assert (row.images_per_s, row.calls, rate.clock) == (None, 0, None)
            assert (
                row.reason
                == "The file is made for one image at a time, not for 4. Use smaller batches."
            )
        else:
            assert rate.clock is not None
            times = rate.clock.samples.samples_ms
            assert row.calls == len(times) >= BRIEF.runs
            assert row.images_per_s == pytest.approx(row.batch / (times.mean() / 1000))


def test_bundle_is_carried_there_and_back(
    setting: tuple[list[Subject], list[Suite]], tmp_path: Path
) -> None:
    subjects, suites = setting
    folder = tmp_path / "bundle"
    line = devices.bundle(
        subjects,
        suites,
        folder,
        ONE_THREAD.model_copy(update={"batch_sizes": (2,), "thread_counts": (1,)}),
    )
    assert line in (readme := (folder / "README.txt").read_text())
    assert "Pillow 10.1 or newer, and onnxruntime." in readme
    words = line.split()
    assert words[:3] == ["python3", "edgekd-agent.pyz", "run"]
    subprocess.run([sys.executable, *words[1:]], cwd=folder, check=True, capture_output=True)
    result = folder / words[3] / "edgekd-result.npz"
    name = result_of(result).name
    measured, quick = devices.from_result(subjects, suites, result)
    assert quick
    assert [(r.batch, r.threads, r.reason) for one in measured if one.measured for r in one.measured.result.rates] == [
        (2, 1, None), (2, 1, None)
    ]  # fmt: skip
    check_measured(measured, subjects, suites, name)
    with pytest.raises(EdgekdError, match="is of other artifacts or images: r/fp32, r/other"):
        devices.from_result(subjects[:1], suites, result)
    with pytest.raises(EdgekdError, match="exists already"):
        devices.bundle(subjects, suites, folder, SHORT)
    whole = result.read_bytes()
    result.write_bytes(whole[: len(whole) // 2])
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
    setting: tuple[list[Subject], list[Suite]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    check_measured(found, subjects[:1], suites, "SERIAL1")
    assert not (home / ".cache" / "edgekd-agent").exists()


def test_no_space_is_refused_before_anything_is_sent(
    setting: tuple[list[Subject], list[Suite]], monkeypatch: pytest.MonkeyPatch
) -> None:
    subjects, suites = setting
    monkeypatch.setattr(drive, "SPARE", 10**18)
    with pytest.raises(EdgekdError, match=r"local has \d+ MB free; this needs 1000000000000 MB"):
        devices.on_devices(subjects[:1], suites, ["local"], SHORT)
    assert [path.name.split("-")[0] for path in (cache_root() / "device").iterdir()] == ["edgekd"]


def test_a_device_without_the_runtime_is_refused(
    setting: tuple[list[Subject], list[Suite]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subjects, suites = setting
    (tmp_path / "planted").mkdir()
    (tmp_path / "planted" / "onnxruntime.py").write_text(
        "raise ImportError('libonnx.so is missing')"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "planted"))
    with pytest.raises(
        EdgekdError, match=r"local: .* cannot load onnxruntime \(libonnx.so is missing\)"
    ) as caught:
        devices.on_devices(subjects[:1], suites, ["local"], SHORT)
    assert "pip install onnxruntime" in caught.value.hint


@pytest.mark.parametrize(
    "spec",
    ["sssh://x", "ssh://", "ssh://-oProxyCommand=x", "ssh://a b", "ssh://h?pyton=x", "adb:-x"],
)
def test_what_is_no_device_is_refused(spec: str) -> None:
    with pytest.raises(EdgekdError):
        find_device(spec)


def test_ssh_form_is_taken_apart() -> None:
    device = find_device("ssh://pi@Raspi.local:2222?python=~/venv/bin/python")
    command = device.command(["a", "b c"])
    device.close()
    assert (device.name, device.program) == ("Raspi.local", "~/venv/bin/python")
    assert command[0] == "ssh"
    assert command[command.index("-p") + 1] == "2222"
    assert command[-2:] == ["pi@Raspi.local", "a 'b c'"]


def test_a_result_for_another_rule_is_refused(
    setting: tuple[list[Subject], list[Suite]], tmp_path: Path
) -> None:
    subjects, suites = setting
    line = devices.bundle(subjects[:1], suites, tmp_path / "b", ONE_THREAD)
    job = tmp_path / "b" / line.split()[3]
    told = json.loads((job / "job.json").read_text())
    (job / "job.json").write_text(json.dumps(told | {"protocol": told["protocol"] | {"runs": 1}}))
    code, _ = run_agent(sys.executable, tmp_path / "b" / "edgekd-agent.pyz", "run", str(job))
    assert code == 0
    with pytest.raises(EdgekdError, match="by another rule"):
        devices.from_result(subjects[:1], suites, job / "edgekd-result.npz")


def test_the_command_line_measures_the_same(
    setting: tuple[list[Subject], list[Suite]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """From `--device bundle:` over `--import` to the report, with what a run would give put in place of a run."""
    from edgekd.cli import main
    from edgekd.evaluation import gather as measure

    subjects, suites = setting
    monkeypatch.setattr(
        measure, "gather", lambda *_, **__: measure.Gathered(subjects, suites, [], tmp_path)
    )
    monkeypatch.setattr(write, "draw_picture", lambda _, path: path.touch())
    folder = tmp_path / "carried"

    def run(*words: str) -> str:
        with pytest.raises(SystemExit) as left:
            main(["benchmark", str(tmp_path), *words])
        printed = capsys.readouterr()
        assert left.value.code == 0, printed.err
        return printed.out

    images = (
        "--ood",
        "a=my pictures",
        "--ood",
        "b=others",
        "--unknown",
        "c=strange",
        "--texture-shape",
        "cues",
    )
    told = run("--device", f"bundle:{folder}", "--quick", "--threads", "1", *images)
    [after] = [
        line.partition("edgekd ")[2] for line in told.splitlines() if line.startswith("then:")
    ]
    assert shlex.split(after) == ["benchmark", str(tmp_path), *images, "--import", "RESULT"]
    line = next(line for line in told.splitlines() if line.startswith("there:")).split()[1:]
    subprocess.run([sys.executable, *line[1:]], cwd=folder, check=True, capture_output=True)
    result = folder / line[3] / "edgekd-result.npz"
    name = result_of(result).name
    told = run("--import", str(result), "--out", str(tmp_path / "out"))
    assert f"fp32@{name}" in told
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {row["device"] for row in written["latency"]} == {name}
    assert written["quick"] is True
    assert f"### Device {name}\n" in (tmp_path / "out" / "report.md").read_text()
    with pytest.raises(SystemExit) as left:
        main(["benchmark", str(tmp_path), "--import", str(result), "--device", "local"])
    assert left.value.code == 2
    assert "do not go together" in capsys.readouterr().err
