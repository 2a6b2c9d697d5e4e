"""Energy of the measured blocks, from a sensor chosen by the user.

Nothing is estimated from time or load. Sensors are read between blocks, never inside the clock. RAPL and most GPUs have
energy counters. For INA monitors and batteries, power is read at both ends of a block and integrated by the trapezoidal
rule.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekd.core.errors import EdgekdError, check_known

SENSORS = ("rapl", "nvml", "ina", "battery")
IDLE_S = 2.0
"""Duration of the measurement of idle power, before any model is loaded."""
_IDLE_PARTS = 10
_INA = (
    "ina209", "ina219", "ina220", "ina226", "ina230", "ina231", "ina237", "ina238", "ina260", "ina3221",
)  # fmt: skip
_WHOLE_RAILS = ("VDD_IN", "POM_5V_IN")
"""Rails of Jetson modules that feed all others; if there is one of them, the others are not added."""


@dataclass(frozen=True)
class Source:
    """One source of energy or power values.

    Attributes:
        read: joules so far of a counter, or watts now.
        counts: whether it is a counter.
        wraps_j: a counter starts again from zero after so many joules; 0 where it never does.
    """

    read: Callable[[], float]
    counts: bool
    wraps_j: float = 0.0


@dataclass(frozen=True)
class Sensor:
    """A sensor; its sources are summed."""

    name: str
    covers: str
    """The part of the device that is measured."""
    sources: tuple[Source, ...]


class Meter:
    """Energy between `begin` and `end`; `clock` gives seconds."""

    def __init__(self, sensor: Sensor, clock: Callable[[], float] = time.perf_counter) -> None:
        self.sensor = sensor
        self.idle_w: float | None = None
        """Mean power during `rest`."""
        self._clock = clock
        self._at = 0.0
        self._from: list[float] = []

    def begin(self) -> None:
        self._from = [source.read() for source in self.sensor.sources]
        self._at = self._clock()

    def end(self) -> tuple[float, float]:
        """Return joules and seconds since `begin`."""
        seconds = self._clock() - self._at
        joules = 0.0
        for source, before in zip(self.sensor.sources, self._from):  # noqa: B905  Python 3.9 has no strict
            now = source.read()
            if not source.counts:
                joules += 0.5 * (before + now) * seconds
            else:
                joules += now - before + (source.wraps_j if now < before else 0.0)
        return joules, seconds

    def rest(self, seconds: float = IDLE_S, sleep: Callable[[float], None] = time.sleep) -> None:
        """Measure idle power while this process sleeps."""
        parts = []
        for _ in range(_IDLE_PARTS):
            self.begin()
            sleep(seconds / _IDLE_PARTS)
            parts.append(self.end())
        self.idle_w = sum(joules for joules, _ in parts) / sum(spent for _, spent in parts)

    def facts(self) -> dict[str, Any]:
        """Return the sensor's name, what it covers, and idle power in W."""
        return {"sensor": self.sensor.name, "covers": self.sensor.covers, "idle_w": self.idle_w}


def open_sensor(name: str, root: Path = Path("/")) -> Sensor:
    """Return the sensor, after reading it once to check that it works.

    Args:
        name: `rapl` (Intel and AMD processors), `nvml` (NVIDIA boards), `ina` (power monitors of Jetson and other
            modules) or `battery`.

    Raises:
        EdgekdError: the name is unknown, or the sensor is missing, not readable, or does not report power.
    """
    openers = {"rapl": _rapl, "nvml": lambda _: _nvml(), "ina": _ina, "battery": _battery}
    check_known(name, openers, f'There is no energy sensor "{name}".')
    sensor = openers[name](root)
    try:
        for source in sensor.sources:
            source.read()
    except PermissionError as error:
        raise EdgekdError(
            f"This user may not read the sensor {name} ({error.filename}).",
            "By default only root can read it on Linux; let an administrator make that file readable.",
        ) from error
    except (OSError, ValueError) as error:
        raise EdgekdError(
            f"The sensor {name} cannot be read ({error}).", "Leave out --energy."
        ) from error
    return sensor


def _rapl(root: Path) -> Sensor:
    """Return packages, and memory where it is counted apart (Linux: Documentation/power/powercap/powercap.rst)."""
    found: dict[str, tuple[Path, float]] = {}
    for zone in sorted((root / "sys/class/powercap").glob("intel-rapl:*")):
        name = _text(zone / "name") or ""
        if name.startswith("package") or name == "dram":
            wraps = float(_text(zone / "max_energy_range_uj") or 0) / 1e6
            label = name if name != "dram" else f"dram of {zone.name}"
            found[label] = (zone / "energy_uj", wraps)
    if not found:
        raise _absent("rapl", "no intel-rapl zone in /sys/class/powercap")
    sources = tuple(Source(_number(path, 1e-6), True, wraps) for path, wraps in found.values())
    return Sensor("rapl", "processor: " + ", ".join(found), sources)


def _ina(root: Path) -> Sensor:
    """Return rails of INA power monitors: Linux's hwmon (mV, mA, µW), or the older Jetson driver's mW."""
    rails: dict[str, Source] = {}
    for monitor in sorted((root / "sys/class/hwmon").glob("hwmon*")):
        if (_text(monitor / "name") or "") not in _INA:
            continue
        for n in (1, 2, 3):
            label = _text(monitor / f"in{n}_label") or f"{monitor.name} rail {n}"
            if (monitor / f"power{n}_input").is_file():
                rails[label] = Source(_number(monitor / f"power{n}_input", 1e-6), False)
            elif (monitor / f"in{n}_input").is_file() and (monitor / f"curr{n}_input").is_file():
                volts, amperes = (
                    _number(monitor / f"in{n}_input", 1e-3),
                    _number(monitor / f"curr{n}_input", 1e-3),
                )
                rails[label] = Source(_product(volts, amperes), False)
    for name in sorted((root / "sys/bus/i2c/drivers/ina3221x").glob("*/iio:device*/rail_name_*")):
        power = name.with_name(f"in_power{name.name.rpartition('_')[2]}_input")
        rails[_text(name) or name.name] = Source(_number(power, 1e-3), False)
    if not rails:
        raise _absent("ina", "no INA monitor in /sys/class/hwmon")
    whole = [label for label in rails if label in _WHOLE_RAILS]
    chosen = whole[:1] or list(rails)
    return Sensor(
        "ina",
        f"rail{'s' if len(chosen) > 1 else ''} {', '.join(chosen)}",
        tuple(rails[c] for c in chosen),
    )


def _battery(root: Path) -> Sensor:
    for supply in sorted((root / "sys/class/power_supply").glob("*")):
        if _text(supply / "type") != "Battery":
            continue
        status = _text(supply / "status")
        if status != "Discharging":
            raise EdgekdError(
                f"The battery {supply.name} is {(status or 'in an unknown state').lower()}, so it does not feed all.",
                "Unplug the charger and measure again.",
            )
        read = None  # abs(): which way a current counts as positive differs between drivers
        if (supply / "power_now").is_file():
            read = _number(supply / "power_now", 1e-6)
        elif (supply / "current_now").is_file() and (supply / "voltage_now").is_file():
            read = _product(
                _number(supply / "voltage_now", 1e-6), _number(supply / "current_now", 1e-6)
            )
        if read is not None:
            return Sensor("battery", "the whole device", (Source(read, False),))
    raise _absent("battery", "no battery that reports its power in /sys/class/power_supply")


def _nvml() -> Sensor:
    """Return the first NVIDIA board, by nvidia-ml-py: its energy counter (Volta and later), else its power now."""
    try:
        import pynvml
    except ImportError as error:
        raise EdgekdError(
            "The sensor nvml needs the package nvidia-ml-py.", "pip install nvidia-ml-py"
        ) from error
    try:
        pynvml.nvmlInit()
        board = pynvml.nvmlDeviceGetHandleByIndex(0)
        name = pynvml.nvmlDeviceGetName(board)
    except pynvml.NVMLError as error:
        raise EdgekdError(f"NVML finds no board ({error}).", "Look at nvidia-smi.") from error
    covers = f"board {name.decode() if isinstance(name, bytes) else name}"
    read, counts = pynvml.nvmlDeviceGetTotalEnergyConsumption, True
    try:
        read(board)
    except pynvml.NVMLError:
        read, counts = pynvml.nvmlDeviceGetPowerUsage, False
    return Sensor("nvml", covers, (Source(lambda: float(read(board)) / 1e3, counts),))


def _absent(name: str, why: str) -> EdgekdError:
    return EdgekdError(
        f"This machine has no sensor {name}: {why}.",
        f"Choose another ({', '.join(SENSORS)}), or leave out --energy.",
    )


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def _number(path: Path, unit: float) -> Callable[[], float]:
    """Reads a file with one number each time, times `unit`, without its sign."""
    return lambda: abs(float(path.read_text(encoding="ascii"))) * unit


def _product(first: Callable[[], float], second: Callable[[], float]) -> Callable[[], float]:
    return lambda: first() * second()
