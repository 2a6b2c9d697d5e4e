"""Write `MODEL_CARD.md` from a report, with a `model-index` for model hubs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml
from markupsafe import Markup

from edgekd.benchmark.report import provenance, tables
from edgekd.benchmark.report.elements import Item, Section, Text, facts, printable, section, table
from edgekd.benchmark.report.render import markdown_sections, squeezed, templates
from edgekd.benchmark.report.summary import answers, resizes_inside, takes_floats
from edgekd.benchmark.results.metric import Metric, metrics_of, percent
from edgekd.benchmark.results.rows import AccuracyRow, LatencyRow, SummaryRow
from edgekd.benchmark.results.schema import Report, of

_TYPES = {"top1": "accuracy", "macro": "recall", "ece": "ece"}
_CLOCK = ("p50_ms", "p90_ms")
"""Metrics of the `model-index`: fields of an accuracy row with the hub's types, and of a latency row."""


def model_card(report: Report) -> str:
    """Return the card of the report's first run."""
    run = report.runs[0]
    report = _of_run(report, run)
    own: dict[str, Any] = next((one for one in report.context["runs"] if one["name"] == run), {})
    settings = [table("Settings", facts(own, "name"), words=True)] if own else []
    before = (
        section("results", "Results", _results(report)),
        section("calibration", "Calibration", tables.calibration(report)),
        section("latency", "Latency", _latency(report)),
    )
    training = section("training", "Training", settings)
    definitions = section("method", "How each number is measured", provenance.definitions())
    students = {row.who for row in report.summary if row.kind != "teacher"}
    accuracies = [row for row in report.accuracy if row.who in students]
    card = (
        templates()
        .get_template("MODEL_CARD.md.jinja")
        .render(
            front=Markup(_front(report)),
            run=run,
            facts=own,
            report=report,
            percent=percent,
            use=_use(report),
            before=_markdown(*before),
            training=_markdown(training),
            definitions=_markdown(definitions),
            worst=min(accuracies, key=lambda row: row.top1, default=None),
            unknowns=[row for one in report.exported for row in of(report.unknowns, one)],
        )
    )
    return squeezed(card.splitlines())


def _markdown(*sections: Section) -> Markup:
    return Markup("\n".join(markdown_sections(sections)))


def _of_run(report: Report, run: str) -> Report:
    """Return the report with only one run's rows."""
    whole = ("notes", "suites", "comparisons", "speed")
    own: dict[str, Any] = {
        name: tuple(row for row in rows if row.run == run)
        for name, rows in report
        if isinstance(rows, tuple) and name not in whole
    }
    own["suites"] = tuple(row for row in report.suites if row.run in (None, run))
    artifacts = [one for one in report.context.get("artifacts", ()) if one["run"] == run]
    context = {"runs": report.context.get("runs", ()), "artifacts": artifacts}
    return report.model_copy(update=own | {"context": context, "comparisons": ()})


def _front(report: Report) -> str:
    """Return the front matter in the form of the hub's model card specification.

    Characters that Markdown would read as markup are written as YAML escapes, which keeps the values unchanged.
    """
    subjects = report.exported or [row for row in report.summary if row.kind == "torch"]
    formats = {one["format"] for one in report.context["artifacts"]}
    data = {
        "pipeline_tag": "image-classification",
        "tags": ["edgekd", "knowledge-distillation", "out-of-distribution", *sorted(formats)],
        "model-index": [
            {"name": printable(f"{row.run}/{row.subject}"), "results": list(_index(report, row))}
            for row in subjects
        ],
    }

    class Dumper(yaml.SafeDumper):  # type: ignore[misc]
        pass

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
        quoted = '"' if re.search(r"[\[\]<>`]", value) else None
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=quoted)

    Dumper.add_representer(str, text)
    written = yaml.dump(data, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=1000)
    for character in "<`":
        written = written.replace(character, f"\\x{ord(character):02X}")
    written = written.replace("![", "!\\x5B").replace("](", "\\x5D(")
    return f"---\n{written}---\n"


def _index(report: Report, row: SummaryRow) -> Iterator[dict[str, Any]]:
    """Yield one result for each suite, with the values of report.json: fractions 0–1 and milliseconds."""

    def entry(kind: str, metric: Metric, value: float) -> dict[str, Any]:
        unit = f", {metric.unit}" if metric.unit not in ("", "%") else ""
        return {"type": kind, "name": f"{metric.name}{unit}", "value": value}

    suites, time = {one.suite: one for one in report.suites}, report.time(row)
    accuracy, latency = metrics_of(AccuracyRow), metrics_of(LatencyRow)
    for own in of(report.accuracy, row):
        suite = suites[own.suite]
        if suite.family == "corruption":
            continue
        metrics = [entry(kind, accuracy[key], getattr(own, key)) for key, kind in _TYPES.items()]
        if own.suite == "id":
            # The hub only stores latencies with a data set, so use the images that were timed.
            metrics += [entry("latency", latency[key], getattr(time, key)) for key in _CLOCK]
        data, split = printable(suite.data), printable(own.suite)
        yield {
            "task": {"type": "image-classification"},
            "dataset": {"type": data, "name": f"{data}, {split}", "split": split},
            "metrics": metrics,
        }


def _results(report: Report) -> Iterator[Item]:
    yield from answers(report)
    yield tables.gates(report.gates)
    yield tables.results(report)
    yield Text(provenance.images(report))


def _latency(report: Report) -> Iterator[Item]:
    yield next(tables.latencies(report))
    short = f" {provenance.QUICK_MARK}." if report.quick else ""
    yield Text(f"On {provenance.machine_line(report)}. {provenance.latency_rule(report)}{short}")
    if any(tables.mark(row) for row in report.latency):
        yield Text(tables.MARKED)


def _use(report: Report) -> dict[str, Any] | None:
    """Return input and code of an example with the first ONNX file, preferably one with uint8 input."""
    onnx = [one for one in report.context["artifacts"] if one["format"] == "onnx"]
    if not onnx:
        return None
    one = next((one for one in onnx if not takes_floats(one)), onnx[0])
    row = next(row for row in report.exported if row.who == (one["run"], one["name"]))
    pixels = report.protocol["preprocess"][row.preprocess]
    name, file = (repr(printable(text)) for text in (one["name"], f"/{next(iter(one['files']))}"))
    given = {"p": pixels, "floats": takes_floats(one), "resizes": resizes_inside(one)}
    code = templates().get_template("use.py.jinja").render(given, name=name, file=file)
    return given | {"code": Markup(code)}
