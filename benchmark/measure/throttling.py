"""Whether the machine slowed itself down, or was set to another power mode, while it was measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

FLAGS = {
    0: "under-voltage",
    1: "a capped frequency",
    2: "throttling",
    3: "the soft temperature limit",
}
"""Bits of `vcgencmd get_throttled` for now; the same 16 higher: since the system's start (Raspberry Pi's manual)."""
_SINCE_START = 16


def throttle_remarks(environment: Mapping[str, Any]) -> Iterator[str]:
    """A sentence for each thing that happened between `before` and `after`, on this machine and on each device."""
    yield from _of("The processor", environment)
    for facts in environment.get("devices", ()):
        yield from _of(f"Device {facts['device']}", facts)


def _of(who: str, facts: Mapping[str, Any]) -> Iterator[str]:
    before, after = facts["before"], facts["after"]

    def both(key: str) -> tuple[Any, Any] | None:
        first, last = before.get(key), after.get(key)  # results of older agents lack them
        return None if first is None or last is None else (first, last)

    if (counts := both("throttle_count")) and counts[1] > counts[0]:
        yield (
            f"{who} throttled {counts[1] - counts[0]} times while measuring (temperature {_heat(before)} before, "
            f"{_heat(after)} after): latencies are those of a hot machine."
        )
    if flags := both("throttle_flags"):
        first, last = (int(value, 16) for value in flags)
        raised = first | last | (last & ~first) >> _SINCE_START
        told = [name for bit, name in FLAGS.items() if raised >> bit & 1]
        if told:
            yield f"{who} reports {', '.join(told)} while measuring: latencies are not those of its full speed."
    if (modes := both("power_mode")) and modes[0] != modes[1]:
        yield f"{who} went from power mode {modes[0]} to {modes[1]} while measuring."


def _heat(state: Mapping[str, Any]) -> str:
    return "unknown" if state["temperature_c"] is None else f"{state['temperature_c']:g} °C"
