"""What the report says about the runtimes side by side."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from edgekd.benchmark.report.notes import fastest
from edgekd.benchmark.report.rows import LatencyRow


def row(
    subject: str,
    provider: str,
    p50_ms: float,
    device: str = "local",
    half: float = 0.05,
    run: str = "r",
) -> Any:
    ci = (p50_ms - half, p50_ms + half)
    return SimpleNamespace(
        run=run, subject=subject, provider=provider, p50_ms=p50_ms, p50_ci95_ms=ci, device=device
    )


def said(*rows: Any) -> list[str]:
    return list(fastest(cast(list[LatencyRow], rows)))


def test_the_fastest_runtime_is_named_with_what_the_next_takes() -> None:
    rows = (
        row("ort-fp32", "ORT", 1.5),
        row("ov-int8", "OpenVINO", 1.0),
        row("ov-fp32", "OpenVINO", 1.08),
    )
    assert said(*rows) == [
        "r: the fastest file here is ov-int8 (OpenVINO; p50 1.00 ms, intervals overlap with ov-fp32); "
        "the best of another runtime is ort-fp32, 1.50 times as long."
    ]


def test_one_runtime_is_no_choice_and_devices_are_not_compared() -> None:
    assert said(row("a", "ORT", 1.5), row("b", "ORT", 1.0)) == []
    assert said(row("a", "ORT", 1.5), row("b", "OpenVINO", 1.0, device="pi")) == []
    assert said(row("a", "ORT", 1.5), row("b", "OpenVINO", 1.0, run="other")) == []
