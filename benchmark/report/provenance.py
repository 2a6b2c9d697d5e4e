"""The provenance of a report: images, machine, devices, runs, preprocessing, protocol, definitions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from edgekd.benchmark.report.elements import Cell, Cells, Item, Table, Text, facts, table, words
from edgekd.benchmark.report.tables import mark
from edgekd.benchmark.results import rows, schema
from edgekd.benchmark.results.metric import NONE, metrics_of, percent
from edgekd.benchmark.results.schema import Report
from edgekd.core.machine import in_cores

QUICK_MARK = "QUICK – indicative only"
_STATE = {"load_average": "", "cpu_mhz": " MHz", "temperature_c": " °C", "throttle_count": "", "throttle_flags": "",
          "power_mode": ""}  # fmt: skip
_METHOD = {
    "Accuracy": "Every image is read once, with each subject's own preprocessing. If a model has more classes than a "
    "suite, its predictions are restricted to those of the suite. Means over suites are unweighted. OOD images are not "
    "used in any fit.",
    "Unknown images": "Both scores are computed from the subject's logits without temperature. Known images are the "
    "in-domain test images of the given suite.",
    "Inside the clock": "One call of the model, from one RGB uint8 image in memory to its logits in memory. "
    "Normalisation is part of the graph, or done in numpy for files with float input. Single stream, batch 1, real "
    "images in rotation.",
    "Background (†)": "The teacher and the torch student are timed briefly in the calling process, for context. They "
    "are not comparable with a file.",
    "Energy": "Only the given sensor is read, between blocks, never inside the clock.",
    "Placement": "The provider that ran each node, as reported by the runtime. There is no report if a part of a file "
    "ran on another provider than requested.",
}
_DEFINED: tuple[type[BaseModel], ...] = (
    rows.AccuracyRow, rows.SummaryRow, schema.GainRow, rows.CorruptionRow, rows.CueConflictRow, rows.VocabularyRow,
    rows.DetectionRow, rows.UnknownRow, rows.LatencyRow, rows.ThroughputRow, rows.EnergyRow,
)  # fmt: skip


def images(report: Report) -> str:
    """Return the suites and their numbers of images."""
    hidden = report.families("corruption", "val")
    texts = dict.fromkeys(
        f"{row.suite} n = {row.n:,}{f' ({row.run})' if row.run else ''}"
        for row in report.suites
        if row.suite not in hidden
    )
    return f"Images: {', '.join(texts)}."


def remarks(report: Report) -> list[str]:
    """Return the remarks on the suites, one sentence each."""
    texts = (
        f"{'corruptions' if row.family == 'corruption' else row.suite}: {remark}"
        for row in report.suites
        for remark in row.remarks
    )
    return list(dict.fromkeys(texts))


def machine_line(report: Report) -> str:
    """Return processor, cores and providers."""
    env = report.environment
    providers = ", ".join(dict.fromkeys(row.provider for row in report.latency if not mark(row)))
    return f"{env['cpu']}, {in_cores(env['usable_cores'])}{f', {providers}' if providers else ''}"


def latency_rule(report: Report) -> str:
    """Return the latency protocol of this report with its parameters."""
    rule = report.protocol["latency"]
    counts = sorted({row.threads for row in report.latency if not mark(row)}, key=str)
    threads = ", ".join("the runtime's default" if n is None else str(n) for n in counts)
    where = "one fresh process, the files in alternating blocks"
    if rule["processes"] > 1:
        where = f"each of {rule['processes']} fresh processes"
    return (
        f"Latency: single stream, batch 1, warm-up of at least {rule['warmup_runs']} runs and {rule['warmup_s']:g} s, "
        f"then at least {rule['runs']} runs and {rule['seconds']:g} s in {where}, with all samples; "
        f"threads: {threads or NONE}."
    )


def origin(report: Report) -> Iterator[Item]:
    """Yield parity, placement, quantization, machine, devices, runs and preprocessing."""
    yield _parity(report)
    placed: list[Cells] = [
        {"file": f"{row.run}/{row.subject}", "provider": who or NONE}
        | {"nodes": f"{sum(kinds.values()):,}" if kinds else NONE}
        | {"operators": most_frequent(kinds) if kinds else "n/a", "source": row.source}
        for row in report.placements
        for who, kinds in (row.nodes or {row.provider: {}}).items()
    ]
    yield table("Placement", placed, heads=2, words=True)
    for one in report.context.get("artifacts", ()):
        if one.get("quantization"):
            yield Text(words(one["quantization"]), f"Quantization of {one['run']}/{one['name']}")
    yield _machine("Machine", report.environment)
    for one in report.environment.get("devices", ()):
        yield from _device(one)
    for one in report.context.get("runs", ()):
        yield table(f"Run {one['name']}", facts(one, "name"), words=True)
    if others := {k: v for k, v in report.context.items() if k not in ("runs", "artifacts")}:
        yield Text(f"{words(others)}.")
    users: dict[str, dict[str, None]] = {}
    for row in report.listed:
        users.setdefault(row.preprocess, {})[row.subject] = None
    pixels: list[Cells] = [
        {"hash": key, "settings": words(settings), "subjects": ", ".join(users.get(key, {}))}
        for key, settings in report.protocol["preprocess"].items()
    ]
    yield table("Preprocessing", pixels, words=True)


def _parity(report: Report) -> Table:
    providers = {row.who: row.provider for row in report.latency}
    cells: list[Cells] = []
    for one in report.context.get("artifacts", ()):
        parity = one["parity"]
        passed = parity.get("passed", True)
        cells.append(
            {
                "file": f"{one['run']}/{one['name']}",
                "same class %": percent(parity["top1_agreement"]),
                "largest logit error / range": f"{parity['max_error_relative']:.2e}",
                "cosine": f"{parity['cosine']:.5f}",
                "KL, nats": f"{parity['kl']:.2e}",
                "images": f"{parity['n']:,}",
                "check": Cell("✓ passed", "good") if passed else Cell("✗ failed", "bad"),
                "runs on": providers.get((one["run"], one["name"]), NONE),
            }
        )
    return table("Parity", cells, note="Compared with the torch student on real images at export.")


def _machine(title: str, env: dict[str, Any]) -> Table:
    """Return processor, system, states before and after, and versions."""
    states = {key: tuple(env[when].get(key) for when in ("before", "after")) for key in _STATE}
    changes = {
        f"{key}{_STATE[key]}": "n/a" if pair == (None, None) else " → ".join(map(str, pair))
        for key, pair in states.items()
    }
    hidden = ("before", "after", "versions", "devices", "device", "artifacts", "emulated")
    versions = {name: version for name, version in env["versions"].items() if version}
    return table(title, facts(env, *hidden) + facts(changes) + facts(versions), words=True)


def _device(one: dict[str, Any]) -> Iterator[Item]:
    """Yield facts about a device that ran files, including whether it is emulated."""
    if one["emulated"]:
        text = (
            f"Device {one['device']} is emulated, so its latencies are not those of a real device."
        )
        yield Text(text, tone="note", console=True)
    yield _machine(f"Device {one['device']}", one)
    cells: list[Cells] = [
        {
            "file": name,
            "same class here %": percent(check["agreement_here"]),
            "same pixels %": percent(check["same_pixels"]),
            "engine built there": words(check.get("built")),
        }
        for name, check in one["artifacts"].items()
    ]
    note = (
        "Compared with pixels prepared on this machine and, if its runtime is installed, with the same file here. "
        "Engines are built before timing."
    )
    yield table(f"Files on {one['device']}", cells, note=note)


def most_frequent(kinds: dict[str, int], at_most: int = 6) -> str:
    """Return the most frequent kinds with their counts, and the number of other kinds."""
    ordered = sorted(kinds.items(), key=lambda pair: (-pair[1], pair[0]))
    more = f" and {len(ordered) - at_most} more kinds" if len(ordered) > at_most else ""
    return ", ".join(f"{kind} {count}" for kind, count in ordered[:at_most]) + more


def method(report: Report) -> Iterator[Item]:
    """Yield the definition of every metric, the protocol, and the files with the data."""
    yield from definitions()
    own, background = report.protocol["latency"], report.protocol["latency_context"]
    files = f"files ({own['name']})"
    cells: list[Cells] = [
        {"limit": key.replace("_", " "), files: f"{own[key]:g}", "background (†)": f"{limit:g}"}
        for key, limit in background.items()
        if key != "name"
    ]
    yield table("Latency protocol", cells)
    seconds = report.protocol["seconds"]
    yield Text(
        f"Measuring took {seconds['accuracy']} s for accuracy and {seconds['latency']} s for latency. For programs: "
        f"report.json (schema version {report.schema_version}), predictions.npz, latency.npz.",
        tone="quiet",
    )


def definitions() -> list[Text]:
    """Return name and definition of every metric, and the measurement method."""
    formulas: dict[str, str] = {}
    for metric in (metric for row in _DEFINED for metric in metrics_of(row).values()):
        if metric.formula:
            formulas.setdefault(metric.name, metric.definition)
    return [Text(body, label) for label, body in (formulas | _METHOD).items()]
