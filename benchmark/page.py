"""`report.html`: the whole report as one file that needs no network and no script, for light, dark, phone and paper."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from edgekd.benchmark.chart_accuracy import pareto, suite_bars
from edgekd.benchmark.chart_calibration import reliability, reliability_drawing
from edgekd.benchmark.chart_latency import histogram, span, timeline
from edgekd.benchmark.definitions import ACCURACY, LATENCY, latency_rule, shown
from edgekd.benchmark.failures import Failure, Thumbnails
from edgekd.benchmark.findings import CorruptionRow
from edgekd.benchmark.kept import Kept
from edgekd.benchmark.pieces import NARROW, WIDE, Cell, Figure, Look, Table, environment, look, pooled
from edgekd.benchmark.rows import AccuracyRow, Report
from edgekd.benchmark.table import NONE, QUICK_MARK, fraction, main_table, mark, ms, p_value, percent
from edgekd.benchmark.verdict import gate_cells, verdict

MATRIX_CLASSES = 16
"""Larger matrices are cut to the classes with the most mistakes; the others share a column."""
MAX_SUITES = 24
HEAVY_FAMILIES = ("corruption", "cue-conflict")
"""Suites that have tables of their own instead of bars."""


def page(kept: Kept, failures: list[Failure], thumbnails: Thumbnails) -> str:
    """The report as HTML.

    Args:
        kept: the report and its arrays.
        failures: from `failures.failures`.
        thumbnails: pictures of the mistakes; those that are missing are described in words.
    """
    report, seen = kept.report, look(kept.report)
    suites, left_out = _suites(report)
    barred = seen.of_suites([row for row in report.accuracy if row.suite in suites])
    return environment().get_template("report.html").render(
        report=report,
        title=", ".join(dict.fromkeys(row.run for row in report.summary)),
        quick_mark=QUICK_MARK,
        verdict=verdict(report),
        gates=_gates(report),
        results=_results(report),
        dagger=any(mark(row) for row in report.latency),
        images=_images(report),
        rule=latency_rule(report),
        machine=_machine_line(report),
        pareto=_figure("pareto", pareto, seen.points()) if any(point.levels for point in seen.points()) else None,
        legend=[(seen.swatch(*who), name) for who, name in seen.names.items()],
        bars=_figure("suites", lambda rows, width: suite_bars(suites, rows, width), barred) if barred else None,
        left_out=left_out,
        suite_table=_suite_table(report),
        costs=_costs(report),
        comparisons=[_comparison(pair) for pair in report.comparisons],
        corruptions=[_corruption(row) for row in report.corruptions],
        cue_conflicts=_cue_conflicts(report),
        calibration=list(_calibration(kept, seen)),
        scaled=_scaled(report),
        latencies=list(_latencies(kept, seen)),
        latency_table=_latency_table(report),
        failures=[_failure(found, thumbnails, number) for number, found in enumerate(failures)],
        parity=_parity(report),
        quantization=_quantization(report),
        environment=_environment(report),
        runs=[_run(facts) for facts in report.context.get("runs", ())],
        preprocess=_preprocess(report),
        protocol=_protocol(report),
        definitions=[("Accuracy and calibration", ACCURACY), ("Latency", LATENCY)],
    )  # fmt: skip


def _figure(key: str, draw: Any, data: Any) -> Figure:
    return Figure(key, (draw(data, WIDE), draw(data, NARROW)))


def _suites(report: Report) -> tuple[list[str], int]:
    """Suites for the bars, and how many of the best were left out."""
    heavy = {row.suite for row in report.suites if row.family in HEAVY_FAMILIES}
    names = [name for name in dict.fromkeys(row.suite for row in report.accuracy) if name not in heavy]
    if len(names) <= MAX_SUITES:
        return names, 0
    lowest = {name: min(row.top1 for row in report.accuracy if row.suite == name) for name in names}
    chosen = set(sorted(names, key=lambda name: lowest[name])[:MAX_SUITES]) | {"id"}
    return [name for name in names if name in chosen], len(names) - len(chosen & set(names))


def _gates(report: Report) -> Table | None:
    if not report.gates:
        return None
    rows: list[tuple[str | Cell, ...]] = []
    for gate in report.gates:
        outcome, *others = gate_cells(gate)
        sign = "✓" if gate.passed else "✗"
        rows.append((Cell(f"{sign} {outcome}", "good" if gate.passed else "bad"), *others))
    caption = "Gates: what every exported file must fulfil"
    return Table(caption, ("outcome", "gate", "file", "measured"), tuple(rows), heads=2)


def _results(report: Report) -> list[tuple[str, Table]]:
    table = main_table(report)
    runs = list(dict.fromkeys(run for run, _ in table.rows))
    caption = "Accuracy in and out of domain in percent, gap in points, latency of one image"
    return [
        (run, Table(caption if len(runs) == 1 else f"{run}: {caption[0].lower()}{caption[1:]}", table.header,
                    tuple(cells for name, cells in table.rows if name == run)))
        for run in runs
    ]  # fmt: skip


def _images(report: Report) -> str:
    heavy = {row.suite for row in report.suites if row.family in ("corruption", "val")}
    told = dict.fromkeys(
        f"{row.suite} n = {row.n:,}{f' ({row.run})' if row.run else ''}"
        for row in report.suites
        if row.suite not in heavy
    )
    return ", ".join(told)


def _machine_line(report: Report) -> str:
    env = report.environment
    providers = ", ".join(dict.fromkeys(row.provider for row in report.latency if not mark(row)))
    return f"{env['cpu']}, {env['usable_cores']} cores{f', {providers}' if providers else ''}"


def _suite_table(report: Report) -> Table:
    header = ("subject", "suite", "n", "top-1 [95 % CI]", "macro", "worst class", "ECE", "adaptive ECE", "NLL", "Brier")
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


def _costs(report: Report) -> Table | None:
    rows = []
    for row in report.summary:
        if row.quant_cost_id is None and row.quant_cost_ood is None:
            continue
        cells: list[str] = []
        for cost in (row.quant_cost_id, row.quant_cost_ood):
            if cost is None:
                cells += [NONE, NONE]
            else:
                low, high = (100 * end for end in cost.ci95)
                cells += [f"{100 * cost.value:+.1f} [{low:+.1f}, {high:+.1f}]", p_value(cost.mcnemar_p)]
        rows.append((row.run, row.subject, *cells, f"{percent(row.agreement_id)} / {percent(row.agreement_ood)}"))
    if not rows:
        return None
    header = ("run", "file", "ID [95 % CI]", "p", "OOD [95 % CI]", "p", "agreement ID / OOD, %")
    caption = "Accuracy of the torch student minus that of the file, in points on the same images; positive is a loss"
    return Table(caption, header, tuple(rows), heads=2)


def _comparison(pair: Any) -> dict[str, Any]:
    rows = []
    for one in pair.accuracy:
        low, high = (100 * end for end in one.ci95)
        difference = f"{100 * one.value:+.1f} [{low:+.1f}, {high:+.1f}]"
        rows.append((one.suite, f"{one.n:,}", percent(one.a), percent(one.b), difference, p_value(one.mcnemar_p),
                     percent(one.agreement)))  # fmt: skip
    header = ("suite", "n", "A", "B", "A − B, points [95 % CI]", "p", "agreement")
    low, high = pair.p50_ratio_ci95
    return {
        "a": f"{pair.a_run}/{pair.a}",
        "b": f"{pair.b_run}/{pair.b}",
        "ratio": f"{pair.p50_ratio:.3f} [{low:.3f}, {high:.3f}]",
        "how": f"p50 {ms(pair.p50_a_ms)} against {ms(pair.p50_b_ms)} ms, from {pair.turns} pairs of blocks that took "
        f"turns in {pair.processes} process{'' if pair.processes == 1 else 'es'}",
        "table": Table("A and B on the same images", header, tuple(rows)),
    }


def _corruption(row: CorruptionRow) -> Table:
    cells = tuple(
        (name.replace("_", " "), *(percent(value) for value in values), percent(sum(values) / len(values)))
        for name, values in row.top1.items()
    )
    mce = "" if row.mce is None else f", mCE {percent(row.mce)} with the denominators of {row.mce_denominators}"
    caption = f"{row.run}: {row.subject}, top-1 in percent, n = {row.n:,}; robust accuracy "
    caption += f"{percent(row.robust_accuracy)}{mce}"
    return Table(caption, ("corruption", "1", "2", "3", "4", "5", "mean"), cells)


def _cue_conflicts(report: Report) -> Table | None:
    if not report.cue_conflicts:
        return None
    rows = []
    for row in report.cue_conflicts:
        low_high = "" if row.shape_bias_ci95 is None else f" [{', '.join(percent(end) for end in row.shape_bias_ci95)}]"
        rows.append((f"{row.run}: {row.subject}", row.suite, f"{row.n:,}", percent(row.shape), percent(row.texture),
                     percent(row.shape_bias) + low_high))  # fmt: skip
    header = ("subject", "suite", "n", "for the shape", "for the texture", "shape bias [95 % CI]")
    return Table("Shape or texture, in percent (Geirhos et al. 2019)", header, tuple(rows))


def _calibration(kept: Kept, seen: Look) -> Iterator[dict[str, Any]]:
    report = kept.report
    families = {row.suite: row.family for row in report.suites}
    for number, ((run, subject), name) in enumerate(seen.names.items()):
        own = [row.suite for row in report.accuracy if (row.run, row.subject) == (run, subject)]
        outside = [suite for suite in own if suite.startswith("ood:") and families.get(suite) not in HEAVY_FAMILIES]
        figures, colour = [], seen.colours[run, subject]
        if "id" in own:
            found = reliability(kept.logits(run, subject, "id"), kept.labels(run, "id"))
            drawing = reliability_drawing(found, f"Reliability of {name} in domain", colour)
            figures.append(Figure(f"rel-{number}-id", (drawing,), f"ID, ECE {found.ece:.3f}"))
        if outside:
            found = pooled(kept, run, subject, outside)
            where = outside[0] if len(outside) == 1 else f"{len(outside)} OOD suites pooled"
            drawing = reliability_drawing(found, f"Reliability of {name} out of domain", colour)
            figures.append(Figure(f"rel-{number}-ood", (drawing,), f"{where}, ECE {found.ece:.3f}"))
        yield {"name": name, "swatch": seen.swatch(run, subject), "figures": figures}


def _scaled(report: Report) -> Table | None:
    several = len({row.run for row in report.summary}) > 1
    rows = []
    for row in report.summary:
        if row.temperature is None or row.same_as is not None:
            continue
        name = f"{row.run}: {row.subject}" if several else row.subject
        inside = f"{fraction(row.ece_id)} → {fraction(row.ece_id_scaled)}"
        rows.append(
            (name, f"{row.temperature:.3f}", inside, f"{fraction(row.ece_ood)} → {fraction(row.ece_ood_scaled)}")
        )
    header = ("subject", "temperature", "ECE ID before → after", "ECE OOD before → after")
    caption = "Calibration before and after one temperature, fitted on ID validation only"
    return Table(caption, header, tuple(rows)) if rows else None


def _latencies(kept: Kept, seen: Look) -> Iterator[dict[str, Any]]:
    rows = {(row.run, row.subject): row for row in kept.report.latency}
    for number, (who, name) in enumerate(seen.names.items()):
        row, parts = rows[who], kept.samples(*who)
        limits, colour = span(parts), seen.colours[who]
        yield {
            "name": name,
            "swatch": seen.swatch(*who),
            "background": row.protocol == "context",
            "said": f"{row.n:,} samples, p50 {ms(row.p50_ms)} ms, p90 {ms(row.p90_ms)} ms",
            "figures": [
                Figure(f"hist-{number}", (histogram(parts, limits, row.p50_ms, row.p90_ms, name, colour),)),
                Figure(f"time-{number}", (timeline(parts, limits, name, colour),)),
            ],
        }


def _latency_table(report: Report) -> Table:
    header = ("subject", "runtime", "threads", "p50", "p90", "p99", "mean", "CV", "runs", "processes", "seconds",
              "first", "load", "read + resize")  # fmt: skip
    several = len({row.run for row in report.summary}) > 1
    rows = tuple(
        (
            (f"{row.run}: {row.subject}" if several else row.subject) + mark(row),
            row.provider, NONE if row.threads is None else str(row.threads), ms(row.p50_ms), ms(row.p90_ms),
            ms(row.p99_ms), ms(row.mean_ms), f"{row.cv:.2f}", f"{row.n:,}", str(row.processes), f"{row.seconds:.1f}",
            ms(row.first_ms), ms(row.load_ms), ms(row.prepare_p50_ms),
        )
        for row in report.latency
    )  # fmt: skip
    return Table("Latency of one image, times in ms", header, rows)


def _failure(found: Failure, thumbnails: Thumbnails, number: int) -> dict[str, Any]:
    row, matrix = found.row, found.confusion
    wrong = matrix.sum(axis=1) - matrix.diagonal()
    chosen = list(range(len(matrix)))
    if len(chosen) > MATRIX_CLASSES:
        chosen = sorted(sorted(chosen, key=lambda c: -int(wrong[c]))[:MATRIX_CLASSES])
    lines = []
    for c in chosen:
        total = max(int(matrix[c].sum()), 1)
        cells = [(int(matrix[c, d]), round(10 * matrix[c, d] / total), c == d) for d in chosen]
        others = int(matrix[c].sum() - matrix[c, chosen].sum())
        lines.append((found.classes[c], int(matrix[c].sum()), cells, others))
    pairs = sorted(
        ((int(matrix[a, b]), a, b) for a in range(len(matrix)) for b in range(len(matrix)) if a != b and matrix[a, b]),
        key=lambda pair: (-pair[0], pair[1], pair[2]),
    )
    header = ("label", "answered", "images", "share of the label")
    often = tuple(
        (found.classes[a], found.classes[b], str(n), f"{percent(n / int(matrix[a].sum()))} %") for n, a, b in pairs[:8]
    )
    return {
        "number": number,
        "row": row,
        "top1": percent(row.top1),
        "names": [found.classes[c] for c in chosen],
        "lines": lines,
        "cut": len(matrix) - len(chosen),
        "often": Table("Most frequent confusions", header, often, heads=2) if often else None,
        "mistakes": [(mistake, thumbnails.get((row.run, row.suite, mistake.image))) for mistake in found.mistakes],
    }


def _parity(report: Report) -> Table | None:
    rows = []
    provider = {(row.run, row.subject): row for row in report.latency}
    for facts in report.context.get("artifacts", ()):
        parity, row = facts["parity"], provider.get((facts["run"], facts["name"]))
        outcome = Cell("✓ passed", "good") if parity.get("passed", True) else Cell("✗ failed", "bad")
        rows.append((
            facts["run"], facts["name"], f"{percent(parity['top1_agreement'])} %",
            f"{parity['max_error_relative']:.2e}", f"{parity['cosine']:.5f}", f"{parity['kl']:.2e}",
            f"{parity['n']:,}", outcome, NONE if row is None else row.provider,
        ))  # fmt: skip
    header = ("run", "file", "same class as torch", "largest logit error / range", "cosine", "KL, nats", "images",
              "check", "runs on")  # fmt: skip
    caption = "Parity with the torch student, checked at export on real images, and the provider each file ran on"
    return Table(caption, header, tuple(rows), heads=2) if rows else None


def _quantization(report: Report) -> list[tuple[str, str]]:
    said = []
    for facts in report.context.get("artifacts", ()):
        if quantization := facts.get("quantization"):
            told = ", ".join(f"{key.replace('_', ' ')} {shown(value)}" for key, value in quantization.items())
            said.append((f"{facts['run']}/{facts['name']}", told))
    return said


def _environment(report: Report) -> Table:
    env = report.environment
    rows = [("processor", env["cpu"]), ("cores", f"{env['usable_cores']} usable of {env['cores']}")]
    rows += [("features", ", ".join(env["features"]) or "unknown"), ("system", f"{env['system']}, {env['machine']}")]
    rows.append(("governor", env["governor"] or "unknown"))
    for key, unit in (("load_average", ""), ("cpu_mhz", " MHz"), ("temperature_c", " °C")):
        before, after = (
            NONE if env[when].get(key) is None else f"{env[when][key]}{unit}" for when in ("before", "after")
        )
        rows.append((key.replace("_", " "), f"{before} before, {after} after"))
    rows.append(("Python", env["python"]))
    rows += [(name, version) for name, version in env["versions"].items() if version]
    known = {"cpu", "cores", "usable_cores", "features", "system", "machine", "governor", "before", "after", "python",
             "versions"}  # fmt: skip
    rows += [(key.replace("_", " "), _deep(value)) for key, value in env.items() if key not in known]
    return Table("The machine, and what ran on it", ("what", "value"), tuple(rows), words=True)


def _deep(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key.replace('_', ' ')} {_deep(item)}" for key, item in value.items())
    return shown(value)


def _run(facts: dict[str, Any]) -> Table:
    rows = [(key.replace("_", " "), _deep(value)) for key, value in facts.items() if key != "name"]
    return Table(f"Run {facts['name']}", ("what", "value"), tuple(rows), words=True)


def _preprocess(report: Report) -> Table:
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


def _protocol(report: Report) -> Table:
    own, background = report.protocol["latency"], report.protocol["latency_context"]
    names = (
        ("warmup_runs", "warm-up, runs at least"), ("warmup_s", "warm-up, s at least"),
        ("warmup_limit_s", "warm-up, s at most"),
        ("runs", "measured, runs at least"), ("seconds", "measured, s at least"), ("limit_s", "measured, s at most"),
        ("block_s", "block, s"), ("processes", "fresh processes"),
    )  # fmt: skip
    rows = tuple((label, f"{own[key]:g}", f"{background[key]:g}") for key, label in names)
    return Table("The latency protocol", ("limit", f"files ({own['name']})", "background (†)"), rows)
