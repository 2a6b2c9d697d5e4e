"""Heat, throttling and power mode, read from a tree of files and from tools that are stood in for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgekd.benchmark.report.answers import throttle_notes
from edgekd.core import machine

NOTHING = {
    "temperature_c": None,
    "throttle_count": None,
    "throttle_flags": None,
    "power_mode": None,
}


def put(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / "sys" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


def tool(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\nprintf '{text}'\n")
    path.chmod(0o755)


def test_an_x86_machine_by_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    cpu = "devices/system/cpu"
    put(tmp_path, {
        f"{cpu}/cpu0/cpufreq/scaling_cur_freq": "2400123",
        f"{cpu}/cpu0/thermal_throttle/core_throttle_count": "3",
        f"{cpu}/cpu0/thermal_throttle/package_throttle_count": "10",
        f"{cpu}/cpu0/thermal_throttle/core_throttle_total_time_ms": "999",
        f"{cpu}/cpu1/thermal_throttle/core_throttle_count": "4",
        "class/thermal/thermal_zone0/temp": "41000",
        "class/thermal/thermal_zone1/temp": "67500",
        "class/thermal/thermal_zone2/temp": "",
        "firmware/acpi/platform_profile": "balanced",
    })  # fmt: skip
    found = machine.state(tmp_path)
    found.pop("load_average")
    assert found == {"cpu_mhz": 2400, "temperature_c": 67.5, "throttle_count": 17, "throttle_flags": None,
                     "power_mode": "balanced"}  # fmt: skip


def test_boards_by_their_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert {key: machine.state(tmp_path)[key] for key in NOTHING} == NOTHING
    tool(tmp_path / "bin", "vcgencmd", "throttled=0x50000\\n")
    tool(tmp_path / "bin", "nvpmodel", "NV Power Mode: MAXN\\n0\\n")
    found = machine.state(tmp_path)
    assert (found["throttle_flags"], found["power_mode"]) == ("0x50000", "MAXN")


def remarks(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return list(throttle_notes({"before": NOTHING | before, "after": NOTHING | after}))


def test_throttling_while_measuring_is_noted() -> None:
    [said] = remarks(
        {"throttle_count": 5, "temperature_c": 60.0}, {"throttle_count": 7, "temperature_c": 91.5}
    )
    assert (
        "The processor throttled 2 times while measuring (temperature 60 °C before, 91.5 °C after)"
        in said
    )
    [said] = remarks({"power_mode": "MAXN"}, {"power_mode": "15W"})
    assert "from power mode MAXN to 15W" in said
    facts = {"device": "pi", "before": NOTHING | {"throttle_flags": "0x10000"}}
    facts["after"] = NOTHING | {"throttle_flags": "0x50002"}
    # Bit 18 is new, bit 1 is raised now, bit 16 was there before.
    [said] = throttle_notes({"before": NOTHING, "after": NOTHING, "devices": [facts]})
    assert said.startswith("Device pi reports a capped frequency, throttling while measuring")


def test_what_was_so_before_is_not_noted() -> None:
    same = {"throttle_count": 5, "throttle_flags": "0x50000", "power_mode": "MAXN"}
    assert remarks(same, same) == remarks({}, same) == remarks(same, {}) == []
    old = {
        "temperature_c": None,
        "load_average": 0.1,
        "cpu_mhz": None,
    }  # of an agent that did not ask
    assert list(throttle_notes({"before": old, "after": old})) == []
