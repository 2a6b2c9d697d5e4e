"""Facts about this machine that influence latency, without identifying its owner.

Part of the device agent: Python 3.9 and the standard library.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FEATURES = ("sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16",
            "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "sve")  # fmt: skip
"""CPU flags (Linux names) that determine the INT8 and FP16 kernels of a runtime."""

PACKAGES = ("edgekd", "onnxruntime", "openvino", "ai-edge-litert", "tensorrt", "tensorrt-rtx-cu13",
            "cuda-bindings", "numpy", "pillow", "torch")  # fmt: skip


def describe() -> dict[str, Any]:
    """Return machine, versions and governor; None for what the system does not report."""
    model, flags = _cpu()
    return {
        "cpu": model,
        "features": [name for name in FEATURES if name in flags],
        "cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "machine": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "python": platform.python_version(),
        "versions": {name: version_of(name) for name in PACKAGES},
    }


def state(root: Path = Path("/")) -> dict[str, Any]:
    """Return facts that may change while measuring, from `sys` below `root`; None if the system does not report one.

    load_average (1 minute), cpu_mhz (core 0), temperature_c (hottest thermal zone), throttle_count (x86: events of all
    cores and packages since the start), throttle_flags (Raspberry Pi: hexadecimal, see benchmark/report/summary.py),
    power_mode (Jetson's nvpmodel, else the ACPI platform profile).
    """
    khz = _read(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq")
    heat = _integers((root / "sys/class/thermal").glob("thermal_zone*/temp"))
    events = _integers(
        (root / "sys/devices/system/cpu").glob("cpu*/thermal_throttle/*_throttle_count")
    )
    flags = re.search(r"throttled=(0x[0-9a-fA-F]+)", _asked("vcgencmd", "get_throttled") or "")
    mode = re.search(r"NV Power Mode: *(.+)", _asked("nvpmodel", "-q") or "")
    return {
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "cpu_mhz": round(int(khz) / 1000) if khz else None,
        "temperature_c": round(max(heat) / 1000, 1) if heat else None,
        "throttle_count": sum(events) if events else None,
        "throttle_flags": flags.group(1) if flags else None,
        "power_mode": mode.group(1).strip()
        if mode
        else _read(root / "sys/firmware/acpi/platform_profile"),
    }


def processor_seconds(stat: Path = Path("/proc/stat")) -> tuple[float, float, float] | None:
    """Return seconds of all cores since boot: busy, stolen by a hypervisor, total; None on other systems than Linux."""
    line = (_read(stat) or "").partition("\n")[0].split()
    if len(line) < 9 or line[0] != "cpu" or not all(field.isdigit() for field in line[1:9]):
        return None
    ticks = float(os.sysconf("SC_CLK_TCK")) if hasattr(os, "sysconf") else 100.0
    user, nice, system, idle, iowait, irq, softirq, steal = (int(n) / ticks for n in line[1:9])
    working = user + nice + system + irq + softirq
    return working, steal, working + idle + iowait + steal


def other_work(
    before: tuple[float, float, float] | None,
    after: tuple[float, float, float] | None,
    own_s: float,
) -> tuple[float, float] | None:
    """Return the shares 0–1 of all cores' time used by other processes, and by other machines of a hypervisor.

    Args:
        before, after: `processor_seconds` at the start and end of an interval; None gives None.
        own_s: processor time of this process during the interval.
    """
    if before is None or after is None or after[2] - before[2] <= 0:
        return None
    working, steal, total = (last - first for first, last in zip(before, after))  # noqa: B905  Python 3.9
    return max(0.0, working - own_s) / total, max(0.0, steal) / total


def usable_cores() -> int:
    """Return the number of cores this process may run on."""
    return (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    )


def in_cores(count: int) -> str:
    """Return a number of cores as text."""
    return "1 core" if count == 1 else f"{count} cores"


def peak_rss_mb() -> float | None:
    """Return the largest resident memory of this process so far, in 10^6 bytes.

    Prefers Linux's high-water mark, since the value of getrusage can be that of the parent before `exec`.
    """
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as handle:
            for line in handle:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024 / 1e6
    except OSError:
        pass
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def _cpu() -> tuple[str, frozenset[str]]:
    info = _read("/proc/cpuinfo") or ""
    fields: dict[str, str] = {}
    for line in info.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    flags = frozenset((fields.get("flags") or fields.get("Features") or "").split())
    name = fields.get("model name") or fields.get("Model")
    if not name and platform.system() == "Darwin":
        answer = subprocess.run(
            ["sysctl", "-n", "machdep.cpu.brand_string"],
            capture_output=True,
            text=True,
            check=False,
        )
        name = answer.stdout.strip()
    return name or platform.processor() or platform.machine(), flags


def _integers(paths: Iterable[Path]) -> list[int]:
    """Return the integers in the readable files; sleeping sensors give errors."""
    texts = [_read(path) for path in paths]
    return [int(text) for text in texts if text and text.lstrip("-").isdigit()]


def _asked(*command: str) -> str | None:
    """Return the output of a command of the board; None if it is missing or does not respond."""
    if shutil.which(command[0]) is None:
        return None
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=10
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None


def _read(path: str | Path) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def version_of(package: str) -> str | None:
    """Return the version of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
