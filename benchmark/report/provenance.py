"""Where a report's numbers come from: images, machine, devices, runs, preprocessing, protocol, definitions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from edgekd.benchmark.report import rows, schema
from edgekd.benchmark.report.metric import NONE, metrics_of, percent
from edgekd.benchmark.report.schema import Report
from edgekd.benchmark.report.sections import Cell, Column, Item, Table, Text, table, words
from edgekd.benchmark.report.tables import mark

QUICK_MARK = "QUICK – indicative only"
_WHAT: list[Column] = [("what", lambda pair: pair[0]), ("value", lambda pair: pair[1])]
_STATE = {"load_average": "", "cpu_mhz": " MHz", "temperature_c": " °C", "throttle_count": "", "throttle_flags": "",
          "power_mode": ""}  # fmt: skip
METHOD = (
    ("Accuracy", "Every image is read once and prepared by each subject's own preprocessing. A model that has more "
                 "classes "
     "than a suite is restricted to the suite's. Means over suites are unweighted. OOD images take no part in any "
     "fit."),
    ("Unknown images", "Both scores are of the logits as the subject returns them, without temperature. Known "
                       "images are "
     "the in-domain test images of the named suite."),
    ("Inside the clock", "One call of the model with one RGB uint8 image that lies ready in memory, until its "
                         "logits are in "
     "memory. Normalisation is in the graph, or in numpy ahead of a file with float input. Single stream, batch 1, "
     "real "
     "images in rotation."),
    ("Background (†)", "Teacher and torch student are timed briefly inside the calling process, for context: not "
                       "comparable "
     "with a file."),
    ("Energy", "Only a declared sensor is read, between blocks, never inside the clock."),
    ("Placement", "The provider that ran each node, as the runtime reports it. A file of which a part ran on another "
     "provider than requested gets no report."),
)  # fmt: skip
_DEFINED = (rows.AccuracyRow, rows.SummaryRow, schema.GainRow, rows.CorruptionRow, rows.CueConflictRow,
            rows.VocabularyRow, rows.DetectionRow, rows.UnknownRow, rows.LatencyRow, rows.ThroughputRow,
            rows.EnergyRow)  # fmt: skip


def images(report: Report) -> str:
    """Return the suites with their numbers of images."""
    hidden = report.families("corruption", "val")
    found = dict.fromkeys(
        f"{row.suite} n = {row.n:,}{f' ({row.run})' if row.run else ''}"
        for row in report.suites
        if row.suite not in hidden
    )
    return f"Images: {', '.join(found)}."


def remarks(report: Report) -> list[str]:
    """Return what a reader must know about the suites, one sentence each."""
    found = (
        f"{'corruptions' if row.family == 'corruption' else row.suite}: {remark}"
        for row in report.suites
        for remark in row.remarks
    )
    return list(dict.fromkeys(found))


def machine_line(report: Report) -> str:
    """Return processor, cores and providers."""
    env = report.environment
    providers = ", ".join(dict.fromkeys(row.provider for row in report.latency if not mark(row)))
    return f"{env['cpu']}, {env['usable_cores']} cores{f', {providers}' if providers else ''}"


def latency_rule(report: Report) -> str:
    """Return the protocol of this report's files, with its numbers."""
    rule = report.protocol["latency"]
    threads = ", ".join(
        "the runtime's default" if count is None else str(count)
        for count in sorted({row.threads for row in report.latency if not mark(row)}, key=str)
    )
    where = (
        f"each of {rule['processes']} fresh processes"
        if rule["processes"] > 1
        else "one fresh process, the files in alternating blocks"
    )
    return (
        f"Latency: single stream, batch 1, warm-up of at least {rule['warmup_runs']} runs and {rule['warmup_s']:g} s, "
        f"then at least {rule['runs']} runs and {rule['seconds']:g} s in {where}, no sample left out; "
        f"threads: {threads or NONE}."
    )


def devices(report: Report) -> Iterator[Item]:
    """Yield facts of each device that ran files; emulation is named."""
    for facts in report.environment.get("devices", ()):
        if facts["emulated"]:
            text = (
                f"Device {facts['device']} is an emulation: its times say nothing about a device."
            )
            yield Text(text, tone="note", console=True)
        hidden = ("device", "artifacts", "before", "after", "emulated", "versions")
        pairs = [(k.replace("_", " "), words(v)) for k, v in facts.items() if k not in hidden]
        pairs += [*_states(facts), *((k, v) for k, v in facts["versions"].items() if v)]
        yield table(f"Device {facts['device']}", pairs, _WHAT, words=True)
        layout: list[Column] = [
            ("file", lambda one: one[0]),
            ("same class here %", lambda one: percent(one[1]["agreement_here"])),
            ("same pixels %", lambda one: percent(one[1]["same_pixels"])),
            ("engine built there", lambda one: words(one[1].get("built"))),
        ]
        note = (
            "Against the same file on this machine, where its runtime is here, and pixels prepared here. Engines are "
            "built before anything is timed."
        )
        yield table(f"Files on {facts['device']}", facts["artifacts"].items(), layout, note=note)


def _states(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield load, clock, temperature, throttling and power mode at both ends of the measurement."""
    for key, unit in _STATE.items():
        first, last = (facts[when].get(key) for when in ("before", "after"))
        text = "n/a" if first is None and last is None else f"{first}{unit} → {last}{unit}"
        yield key.replace("_", " "), text


def origin(report: Report) -> Iterator[Item]:
    """Yield parity, placement, quantization, machine, runs and preprocessing."""
    yield from _parity(report)
    yield from _placement(report)
    for facts in report.context.get("artifacts", ()):
        if quantization := facts.get("quantization"):
            yield Text(words(quantization), f"Quantization of {facts['run']}/{facts['name']}")
    yield machine(report)
    yield from devices(report)
    for facts in report.context.get("runs", ()):
        pairs = [(k.replace("_", " "), words(v)) for k, v in facts.items() if k != "name"]
        yield table(f"Run {facts['name']}", pairs, _WHAT, words=True)
    others = {k: v for k, v in report.context.items() if k not in ("runs", "artifacts")}
    if others:
        yield Text(f"{words(others)}.")
    users: dict[str, dict[str, None]] = {}
    for row in report.listed:
        users.setdefault(row.preprocess, {})[row.subject] = None
    pixels = [
        (key, settings, users.get(key, {}))
        for key, settings in report.protocol["preprocess"].items()
    ]
    layout: list[Column] = [
        ("hash", lambda one: one[0]),
        ("settings", lambda one: words(one[1])),
        ("subjects", lambda one: ", ".join(one[2])),
    ]
    yield table("Preprocessing", pixels, layout, words=True)


def _parity(report: Report) -> Iterator[Table]:
    providers = {row.who: row.provider for row in report.latency}
    facts = report.context.get("artifacts", ())
    layout: list[Column] = [
        ("file", lambda one: f"{one['run']}/{one['name']}"),
        ("same class %", lambda one: percent(one["parity"]["top1_agreement"])),
        ("largest logit error / range", lambda one: f"{one['parity']['max_error_relative']:.2e}"),
        ("cosine", lambda one: f"{one['parity']['cosine']:.5f}"),
        ("KL, nats", lambda one: f"{one['parity']['kl']:.2e}"),
        ("images", lambda one: f"{one['parity']['n']:,}"),
        (
            "check",
            lambda one: (
                Cell("✓ passed", "good")
                if one["parity"].get("passed", True)
                else Cell("✗ failed", "bad")
            ),
        ),
        ("runs on", lambda one: providers.get((one["run"], one["name"]), NONE)),
    ]
    if facts:
        note = "Against the torch student, at export, on real images."
        yield table("Parity", facts, layout, note=note)


def _placement(report: Report) -> Iterator[Table]:
    items = [
        (row, part)
        for row in report.placements
        for part in (row.nodes.items() if row.nodes is not None else [(row.provider or NONE, None)])
    ]
    layout: list[Column] = [
        ("file", lambda one: f"{one[0].run}/{one[0].subject}"),
        ("provider", lambda one: one[1][0]),
        ("nodes", lambda one: NONE if one[1][1] is None else f"{sum(one[1][1].values()):,}"),
        ("operators", lambda one: "n/a" if one[1][1] is None else most_frequent(one[1][1])),
        ("source", lambda one: one[0].source),
    ]
    if items:
        yield table("Placement", items, layout, heads=2, words=True)


def most_frequent(kinds: dict[str, int], at_most: int = 6) -> str:
    """Return the most frequent kinds with their counts, and how many kinds more."""
    ordered = sorted(kinds.items(), key=lambda pair: (-pair[1], pair[0]))
    more = f" and {len(ordered) - at_most} more kinds" if len(ordered) > at_most else ""
    return ", ".join(f"{kind} {count}" for kind, count in ordered[:at_most]) + more


def machine(report: Report) -> Table:
    """Processor, system, clocks and versions."""
    env = report.environment
    hidden = ("before", "after", "versions", "devices")
    pairs = [(key.replace("_", " "), words(env[key])) for key in env if key not in hidden]
    pairs += [*_states(env), *((name, value) for name, value in env["versions"].items() if value)]
    return table("Machine", pairs, _WHAT, words=True)


def method(report: Report) -> Iterator[Item]:
    """Yield the definition of every number, the protocol, and where to find the data."""
    yield from (Text(body, label) for label, body in definitions())
    own, background = report.protocol["latency"], report.protocol["latency_context"]
    limits = {"warmup_runs": "warm-up, runs at least", "warmup_s": "warm-up, s at least",
              "warmup_limit_s": "warm-up, s at most", "runs": "measured, runs at least",
              "seconds": "measured, s at least", "limit_s": "measured, s at most", "block_s": "block, s",
              "processes": "fresh processes"}  # fmt: skip
    layout: list[Column] = [
        ("limit", lambda key: limits[key]),
        (f"files ({own['name']})", lambda key: f"{own[key]:g}"),
        ("background (†)", lambda key: f"{background[key]:g}"),
    ]
    yield table("Latency protocol", list(limits), layout)
    seconds = report.protocol["seconds"]
    yield Text(
        f"Measuring took {seconds['accuracy']} s for accuracy and {seconds['latency']} s for latency. The same "
        "numbers for "
        f"programs are in report.json (schema version {report.schema_version}), every prediction in "
        "predictions.npz, every "
        "latency sample in latency.npz.",
        tone="quiet",
    )


def definitions() -> list[tuple[str, str]]:
    """Return name and definition of every metric, and how the measurement was done."""
    found: dict[str, str] = {}
    sources: list[type[BaseModel]] = list(_DEFINED)
    for metric in (metric for row in sources for metric in metrics_of(row).values()):
        if metric.formula:
            found.setdefault(metric.name, metric.definition[0].upper() + metric.definition[1:])
    return [*found.items(), *METHOD]
