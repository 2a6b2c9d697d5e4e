"""The tables of the page, each from the rows of a report."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from edgekd.benchmark.definitions import shown
from edgekd.benchmark.findings import CorruptionRow, VocabularyRow
from edgekd.benchmark.pieces import Cell, Table
from edgekd.benchmark.rows import AccuracyRow, Report
from edgekd.benchmark.table import (
    NONE,
    SIZE_HEADER,
    THROUGHPUT_HEADER,
    UNKNOWN_HEADER,
    cost_rows,
    fraction,
    main_table,
    mark,
    millijoules,
    most_frequent,
    ms,
    p_value,
    percent,
    size_rows,
    throughput_rows,
    unknown_rows,
)
from edgekd.benchmark.verdict import gate_cells


def _of_runs(report: Report, table: Table) -> Table:
    """`table` without its column of runs where the report has one run, which the page names once."""
    if len({row.run for row in report.summary}) > 1:
        return table
    rows = tuple(row[1:] for row in table.rows)
    return replace(table, header=table.header[1:], rows=rows, heads=table.heads - 1)


def gates(report: Report) -> Table | None:
    """Every gate with its outcome first; None without gates."""
    if not report.gates:
        return None
    rows: list[tuple[str | Cell, ...]] = []
    for gate in report.gates:
        outcome, *others = gate_cells(gate)
        sign = "✓" if gate.passed else "✗"
        rows.append((Cell(f"{sign} {outcome}", "good" if gate.passed else "bad"), *others))
    caption = "Gates: what every exported file must fulfil"
    return Table(caption, ("outcome", "gate", "file", "measured"), tuple(rows), heads=2)


def results(report: Report) -> list[tuple[str, Table]]:
    """The main table, one for each run."""
    table = main_table(report)
    runs = list(dict.fromkeys(run for run, _ in table.rows))
    caption = "Accuracy in and out of domain in percent, gap in points, latency of one image"
    return [
        (run, Table(caption if len(runs) == 1 else f"{run}: {caption[0].lower()}{caption[1:]}", table.header,
                    tuple(cells for name, cells in table.rows if name == run)))
        for run in runs
    ]  # fmt: skip


def sizes(report: Report) -> Table:
    """Parameters and multiply-accumulates of every subject."""
    caption = "Parameters and multiply-accumulates of one answer, in millions; files in 10⁶ bytes"
    return _of_runs(report, Table(caption, SIZE_HEADER, tuple(size_rows(report)), heads=2))


def suites(report: Report) -> Table:
    """Every accuracy but the cells of the corruptions."""
    header = (
        "subject",
        "suite",
        "n",
        "top-1 [95 % CI]",
        "macro",
        "worst class",
        "ECE",
        "adaptive ECE",
        "NLL",
        "Brier",
    )
    heavy = {row.suite for row in report.suites if row.family == "corruption"}
    several = len({row.run for row in report.summary}) > 1

    def cells(row: AccuracyRow) -> tuple[str, ...]:
        low, high = row.top1_ci95
        name = f"{row.run}: {row.subject}" if several else row.subject
        top1 = f"{percent(row.top1)} [{percent(low)}, {percent(high)}]"
        worst = f"{row.worst_class} {percent(row.worst_class_recall)}"
        rest = tuple(fraction(value) for value in (row.ece, row.adaptive_ece, row.nll, row.brier))
        return (name, row.suite, f"{row.n:,}", top1, percent(row.macro), worst, *rest)

    rows = tuple(cells(row) for row in report.accuracy if row.suite not in heavy)
    return Table("Every subject on every suite", header, rows, heads=2)


def costs(report: Report) -> Table | None:
    """What the export cost; None without artifacts or a torch student."""
    rows = tuple(cost_rows(report, p_value))
    if not rows:
        return None
    header = ("run", "file", "ID [95 % CI]", "p", "OOD [95 % CI]", "p", "agreement ID / OOD, %")
    caption = "Accuracy of the torch student minus that of the file, in points on the same images; positive is a loss"
    return _of_runs(report, Table(caption, header, rows, heads=2))


def corruption(row: CorruptionRow) -> Table:
    """One subject on the 15 corruptions."""
    cells = tuple(
        (
            name.replace("_", " "),
            *(percent(value) for value in values),
            percent(sum(values) / len(values)),
        )
        for name, values in row.top1.items()
    )
    mce = (
        ""
        if row.mce is None
        else f", mCE {percent(row.mce)} with the denominators of {row.mce_denominators}"
    )
    caption = f"{row.run}: {row.subject}, top-1 in percent, n = {row.n:,}; robust accuracy "
    caption += f"{percent(row.robust_accuracy)}{mce}"
    return Table(caption, ("corruption", "1", "2", "3", "4", "5", "mean"), cells)


def cue_conflicts(report: Report) -> Table | None:
    """Shape or texture; None where it was not measured."""
    if not report.cue_conflicts:
        return None
    rows = []
    for row in report.cue_conflicts:
        low_high = (
            ""
            if row.shape_bias_ci95 is None
            else f" [{', '.join(percent(end) for end in row.shape_bias_ci95)}]"
        )
        rows.append((f"{row.run}: {row.subject}", row.suite, f"{row.n:,}", percent(row.shape), percent(row.texture),
                     percent(row.shape_bias) + low_high))  # fmt: skip
    header = ("subject", "suite", "n", "for the shape", "for the texture", "shape bias [95 % CI]")
    return Table("Shape or texture, in percent (Geirhos et al. 2019)", header, tuple(rows))


VOCABULARY_HEADER = ("run", "subject", "suite", "top-1 [95 % CI]", "own words", "loss, points", "to added names",
                     "names added", "n")  # fmt: skip


def unknowns(report: Report) -> Table | None:
    """How well images of no known class are told from known ones; None where none were given."""
    rows = tuple(unknown_rows(report))
    caption = "Images of no known class, told from known ones by the largest softmax probability or logit, in percent"
    return _of_runs(report, Table(caption, UNKNOWN_HEADER, rows, heads=4)) if rows else None


OWN_HEADER = ("run", "subject", "suite", "metric", "value", "computed by")


def vocabulary_cells(row: VocabularyRow) -> tuple[str, ...]:
    """A line about one subject asked in other words; n/a with its reason where it cannot be."""
    who, asked = (row.run, row.subject, row.suite), (str(row.added), f"{row.n:,}")
    if row.top1 is None or row.top1_ci95 is None or row.base_top1 is None:
        return (*who, f"n/a: {row.reason}", NONE, NONE, NONE, *asked)
    low, high = row.top1_ci95
    top1 = f"{percent(row.top1)} [{percent(low)}, {percent(high)}]"
    loss = f"{100 * (row.base_top1 - row.top1):+.1f}"
    return (*who, top1, percent(row.base_top1), loss, percent(row.to_added), *asked)


def vocabularies(report: Report) -> Table | None:
    """What changed words cost; None where none were asked for."""
    rows = tuple(tuple(map(_reason, vocabulary_cells(row))) for row in report.vocabularies)
    caption = "The same images asked in other words: templates, class names that no image has"
    return _of_runs(report, Table(caption, VOCABULARY_HEADER, rows, heads=2)) if rows else None


def _reason(text: str) -> str | Cell:
    """A cell that says why it has no number may take several lines."""
    return Cell(text, "why") if text.startswith("n/a: ") else text


def own_metric_cells(report: Report) -> list[tuple[str, ...]]:
    return [
        (row.run, row.subject, row.suite, name, f"{value:.4g}", row.told_by)
        for row in report.own_metrics
        for name, value in row.metrics.items()
    ]


def own_metrics(report: Report) -> Table | None:
    """Metrics that data sets define for themselves; None without such suites."""
    rows = tuple(own_metric_cells(report))
    table = Table("Metrics of the data set's own package", OWN_HEADER, rows, heads=2)
    return _of_runs(report, table) if rows else None


def scaled(report: Report) -> Table | None:
    """Calibration before and after the temperature; None without ID validation."""
    several = len({row.run for row in report.summary}) > 1
    rows = []
    for row in report.summary:
        if row.temperature is None or row.same_as is not None:
            continue
        name = f"{row.run}: {row.subject}" if several else row.subject
        inside = f"{fraction(row.ece_id)} → {fraction(row.ece_id_scaled)}"
        rows.append(
            (
                name,
                f"{row.temperature:.3f}",
                inside,
                f"{fraction(row.ece_ood)} → {fraction(row.ece_ood_scaled)}",
            )
        )
    header = ("subject", "temperature", "ECE ID before → after", "ECE OOD before → after")
    caption = "Calibration before and after one temperature, fitted on ID validation only"
    return Table(caption, header, tuple(rows)) if rows else None


def latency(report: Report) -> Table:
    """Every latency with all its numbers."""
    # What is asked for most comes first: a phone shows three or four columns.
    header = ("subject", "p50", "p90", "p99", "mean", "CV", "first", "load", "read + resize", "end to end p50", "p90",
              "peak MB", "runs", "seconds", "processes", "threads", "runtime")  # fmt: skip
    several = len({row.run for row in report.summary}) > 1
    rows = tuple(
        (
            (f"{row.run}: {row.subject}" if several else row.subject) + mark(row),
            ms(row.p50_ms), ms(row.p90_ms), ms(row.p99_ms), ms(row.mean_ms), f"{row.cv:.2f}",
            ms(row.first_ms), ms(row.load_ms), ms(row.prepare_p50_ms),
            ms(row.end_to_end_p50_ms), ms(row.end_to_end_p90_ms),
            NONE if row.peak_rss_mb is None else f"{row.peak_rss_mb:.0f}",
            f"{row.n:,}", f"{row.seconds:.1f}", str(row.processes),
            NONE if row.threads is None else str(row.threads), row.provider,
        )
        for row in report.latency
    )  # fmt: skip
    return Table("Latency of one image, times in ms", header, rows)


def throughput(report: Report) -> Table | None:
    """Images per second; None where no batch sizes or thread counts were asked for."""
    rows = tuple(tuple(map(_reason, row)) for row in throughput_rows(report))
    caption = "Throughput: whole batches one after the other, each line in a process of its own; not a latency"
    return _of_runs(report, Table(caption, THROUGHPUT_HEADER, rows, heads=2)) if rows else None


def energy(report: Report) -> Table | None:
    """Energy per image; None where no sensor was declared."""
    rows = tuple(
        (row.run, row.subject, millijoules(one.joules_per_image), millijoules(one.joules_per_image_above_idle),
         f"{one.mean_w:.2f}", NONE if one.idle_w is None else f"{one.idle_w:.2f}", f"{one.seconds:.0f}",
         f"{one.sensor} ({one.covers})")
        for row in report.latency
        if (one := row.energy) is not None
    )  # fmt: skip
    header = (
        "run",
        "file",
        "mJ per image",
        "mJ above idle",
        "mean W",
        "idle W",
        "seconds",
        "sensor",
    )
    table = Table("Energy of one image, over the measured latency blocks", header, rows, heads=2)
    return _of_runs(report, table) if rows else None


def parity(report: Report) -> Table | None:
    """Parity at export and the provider each file ran on; None without exported files."""
    rows = []
    provider = {(row.run, row.subject): row for row in report.latency}
    for facts in report.context.get("artifacts", ()):
        parity, row = facts["parity"], provider.get((facts["run"], facts["name"]))
        outcome = (
            Cell("✓ passed", "good") if parity.get("passed", True) else Cell("✗ failed", "bad")
        )
        rows.append((
            facts["run"], facts["name"], f"{percent(parity['top1_agreement'])} %",
            f"{parity['max_error_relative']:.2e}", f"{parity['cosine']:.5f}", f"{parity['kl']:.2e}",
            f"{parity['n']:,}", outcome, NONE if row is None else row.provider,
        ))  # fmt: skip
    header = ("run", "file", "same class as torch", "largest logit error / range", "cosine", "KL, nats", "images",
              "check", "runs on")  # fmt: skip
    caption = "Parity with the torch student, checked at export on real images, and the provider each file ran on"
    return _of_runs(report, Table(caption, header, tuple(rows), heads=2)) if rows else None


def placement(report: Report) -> Table | None:
    """Which nodes ran where; None without exported files."""
    rows = []
    for row in report.placements:
        parts = [(row.asked or NONE, NONE, row.told_by)]
        if row.nodes is not None:
            parts = [
                (who, f"{sum(kinds.values()):,}", most_frequent(kinds))
                for who, kinds in row.nodes.items()
            ]
        rows += [
            (row.run, row.subject, *part, row.told_by if row.nodes else NONE) for part in parts
        ]
    header = ("run", "file", "ran on", "nodes", "operators", "told by")
    caption = "Placement: on which provider each node of the loaded graph ran; a report with a fallback is refused"
    return (
        _of_runs(report, Table(caption, header, tuple(rows), heads=2, words=True)) if rows else None
    )


def machine(report: Report) -> Table:
    """Processor, system, clocks and versions."""
    env = report.environment
    rows = [("processor", env["cpu"]), ("cores", f"{env['usable_cores']} usable of {env['cores']}")]
    rows += [
        ("features", ", ".join(env["features"]) or "unknown"),
        ("system", f"{env['system']}, {env['machine']}"),
    ]
    rows.append(("governor", env["governor"] or "unknown"))
    for key, unit in (("load_average", ""), ("cpu_mhz", " MHz"), ("temperature_c", " °C"), ("throttle_count", ""),
                      ("throttle_flags", ""), ("power_mode", "")):  # fmt: skip
        before, after = (
            "n/a" if env[when].get(key) is None else f"{env[when][key]}{unit}"
            for when in ("before", "after")
        )
        rows.append((key.replace("_", " "), f"{before} before, {after} after"))
    rows.append(("Python", env["python"]))
    rows += [(name, version) for name, version in env["versions"].items() if version]
    known = {"cpu", "cores", "usable_cores", "features", "system", "machine", "governor", "before", "after", "python",
             "versions"}  # fmt: skip
    rows += [
        (key.replace("_", " "), _deep(value)) for key, value in env.items() if key not in known
    ]
    return Table("The machine, and what ran on it", ("what", "value"), tuple(rows), words=True)


def _deep(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key.replace('_', ' ')} {_deep(item)}" for key, item in value.items())
    return shown(value)


def run(facts: dict[str, Any]) -> Table:
    """The facts of one training run."""
    rows = [(key.replace("_", " "), _deep(value)) for key, value in facts.items() if key != "name"]
    return Table(f"Run {facts['name']}", ("what", "value"), tuple(rows), words=True)


def preprocess(report: Report) -> Table:
    """Every way of preparing pixels, and for whom."""
    users: dict[str, list[str]] = {}
    for row in report.summary:
        if row.same_as is None:
            users.setdefault(row.preprocess, []).append(row.subject)
    rows = []
    for name, settings in report.protocol["preprocess"].items():
        told = f"{settings['size']} px, {settings['resize']}, {settings['interpolation']}"
        told += f", crop {settings['crop_pct']:g}" if settings["resize"] == "crop" else ""
        told += f", mean {shown(settings['mean'])}, std {shown(settings['std'])}"
        rows.append((name, told, ", ".join(dict.fromkeys(users.get(name, ())))))
    return Table("How pixels were prepared", ("hash", "settings", "for"), tuple(rows), words=True)


def protocol(report: Report) -> Table:
    """The limits of the latency protocol."""
    own, background = report.protocol["latency"], report.protocol["latency_context"]
    names = (
        ("warmup_runs", "warm-up, runs at least"), ("warmup_s", "warm-up, s at least"),
        ("warmup_limit_s", "warm-up, s at most"),
        ("runs", "measured, runs at least"), ("seconds", "measured, s at least"), ("limit_s", "measured, s at most"),
        ("block_s", "block, s"), ("processes", "fresh processes"),
    )  # fmt: skip
    rows = tuple((label, f"{own[key]:g}", f"{background[key]:g}") for key, label in names)
    return Table(
        "The latency protocol", ("limit", f"files ({own['name']})", "background (†)"), rows
    )
