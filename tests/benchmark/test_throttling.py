from __future__ import annotations

import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from artifact_fakes import write_artifact
from PIL import Image

from edgekd.benchmark.measure import local
from edgekd.benchmark.measure.local import measure_artifacts
from edgekd.benchmark.measure.timings import energy_row
from edgekd.benchmark.report.summary import throttle_notes
from edgekd.core import machine
from edgekd.core.errors import EdgekdError
from edgekd.targets.agent import steps
from edgekd.targets.agent.job import read_job
from edgekd.targets.devices.result import Clocked, Energy
from edgekd.targets.timing import energy
from edgekd.targets.timing.energy import Meter, Sensor, Source, open_sensor
from edgekd.targets.timing.stopwatch import LatencySamples, Protocol, measure_interleaved


def write(root: Path, place: str, **files: str) -> Path:
    """Write files of /sys, in a folder of it."""
    folder = root / "sys" / place
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text + "\n")
    return folder


def test_an_x86_machine_by_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    cpu = "devices/system/cpu"
    write(tmp_path, cpu, **{
        "cpu0/cpufreq/scaling_cur_freq": "2400123",
        "cpu0/thermal_throttle/core_throttle_count": "3",
        "cpu0/thermal_throttle/package_throttle_count": "10",
        "cpu0/thermal_throttle/core_throttle_total_time_ms": "999",
        "cpu1/thermal_throttle/core_throttle_count": "4",
    })  # fmt: skip
    for zone, heat in enumerate(("41000", "67500", "")):
        write(tmp_path, f"class/thermal/thermal_zone{zone}", temp=heat)
    write(tmp_path, "firmware/acpi", platform_profile="balanced")
    found = machine.state(tmp_path)
    found.pop("load_average")
    assert found == {"cpu_mhz": 2400, "temperature_c": 67.5, "throttle_count": 17, "throttle_flags": None,
                     "power_mode": "balanced"}  # fmt: skip
    # Boards have tools instead.
    for name, text in (("vcgencmd", "throttled=0x50000"), ("nvpmodel", "NV Power Mode: MAXN\\n0")):
        (tmp_path / name).write_text(f"#!/bin/sh\nprintf '{text}\\n'\n")
        (tmp_path / name).chmod(0o755)
    found = machine.state(tmp_path / "nothing")
    assert (found["throttle_flags"], found["power_mode"]) == ("0x50000", "MAXN")
    assert found["temperature_c"] is found["throttle_count"] is None


NOTHING = dict.fromkeys(("temperature_c", "throttle_count", "throttle_flags", "power_mode"))


def remarks(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return list(throttle_notes({"before": NOTHING | before, "after": NOTHING | after}))


def test_throttling_while_measuring_is_noted() -> None:
    [said] = remarks(
        {"throttle_count": 5, "temperature_c": 60.0}, {"throttle_count": 7, "temperature_c": 91.5}
    )
    assert "The processor throttled 2 times while measuring (temperature 60 °C before" in said
    [said] = remarks({"power_mode": "MAXN"}, {"power_mode": "15W"})
    assert "from power mode MAXN to 15W" in said
    facts = {"device": "pi", "before": NOTHING | {"throttle_flags": "0x10000"}}
    facts["after"] = NOTHING | {"throttle_flags": "0x50002"}
    # Bit 18 is new, bit 1 is raised now, bit 16 was there before.
    [said] = throttle_notes({"before": NOTHING, "after": NOTHING, "devices": [facts]})
    assert said.startswith("Device pi reported a capped frequency, throttling while measuring")
    same = {"throttle_count": 5, "throttle_flags": "0x50000", "power_mode": "MAXN"}
    assert remarks(same, same) == remarks({}, same) == remarks(same, {}) == []


RULE = Protocol("quick", 5, 0.0, 1.0, 10, 0.5, 10.0, 0.1, 1)


class Time:
    """Seconds that pass only when somebody says so."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def nanoseconds(self) -> int:
        return round(1e9 * self.now)

    def pass_(self, seconds: float) -> None:
        self.now += seconds


def test_rapl_adds_packages_and_memory_and_unwraps_counters(tmp_path: Path) -> None:
    first = write(tmp_path, "class/powercap/intel-rapl:0", name="package-0", energy_uj="9000000",
                  max_energy_range_uj="10000000")  # fmt: skip
    dram = write(tmp_path, "class/powercap/intel-rapl:0:1", name="dram", energy_uj="500000",
                 max_energy_range_uj="10000000")  # fmt: skip
    for zone, name in (("0:0", "core"), ("1", "psys")):
        write(tmp_path, f"class/powercap/intel-rapl:{zone}", name=name, energy_uj="1")
    sensor = open_sensor("rapl", tmp_path)
    assert sensor.covers == "processor: package-0, dram of intel-rapl:0:1"
    clock = Time()
    meter = Meter(sensor, clock)
    meter.begin()
    clock.pass_(2.0)
    (first / "energy_uj").write_text("2000000")  # 9 J → 10 J = 0 J → 2 J
    (dram / "energy_uj").write_text("750000")
    assert meter.end() == (pytest.approx(3.25), 2.0)


def test_jetson_rails(tmp_path: Path) -> None:
    rails = {"in1_label": "VDD_IN", "in1_input": "5000", "curr1_input": "1200", "in2_label": "VDD_SOC",
             "in2_input": "5000", "curr2_input": "300"}  # fmt: skip
    folder = write(tmp_path, "class/hwmon/hwmon3", name="ina3221", **rails)
    other = {"name": "coretemp", "in1_label": "VDD_IN", "in1_input": "1", "curr1_input": "1"}
    write(tmp_path, "class/hwmon/hwmon0", **other)
    sensor = open_sensor("ina", tmp_path)
    assert sensor.covers == "rail VDD_IN"
    clock = Time()
    meter = Meter(sensor, clock)
    meter.begin()
    clock.pass_(2.0)
    (folder / "curr1_input").write_text("2000")
    assert meter.end() == (pytest.approx((6.0 + 10.0) / 2 * 2.0), 2.0)  # between 6 W and 10 W
    # The older driver.
    older = {"rail_name_0": "POM_5V_IN", "in_power0_input": "4250", "rail_name_1": "POM_5V_CPU",
             "in_power1_input": "900"}  # fmt: skip
    write(tmp_path / "older", "bus/i2c/drivers/ina3221x/6-0040/iio:device0", **older)
    sensor = open_sensor("ina", tmp_path / "older")
    assert (sensor.covers, sensor.sources[0].read()) == ("rail POM_5V_IN", pytest.approx(4.25))


def test_sensors_that_cannot_be_read_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("rapl", "ina", "battery"):
        with pytest.raises(EdgekdError, match=f"no sensor {name}"):
            open_sensor(name, tmp_path)
    with pytest.raises(EdgekdError, match="no energy sensor"):
        open_sensor("raple", tmp_path)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(EdgekdError, match="nvidia-ml-py"):
        open_sensor("nvml")
    # A battery only while it feeds the device.
    battery = {"type": "Battery", "current_now": "-400000", "voltage_now": "3850000"}
    folder = write(tmp_path, "class/power_supply/BAT0", status="Discharging", **battery)
    write(tmp_path, "class/power_supply/AC", type="Mains")
    assert open_sensor("battery", tmp_path).sources[0].read() == pytest.approx(0.4 * 3.85)
    (folder / "status").write_text("Charging")
    with pytest.raises(EdgekdError, match="BAT0 is charging"):
        open_sensor("battery", tmp_path)

    def refused() -> float:
        raise PermissionError(13, "Permission denied", "/sys/class/powercap/intel-rapl:0/energy_uj")

    monkeypatch.setattr(energy, "_rapl", lambda root: Sensor("rapl", "", (Source(refused, True),)))
    with pytest.raises(EdgekdError, match=r"may not read the sensor rapl \(/sys/class/powercap"):
        open_sensor("rapl", tmp_path)


def test_nvml_by_the_names_of_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    class NVMLError(Exception):
        pass

    fake = types.SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda n: n,
        nvmlDeviceGetName=lambda board: b"Board 1",
        nvmlDeviceGetTotalEnergyConsumption=lambda board: 12_500,
        nvmlDeviceGetPowerUsage=lambda board: 61_000,
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    sensor = open_sensor("nvml")
    assert (sensor.covers, sensor.sources[0].counts) == ("board Board 1", True)
    assert sensor.sources[0].read() == 12.5

    def older(board: object) -> int:
        raise NVMLError("Not Supported")

    fake.nvmlDeviceGetTotalEnergyConsumption = older
    sensor = open_sensor("nvml")
    assert (sensor.sources[0].counts, sensor.sources[0].read()) == (False, 61.0)


def test_models_that_take_turns_get_their_own_energy() -> None:
    clock = Time()
    drawn = {"joules": 0.0}
    meter = Meter(Sensor("rapl", "a test", (Source(lambda: drawn["joules"], True),)), clock)

    def model(seconds: float, watts: float):  # type: ignore[no-untyped-def]
        def run(_: int) -> None:
            clock.pass_(seconds)
            drawn["joules"] += seconds * watts

        return run

    found = measure_interleaved(
        {"a": model(0.02, 5.0), "b": model(0.05, 2.0)}, RULE, clock=clock.nanoseconds, meter=meter
    )
    for one in found.values():  # the warm-up is outside
        assert one.joules == pytest.approx(0.1 * len(one.samples_ms))
    drawn["joules"] = 0.0
    meter.rest(2.0, lambda seconds: model(seconds, 3.0)(0))
    assert meter.idle_w == pytest.approx(3.0)


@pytest.mark.parametrize(("idle_w", "above"), [(2.0, (80.0 - 40.0) / 400), (None, None)])
def test_energy_per_image_by_hand(idle_w: float | None, above: float | None) -> None:
    """Two processes of 200 images and 10 s each take 30 J and 50 J."""
    parts = []
    for joules in (30.0, 50.0):
        samples = LatencySamples(
            np.ones(200), np.arange(200), 1.0, 5, 1.0, True, True, joules=joules, metered_s=10.0
        )
        sensor = Energy(sensor="ina", covers="rail VDD_IN", idle_w=idle_w)
        parts.append(Clocked(samples, 1.0, "p", 1, sensor))
    row = energy_row(parts)
    assert row is not None
    assert (row.joules_per_image, row.mean_w) == (pytest.approx(0.2), pytest.approx(4.0))
    assert row.joules_per_image_above_idle == (above if above is None else pytest.approx(above))
    assert energy_row([*parts, replace(parts[0], energy=None)]) is None


def test_the_agent_reads_the_declared_sensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A latency step in this process: a battery at 2 W, so every image takes 2 W times its time."""
    battery = {"type": "Battery", "status": "Discharging", "power_now": "2000000"}
    write(tmp_path, "class/power_supply/BAT0", **battery)
    monkeypatch.setattr(steps, "open_sensor", lambda name: open_sensor(name, tmp_path))
    monkeypatch.setattr(Meter, "rest", lambda meter: setattr(meter, "idle_w", 0.5))
    rule = Protocol("quick", 5, 0.0, 0.1, 10, 0.05, 1.0, 0.01, 1)
    folder = write_artifact(tmp_path / "fp32")
    Image.new("RGB", (16, 16)).save(tmp_path / "one.png")

    def in_this_process(command: list[str], say: object) -> tuple[dict[str, object], int, str]:
        job, step = Path(command[-2]), command[-1]
        steps.run_group(read_job(job), job, [step], lambda text: None)
        return {}, 0, ""

    monkeypatch.setattr(local, "converse", in_this_process)
    images = [(tmp_path / "one.png").read_bytes()]
    [found] = measure_artifacts({"r": folder}, images, rule, threads=1, energy="battery")["r"]
    assert found.energy == Energy(sensor="battery", covers="the whole device", idle_w=0.5)
    assert found.samples.joules == pytest.approx(2.0 * found.samples.metered_s)
    assert found.samples.metered_s >= found.samples.samples_ms.sum() / 1e3
    row = energy_row([found])
    assert row is not None
    assert row.mean_w == pytest.approx(2.0)
