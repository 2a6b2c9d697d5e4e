from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from benchmark_fakes import model, paint_images, subject
from device_fakes import BRIEF

from edgekd.benchmark.benchmark import run_benchmark
from edgekd.benchmark.compare import compare, speed_rows
from edgekd.benchmark.report.tables import comparison
from edgekd.benchmark.results.schema import Report, load_of
from edgekd.benchmark.subjects import Suite
from edgekd.core.errors import EdgekdError
from edgekd.core.machine import other_work, processor_seconds
from edgekd.targets.timing import speed
from edgekd.targets.timing.intervals import ratio_interval
from edgekd.targets.timing.speed import Timing, reason_to_withhold, speed_of, timed_in_turns
from edgekd.targets.timing.stopwatch import LatencySamples


def test_the_interval_covers_the_true_ratio_at_its_level() -> None:
    covered, widths = 0, []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        # The machine speeds up and slows down by a third; both models feel it alike.
        drift = np.exp(0.3 * np.sin(np.arange(20) + rng.uniform(0, 6)))
        a, b = ([scale * one * rng.lognormal(0, 0.05, 40) for one in drift] for scale in (1.2, 1.0))
        low, high = ratio_interval(a, b, np.zeros(20, dtype=np.int64), replicates=200)
        covered += low <= 1.2 <= high
        widths.append(high - low)
    assert covered >= 52
    # Draws that ignored the pairing would be as wide as the drift; these are not.
    assert np.median(widths) < 0.25


def test_only_turns_that_have_a_partner_count(tmp_path: Path) -> None:
    def samples(blocks: int, value: float, alone: float) -> LatencySamples:
        times = np.repeat([value] * 10 + [alone] * (blocks - 10), 5).astype(float)
        return LatencySamples(times, np.repeat(np.arange(blocks) * 2, 5), 1.0, 1, 1.0, True, True)

    images = paint_images(12)
    a, b = subject("a", "artifact", model(0)), subject("b", "artifact", model(2))
    suite = Suite("id", images, np.arange(12))
    logits = {
        (one.key, 0): one.predict(np.stack([np.asarray(images.read(i)) for i in range(12)]))
        for one in (a, b)
    }
    timed = Timing("x", True, 0.1, 0.0, 0.0)
    parts = [samples(30, 2.0, 99.0)], [samples(10, 4.0, 0.0)]
    found = compare((a, b), [suite], logits, parts, (timed, timed))
    assert found.withheld is None
    unsettled = replace(timed, settled=False)
    noisy = compare((a, b), [suite], logits, parts, (timed, unsettled))
    assert "settled" in str(noisy.withheld)
    assert "0.5" not in comparison(noisy).note
    assert (found.p50_ratio, found.p50_ratio_ci95, found.turns) == (0.5, (0.5, 0.5), 10)
    [row] = found.accuracy
    assert (row.a, row.b, row.value, row.agreement) == (1.0, 0.5, 0.5, 0.5)
    # 6 images won, none lost: 2 · (1/2)^6.
    assert row.mcnemar_p == pytest.approx(2 / 64)
    apart = [replace(suite, run="a"), replace(suite, run="b")]
    one, other = replace(a, run="a", folder=tmp_path), replace(b, run="b", folder=tmp_path)
    with pytest.raises(EdgekdError, match="no test images in common"):
        run_benchmark([one, other], apart, tmp_path / "out", compared=(one, other))


def row(subject: str, provider: str = "ORT", p50_ms: float = 1.0, **facts: Any) -> Any:
    device = facts.pop("device", "local")
    quiet = {"settled": True, "cv": 0.1, "other_cpu": 0.01, "stolen_cpu": 0.0}
    return SimpleNamespace(
        run="r", subject=subject, who=("r", subject), provider=provider, p50_ms=p50_ms, device=device,
        timing=Timing(subject, **(quiet | facts)),
    )  # fmt: skip


def samples(*times_ms: float) -> list[LatencySamples]:
    """Two blocks of these times in one process."""
    blocks = np.repeat([0, 1], len(times_ms))
    return [LatencySamples(np.tile(times_ms, 2), blocks, 1.0, 50, 1.0, True, True)]


def report(*rows: Any) -> Report:
    """A report of these artifacts; every sample of one is its time."""
    parts = {one.who: samples(one.p50_ms) for one in rows}
    environment = {"before": {"load_average": 0.1}, "usable_cores": 2}
    made = Report.model_construct(latency=rows, speed=speed_rows(rows, parts, environment))
    summary = [SimpleNamespace(who=one.who, kind="artifact") for one in rows]
    object.__setattr__(made, "summary", summary)
    return made


def test_ratios_of_all_pairs_of_one_run_and_device() -> None:
    found = report(row("a", p50_ms=1.0), row("b", p50_ms=2.0), row("c", device="pi", p50_ms=4.0))
    [pair] = found.speed
    assert (pair.a, pair.b, pair.ratio, pair.ci95) == ("a", "b", 0.5, (0.5, 0.5))
    back = found.speed_of(found.latency[1], found.latency[0])
    assert back is not None
    assert (back.ratio, back.ci95) == (2.0, (2.0, 2.0))
    assert found.speed_of(found.latency[0], found.latency[2]) is None
    # Two processes of 1 and 3 ms: the median of a draw is either, and with it the ratio to 1 ms.
    parts = {("r", "a"): [samples(1.0)[0], samples(3.0)[0]], ("r", "b"): samples(1.0)}
    environment = {"before": {"load_average": None}, "usable_cores": 2}
    [pair] = speed_rows([row("a", p50_ms=3.0), row("b")], parts, environment)
    assert pair.ci95 == (1.0, 3.0)
    assert "includes 1" in str(pair.withheld)
    # The load of a device is its own.
    there = {"device": "pi", "before": {"load_average": 6.0}, "usable_cores": 4}
    facts = {"before": {"load_average": 1.0}, "usable_cores": 2, "devices": [there]}
    assert (load_of(facts, "local"), load_of(facts, "pi")) == (0.5, 1.5)
    assert load_of(environment, "local") is None


@pytest.mark.parametrize(
    ("facts", "ci95", "load", "told"),
    [
        ({}, (0.4, 0.6), 0.1, None),
        ({}, (1.2, 1.3), None, None),
        ({"settled": False}, (0.4, 0.6), 0.1, "had not settled"),
        ({"cv": 0.8}, (0.1, 0.12), 0.1, "variation 0.80"),
        ({"other_cpu": 0.5}, (0.4, 0.6), 0.1, "other work took 50 %"),
        ({"stolen_cpu": 0.1}, (0.4, 0.6), 0.1, "hypervisor took 10 %"),
        ({"other_cpu": None}, (0.4, 0.6), 1.5, "load average 1.5 per core"),
        ({"other_cpu": 0.01}, (0.4, 0.6), 1.5, None),  # the finer measure goes first
        ({}, (0.9, 1.1), 0.1, "includes 1"),
    ],
)
def test_when_a_claim_is_withheld(
    facts: dict[str, Any], ci95: tuple[float, float], load: float | None, told: str | None
) -> None:
    for rows in ((row("a", **facts), row("b")), (row("a"), row("b", **facts))):
        reason = reason_to_withhold([one.timing for one in rows], ci95, load)
        assert (reason is None) == (told is None)
        assert told is None or told in str(reason)


def test_shares_of_the_processor_by_hand(tmp_path: Path) -> None:
    stat = tmp_path / "stat"
    # user nice system idle iowait irq softirq steal, in hundredths of a second on Linux
    stat.write_text("cpu  100 20 30 400 50 6 4 90 7 8\ncpu0 1 1 1 1 1 1 1 1 1 1\n")
    found = processor_seconds(stat)
    assert found is not None
    assert found == pytest.approx((1.6, 0.9, 7.0))
    assert other_work((1.0, 0.0, 10.0), (4.0, 1.0, 20.0), own_s=2.0) == pytest.approx((0.1, 0.1))
    assert other_work((1.0, 0.0, 10.0), (2.0, 0.0, 20.0), own_s=5.0) == (0.0, 0.0)
    assert other_work(None, found, 1.0) is None
    assert other_work(found, found, 0.0) is None
    stat.write_text("not a processor")
    assert processor_seconds(stat) is None
    assert processor_seconds(tmp_path / "none") is None


def test_a_short_measurement_of_two_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "NOTE", replace(BRIEF, seconds=0.2))

    def waits(rounds: int) -> Any:
        return lambda images: [float(np.sqrt(images).sum()) for _ in range(rounds)]

    models = {"slow": waits(40), "fast": waits(4)}
    found = speed_of("slow", "fast", timed_in_turns(models, np.ones((4, 64, 64, 3), np.uint8)))
    assert found.ratio > 2  # ten times the work
    assert found.ci95[0] <= found.ratio <= found.ci95[1]
