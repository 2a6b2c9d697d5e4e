"""`report.md`: the main table, what a reader needs to judge it, and the details."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from edgekd.benchmark.definitions import latency_rule, shown
from edgekd.benchmark.findings import Comparison, CueConflictRow, GateRow, SuiteRow
from edgekd.benchmark.measure.speed import ratio_text
from edgekd.benchmark.page_tables import (
    OWN_HEADER,
    VOCABULARY_HEADER,
    own_metric_cells,
    vocabulary_cells,
)
from edgekd.benchmark.rows import AccuracyRow, LatencyRow, Report
from edgekd.benchmark.table import (
    NONE,
    QUICK_MARK,
    SIZE_HEADER,
    THROUGHPUT_HEADER,
    UNKNOWN_HEADER,
    cost_rows,
    fraction,
    label,
    main_table,
    mark,
    millijoules,
    most_frequent,
    ms,
    percent,
    size_rows,
    throughput_rows,
    unknown_rows,
)
from edgekd.benchmark.verdict import verdict

_COST_HEADER = (
    "run",
    "artifact",
    "ID [95 % CI]",
    "p (ID)",
    "OOD [95 % CI]",
    "p (OOD)",
    "agreement ID / OOD",
)
_SUITE_HEADER = ("run", "subject", "suite", "n", "top-1 [95 % CI]", "macro", "worst class", "ECE", "adaptive ECE",
                 "NLL", "Brier")  # fmt: skip
_LATENCY_HEADER = ("run", "subject", "runtime", "threads", "p50", "p90", "mean", "CV", "runs", "seconds", "first",
                   "load", "read + resize", "end to end p50", "p90", "peak MB", "mJ per image",
                   "above idle")  # fmt: skip


_GATE_HEADER = ("gate", "run", "artifact", "measured", "limit", "")
_CUE_HEADER = (
    "run",
    "subject",
    "suite",
    "n",
    "for the shape",
    "for the texture",
    "shape bias [95 % CI]",
)
_SCALED_HEADER = ("run", "subject", "temperature", "suite", "ECE", "adaptive ECE", "NLL", "Brier")


def markdown(report: Report) -> str:
    """The whole report as Markdown."""
    table = main_table(report)
    lines = [f"# Benchmark ({QUICK_MARK})" if report.quick else "# Benchmark", ""]
    found = verdict(report)
    lines += [f"**{found.headline}.**", ""]
    if report.gates:
        lines += [
            "## Gates",
            "",
            *markdown_table(_GATE_HEADER, map(_gate_cells, report.gates)),
            "",
            "## Numbers",
            "",
        ]
    lines += [*(f"- **{escaped(who)}**: {escaped(text)}" for who, text in found.findings), ""]
    lines += [
        *markdown_table(("run", *table.header), [(run, *cells) for run, cells in table.rows]),
        "",
    ]
    lines += [
        *(f"- {text}" for text in under_table(report)),
        "",
        "![Accuracy against latency](report.png)",
        "",
    ]
    lines += [
        "## Size and work of one answer",
        "",
        *markdown_table(SIZE_HEADER, size_rows(report)),
        "",
    ]
    if costs := list(cost_rows(report, "{:.3f}".format)):
        lines += ["## What the export cost", ""]
        lines += [
            "Torch student minus artifact on the same images, in points; positive is a loss.",
            "",
        ]
        lines += [*markdown_table(_COST_HEADER, costs), ""]
    for pair in report.comparisons:
        lines += _comparison(pair)
    if report.corruptions:
        lines += ["## Corruptions", "", *_corruptions(report), ""]
    if report.cue_conflicts:
        lines += [
            "## Shape or texture",
            "",
            *markdown_table(_CUE_HEADER, map(_cue_cells, report.cue_conflicts)),
            "",
        ]
    if report.vocabularies:
        lines += [
            "## In other words",
            "",
            *markdown_table(VOCABULARY_HEADER, map(vocabulary_cells, report.vocabularies)),
        ]
        lines += [
            "",
            "Loss: top-1 in the run's own words minus top-1 in these, on the same images.",
            "",
        ]
    if report.unknowns:
        lines += [
            "## Images of no known class",
            "",
            *markdown_table(UNKNOWN_HEADER, unknown_rows(report)),
            "",
        ]
        lines += [
            "Known images are told from unknown ones by the largest softmax probability or logit; percent.",
            "",
        ]
    if report.own_metrics:
        lines += [
            "## By the data set's own metrics",
            "",
            *markdown_table(OWN_HEADER, own_metric_cells(report)),
            "",
        ]
    # The 75 cells of the corruptions stand in corruptions.csv.
    plain = [row for row in report.accuracy if not row.suite.startswith("corruption:")]
    lines += ["## Each suite", "", *markdown_table(_SUITE_HEADER, map(_suite_cells, plain)), ""]
    if any(row.scaled for row in plain):
        lines += [
            "## Calibration before → after one temperature",
            "",
            *_calibration(report, plain),
            "",
        ]
    lines += [
        "## Each latency",
        "",
        *markdown_table(_LATENCY_HEADER, map(_latency_cells, report.latency)),
        "",
    ]
    lines += ["Times in ms unless said otherwise.", "", *_energy(report), ""]
    if rows := throughput_rows(report):
        lines += [
            "## Throughput",
            "",
            "Not a latency: whole batches, one after the other, each line in a process of ",
        ]
        lines[-1] += "its own."
        lines += ["", *markdown_table(THROUGHPUT_HEADER, rows), ""]
    if report.placements:
        lines += ["## Parity and placement", "", *_placed(report), ""]
    lines += ["## How it was measured", ""]
    lines += [*(f"- {text}" for text in provenance(report)), ""]
    lines += ["How each number is made: report.html, or docs/report.md.", ""]
    return "\n".join(lines)


def under_table(report: Report) -> list[str]:
    """What a reader needs to judge the table, one statement a line; the first says when the run was a quick one."""
    lines = [f"**{QUICK_MARK}**: the short latency protocol."] if report.quick else []
    lines += map(escaped, report.notes)
    lines.append(escaped(_images(report)))
    told = (f"{_plain_name(row)}: {remark}" for row in report.suites for remark in row.remarks)
    lines += map(escaped, dict.fromkeys(told))
    lines += map(escaped, _devices(report))
    if any(mark(row) for row in report.latency):
        lines.append(
            "†: measured briefly inside the calling process, as background; not comparable with an artifact."
        )
    return lines


def _plain_name(row: SuiteRow) -> str:
    """The suite's name; one for all cells of the corruptions."""
    return "corruptions" if row.family == "corruption" else row.suite


def provenance(report: Report) -> list[str]:
    """Runs, preprocessing, latency protocol and machine, one statement a line."""
    lines = []
    for facts in report.context.get("runs", ()):
        told = (f"{_words(key)} {shown(value)}" for key, value in facts.items() if key != "name")
        lines.append(escaped(f"Run {facts['name']}: {', '.join(told)}."))
    others = {
        key: value for key, value in report.context.items() if key not in ("runs", "artifacts")
    }
    lines += [
        escaped(f"{_words(key).capitalize()}: {shown(value)}.") for key, value in others.items()
    ]
    users: dict[str, dict[str, None]] = {}
    for row in report.summary:
        users.setdefault(row.preprocess, {})[label(row)] = None
    lines.append(
        "Preprocess: "
        + ", ".join(f"{name} ({', '.join(map(escaped, who))})" for name, who in users.items())
        + "."
    )
    return [*lines, latency_rule(report), _machine(report)]


def _images(report: Report) -> str:
    by_run: dict[str, dict[str, None]] = {}
    for row in report.accuracy:
        if row.suite.startswith("corruption:"):
            continue
        by_run.setdefault(row.run, {})[f"{row.suite} n = {row.n}"] = None
    for stranger in report.unknowns:
        by_run.setdefault(stranger.run, {})[f"{stranger.suite} n = {stranger.n}"] = None
    runs_of: dict[str, list[str]] = {}
    for run, parts in by_run.items():
        runs_of.setdefault(", ".join(parts), []).append(run)
    if len(runs_of) == 1:
        return f"Images: {next(iter(runs_of))}."
    return (
        "Images: "
        + "; ".join(f"{parts} ({', '.join(runs)})" for parts, runs in runs_of.items())
        + "."
    )


def _machine(report: Report) -> str:
    env = report.environment
    versions = ", ".join(
        f"{name} {version}" for name, version in env["versions"].items() if version
    )
    return (
        f"Machine: {env['cpu']}, {env['usable_cores']} cores, governor {env['governor'] or 'unknown'}, load average "
        f"{env['before']['load_average']} before and {env['after']['load_average']} after, "
        f"{_before_after(env)}; "
        f"features {', '.join(env['features']) or 'unknown'}; Python {env['python']}, {versions}."
    )


def _before_after(facts: dict[str, Any]) -> str:
    """Temperature, throttling and power mode at both ends of the measurement."""
    told = []
    names = (("temperature_c", "°C"), ("throttle_count", "throttling events"), ("throttle_flags", "throttling flags"),
             ("power_mode", "power mode"))  # fmt: skip
    for key, name in names:
        first, last = (facts[when].get(key) for when in ("before", "after"))
        told.append(f"{name} n/a" if first is None and last is None else f"{name} {first} → {last}")
    return ", ".join(told)


def _devices(report: Report) -> Iterator[str]:
    """One line for each device that ran artifacts; a latency under emulation is called what it is."""
    for facts in report.environment.get("devices", ()):
        versions = ", ".join(
            f"{name} {version}" for name, version in facts["versions"].items() if version
        )
        heat = NONE if facts["temperature_max_c"] is None else f"{facts['temperature_max_c']:g} °C"
        yield (
            f"Device {facts['device']}: {facts['cpu']}, {facts['usable_cores']} cores ({facts['machine']}), governor "
            f"{facts['governor'] or 'unknown'}, highest temperature {heat}, {_before_after(facts)}; "
            f"Python {facts['python']}, {versions}."
        )
        for name, check in facts["artifacts"].items():
            pixels = NONE if check["same_pixels"] is None else f"{percent(check['same_pixels'])} %"
            same = (
                "its runtime is not on this machine, so nothing here answered beside it"
                if check["agreement_here"] is None
                else f"same class as the same file on this machine on {percent(check['agreement_here'])} % of images"
            )
            yield f"{name}: {same}; pixels prepared alike for {pixels} of those compared.{_built(check.get('built'))}"
        if facts["emulated"]:
            yield f"Device {facts['device']} is an **emulation**: its times say nothing about a device."
        if facts["restarts"]:
            yield f"Device {facts['device']} was restarted {facts['restarts']} times between the steps."


def _built(engine: dict[str, Any] | None) -> str:
    if engine is None:
        return ""
    return (
        f" Its engine was built there, before anything was timed, by {engine['builder']} {engine['version']} for "
        f"{engine['gpu']} (compute capability {engine['compute_capability']}) in {engine['seconds']:g} s."
    )


def _gate_cells(row: GateRow) -> tuple[str, ...]:
    measured = f"not evaluated: {row.reason}" if row.value is None else f"{row.value:.4g}"
    verdict = "passed" if row.passed else "FAILED"
    return (
        row.metric,
        row.run or NONE,
        row.subject or NONE,
        measured,
        f"{row.operator} {row.limit:g}",
        verdict,
    )


def _comparison(pair: Comparison) -> list[str]:
    rows = []
    for one in pair.accuracy:
        first, last = (100 * end for end in one.ci95)
        difference = f"{100 * one.value:+.1f} [{first:+.1f}, {last:+.1f}]"
        accuracies = percent(one.a), percent(one.b)
        rows.append(
            (
                one.suite,
                str(one.n),
                *accuracies,
                difference,
                f"{one.mcnemar_p:.3f}",
                percent(one.agreement),
            )
        )
    return [
        "## A against B",
        "",
        f"A is {pair.a_run}/{pair.a}, B is {pair.b_run}/{pair.b}. **Latency A / B: "
        f"{escaped(ratio_text(pair))}** (p50 {ms(pair.p50_a_ms)} against {ms(pair.p50_b_ms)} ms, from {pair.turns} "
        f"pairs of blocks that took turns in {pair.processes} process{'es' if pair.processes > 1 else ''}).",
        "",
        *markdown_table(
            ("suite", "n", "A", "B", "A − B, points [95 % CI]", "McNemar p", "agreement"), rows
        ),
        "",
    ]


def _corruptions(report: Report) -> list[str]:
    lines = []
    header = (
        "run",
        "subject",
        "robust accuracy",
        "mCE",
        *(str(severity) for severity in range(1, 6)),
    )
    rows = []
    for row in report.corruptions:
        levels = (
            percent(sum(cells) / len(cells)) for cells in zip(*row.top1.values(), strict=True)
        )
        rows.append((row.run, row.subject, percent(row.robust_accuracy), percent(row.mce), *levels))
    lines += markdown_table(header, rows)
    lines += [
        "",
        "Columns 1–5: mean top-1 over the 15 corruptions at that severity. Single corruptions, mean over severities:",
    ]
    names = list(report.corruptions[0].top1)
    by_name = [
        (row.run, row.subject, *(percent(sum(row.top1[name]) / 5) for name in names))
        for row in report.corruptions
    ]
    lines += [
        "",
        *markdown_table(("run", "subject", *(name.replace("_", " ") for name in names)), by_name),
        "",
    ]
    told = dict.fromkeys(row.mce_denominators for row in report.corruptions if row.mce_denominators)
    lines += [f"Denominators of mCE: {text}." for text in told]
    return lines


def _cue_cells(row: CueConflictRow) -> tuple[str, ...]:
    bias = percent(row.shape_bias)
    if row.shape_bias_ci95 is not None:
        bias += f" [{percent(row.shape_bias_ci95[0])}, {percent(row.shape_bias_ci95[1])}]"
    return (
        row.run,
        row.subject,
        row.suite,
        str(row.n),
        percent(row.shape),
        percent(row.texture),
        bias,
    )


def _calibration(report: Report, plain: list[AccuracyRow]) -> list[str]:
    temperature = {(row.run, row.subject): row.temperature for row in report.summary}
    rows = []
    for row in plain:
        factor = temperature[row.run, row.subject]
        if row.scaled is not None and factor is not None:
            pairs = (
                (getattr(row, name), getattr(row.scaled, name))
                for name in ("ece", "adaptive_ece", "nll", "brier")
            )
            cells = (f"{fraction(before)} → {fraction(after)}" for before, after in pairs)
            rows.append((row.run, row.subject, f"{factor:.3f}", row.suite, *cells))
    return markdown_table(_SCALED_HEADER, rows)


def _suite_cells(row: AccuracyRow) -> tuple[str, ...]:
    low, high = row.top1_ci95
    top1 = f"{percent(row.top1)} [{percent(low)}, {percent(high)}]"
    worst = f"{row.worst_class} {percent(row.worst_class_recall)}"
    rest = (fraction(value) for value in (row.ece, row.adaptive_ece, row.nll, row.brier))
    return (row.run, row.subject, row.suite, str(row.n), top1, percent(row.macro), worst, *rest)


def _latency_cells(row: LatencyRow) -> tuple[str, ...]:
    threads = NONE if row.threads is None else str(row.threads)
    times = (
        ms(row.p50_ms),
        ms(row.p90_ms),
        ms(row.mean_ms),
        f"{row.cv:.2f}",
        str(row.n),
        f"{row.seconds:.1f}",
    )
    once = (ms(row.first_ms), ms(row.load_ms), ms(row.prepare_p50_ms))
    whole = (ms(row.end_to_end_p50_ms), ms(row.end_to_end_p90_ms))
    peak = NONE if row.peak_rss_mb is None else f"{row.peak_rss_mb:.0f}"
    joules = (
        (row.energy.joules_per_image, row.energy.joules_per_image_above_idle)
        if row.energy
        else (None, None)
    )
    return (
        row.run,
        row.subject,
        row.provider,
        threads,
        *times,
        *once,
        *whole,
        peak,
        *map(millijoules, joules),
    )


def _placed(report: Report) -> Iterator[str]:
    """Parity at export, and where the nodes ran, a line for each artifact."""
    for row in report.placements:
        name = f"{row.run}/{row.subject}"
        yield from (
            f"- {escaped(name)}: parity with the torch student on {facts['parity']['n']} images: same class "
            f"{percent(facts['parity']['top1_agreement'])} %, largest logit error / range "
            f"{facts['parity']['max_error_relative']:.2e}."
            for facts in report.context.get("artifacts", ())
            if (facts["run"], facts["name"]) == (row.run, row.subject)
        )
        if row.nodes is None:
            yield f"- {escaped(name)}: placement n/a, {escaped(row.told_by)}."
        else:
            told = "; ".join(
                f"{sum(kinds.values())} nodes on {who} ({most_frequent(kinds)})"
                for who, kinds in row.nodes.items()
            )
            yield f"- {escaped(name)}: {escaped(told)}, by {escaped(row.told_by)}."


def _energy(report: Report) -> list[str]:
    told = [
        f"Energy of {row.run}/{row.subject} by {one.sensor} ({one.covers}), over the measured blocks, idle power "
        f"included: {one.mean_w:.2f} W; at rest before "
        + (
            "unknown."
            if one.idle_w is None
            else f"{one.idle_w:.2f} W, which is what above idle leaves out."
        )
        for row in report.latency
        if (one := row.energy) is not None
    ]
    return [f"- {escaped(text)}" for text in told] or [
        "Energy: n/a, no sensor was declared (--energy)."
    ]


def _words(key: str) -> str:
    return key.replace("_", " ")


def markdown_table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    def line(cells: tuple[str, ...]) -> str:
        return "| " + " | ".join(map(escaped, cells)) + " |"

    return [line(header), "|" + "---|" * len(header), *(line(row) for row in rows)]


def escaped(text: str) -> str:
    """Text that a user chose, so that it stays text: no HTML, no column, no emphasis, no new line."""
    return re.sub(r"([\\|<>`*])", r"\\\1", " ".join(text.split()))
