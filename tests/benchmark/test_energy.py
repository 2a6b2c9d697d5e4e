"""Energy against powers and times that are known: a tree of files in place of the sensors."""

from __future__ import annotations

import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from device_fakes import write_artifact
from PIL import Image

from edgekd.benchmark.measure import local
from edgekd.benchmark.measure.local import measure_artifacts
from edgekd.benchmark.measure.timings import energy_row
from edgekd.core.errors import EdgekdError
from edgekd.targets.agent import steps
from edgekd.targets.agent.job import read_job
from edgekd.targets.devices.result import Clocked, Energy
from edgekd.targets.timing import energy
from edgekd.targets.timing.energy import Meter, Sensor, Source, open_sensor
from edgekd.targets.timing.stopwatch import LatencySamples, Protocol, measure, measure_interleaved

RULE = Protocol("quick", 5, 0.0, 1.0, 10, 0.5, 10.0, 0.1, 1)


def put(root: Path, **files: str) -> None:
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


def write(root: Path, place: str, **files: str) -> Path:
    folder = root / "sys" / place
    put(folder, **files)
    return folder


class Time:
    """Seconds that pass only when somebody says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def pass_(self, seconds: float) -> None:
        self.now += seconds


def test_rapl_adds_packages_and_memory_and_unwraps_counters(
    tmp_path: Path,
) -> None:
    first = write(tmp_path, "class/powercap/intel-rapl:0", name="package-0", energy_uj="9000000",
                  max_energy_range_uj="10000000")  # fmt: skip
    write(
        tmp_path,
        "class/powercap/intel-rapl:0:0",
        name="core",
        energy_uj="1",
        max_energy_range_uj="10000000",
    )
    dram = write(tmp_path, "class/powercap/intel-rapl:0:1", name="dram", energy_uj="500000",
                 max_energy_range_uj="10000000")  # fmt: skip
    write(
        tmp_path,
        "class/powercap/intel-rapl:1",
        name="psys",
        energy_uj="1",
        max_energy_range_uj="10000000",
    )
    sensor = open_sensor("rapl", tmp_path)
    assert sensor.covers == "processor: package-0, dram of intel-rapl:0:1"
    clock = Time()
    meter = Meter(sensor, clock)
    meter.begin()
    clock.pass_(2.0)
    put(first, energy_uj="2000000")  # 9 J → 10 J = 0 J → 2 J
    put(dram, energy_uj="750000")
    assert meter.end() == (pytest.approx(3.25), 2.0)


def test_jetson_rails(tmp_path: Path) -> None:
    rails = {"in1_label": "VDD_IN", "in1_input": "5000", "curr1_input": "1200", "in2_label": "VDD_SOC",
             "in2_input": "5000", "curr2_input": "300"}  # fmt: skip
    folder = write(tmp_path, "class/hwmon/hwmon3", name="ina3221", **rails)
    write(
        tmp_path,
        "class/hwmon/hwmon0",
        name="coretemp",
        in1_label="VDD_IN",
        in1_input="1",
        curr1_input="1",
    )
    sensor = open_sensor("ina", tmp_path)
    assert sensor.covers == "rail VDD_IN"
    clock = Time()
    meter = Meter(sensor, clock)
    meter.begin()
    clock.pass_(2.0)
    put(folder, curr1_input="2000")
    assert meter.end() == (
        pytest.approx((6.0 + 10.0) / 2 * 2.0),
        2.0,
    )  # the trapezoid between 6 W and 10 W


def test_rails_without_a_common_one_are_added_and_power_files_win(tmp_path: Path) -> None:
    write(tmp_path, "class/hwmon/hwmon1", name="ina3221", in1_label="VDD_GPU_SOC", in1_input="5000", curr1_input="200",
          in2_label="VDD_CPU_CV", in2_input="5000", curr2_input="400")  # fmt: skip
    write(tmp_path, "class/hwmon/hwmon2", name="ina226", power1_input="2500000")
    sensor = open_sensor("ina", tmp_path)
    assert sensor.covers == "rails VDD_GPU_SOC, VDD_CPU_CV, hwmon2 rail 1"
    assert sum(source.read() for source in sensor.sources) == pytest.approx(1.0 + 2.0 + 2.5)


def test_the_older_jetson_driver(tmp_path: Path) -> None:
    write(tmp_path, "bus/i2c/drivers/ina3221x/6-0040/iio:device0", rail_name_0="POM_5V_IN", in_power0_input="4250",
          rail_name_1="POM_5V_CPU", in_power1_input="900")  # fmt: skip
    sensor = open_sensor("ina", tmp_path)
    assert (sensor.covers, sensor.sources[0].read()) == ("rail POM_5V_IN", pytest.approx(4.25))


def test_a_battery_only_while_it_feeds_the_device(tmp_path: Path) -> None:
    folder = write(tmp_path, "class/power_supply/BAT0", type="Battery", status="Discharging", current_now="-400000",
                   voltage_now="3850000")  # fmt: skip
    write(tmp_path, "class/power_supply/AC", type="Mains")
    assert open_sensor("battery", tmp_path).sources[0].read() == pytest.approx(0.4 * 3.85)
    put(folder, status="Charging")
    with pytest.raises(EdgekdError, match="BAT0 is charging"):
        open_sensor("battery", tmp_path)


def test_sensors_that_are_not_there_are_refused(
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

    def refused() -> float:
        raise PermissionError(13, "Permission denied", "/sys/class/powercap/intel-rapl:0/energy_uj")

    monkeypatch.setattr(energy, "_rapl", lambda root: Sensor("rapl", "", (Source(refused, True),)))
    with pytest.raises(EdgekdError, match=r"not be read by this user \(/sys/class/powercap"):
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
    assert (sensor.covers, sensor.sources[0].counts, sensor.sources[0].read()) == (
        "board Board 1",
        True,
        12.5,
    )

    def older(board: object) -> int:
        raise NVMLError("Not Supported")

    fake.nvmlDeviceGetTotalEnergyConsumption = older
    sensor = open_sensor("nvml")
    assert (sensor.sources[0].counts, sensor.sources[0].read()) == (False, 61.0)


def steady(watts: float, clock: Time) -> Meter:
    """A counter that rises by `watts` joules a second."""
    return Meter(Sensor("rapl", "a test", (Source(lambda: watts * clock.now, True),)), clock)


def test_idle_power_and_the_energy_of_the_measured_blocks_alone() -> None:
    clock = Time()
    meter = steady(3.0, clock)
    meter.rest(2.0, clock.pass_)
    assert meter.idle_w == pytest.approx(3.0)
    samples = measure(
        lambda _: clock.pass_(0.02), RULE, clock=lambda: round(clock.now * 1e9), meter=meter
    )
    # The warm-up is outside: 0.5 s measured in blocks of 0.1 s, at 3 W.
    assert samples.metered_s == pytest.approx(0.02 * len(samples.samples_ms))
    assert samples.joules == pytest.approx(3.0 * samples.metered_s)
    assert (
        measure(lambda _: clock.pass_(0.02), RULE, clock=lambda: round(clock.now * 1e9)).joules
        is None
    )


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
        {"a": model(0.02, 5.0), "b": model(0.05, 2.0)},
        RULE,
        clock=lambda: round(clock.now * 1e9),
        meter=meter,
    )
    for name, joules_each in (("a", 0.1), ("b", 0.1)):
        assert found[name].joules == pytest.approx(joules_each * len(found[name].samples_ms))


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
    write(
        tmp_path,
        "class/power_supply/BAT0",
        type="Battery",
        status="Discharging",
        power_now="2000000",
    )
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
