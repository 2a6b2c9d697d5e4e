"""The command line: the output of each command, one-sentence errors, and exit codes 0, 1 and 2.

The options come from the configurations (`edgekd.configs`). Heavy imports are inside the commands.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from edgekd.cli.commands import command
from edgekd.cli.exits import leave, raise_on_sigterm, stopped_by
from edgekd.core.console import open_streams, out, result, shell_word
from edgekd.core.errors import EdgekdError, GateFailed
from edgekd.core.version import __version__


def _group(text: str) -> typer.Typer:
    return typer.Typer(help=text, no_args_is_help=True, rich_markup_mode=None)


app = typer.Typer(
    name="edgekd",
    help="CLIP-grade robustness on small devices: distil a compact student, export it, and measure the exported file "
    "in and out of domain.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
known = _group("List students, teachers, recipes and targets.")
classes = _group("Add or remove classes of an artifact with --head embedding.")
data = _group("Check a data set before training.")
vl = _group("Small vision-language students (CLIP-TD style).")
app.add_typer(known, name="list")
app.add_typer(classes, name="classes")
app.add_typer(data, name="data")
app.add_typer(vl, name="vl")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"edgekd {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@command(app, "edgekd.api:train", pick=lambda config: "plan_training" if config.plan else "train")
def train(run: Any, config: Any) -> None:
    """Distil a compact student from a CLIP teacher."""
    if config.plan:
        result(*run.lines())
        return
    result(
        f"student: {run.folder}  ({run.steps} steps in {run.train_seconds:.0f} s, "
        f"{run.images_per_second:.0f} images/s, data_wait {run.data_wait_percent:.0f} %)",
        f"next:    edgekd export {shell_word(run.folder)} --int8",
    )


@command(app, "edgekd.api:fetch")
def fetch(written: Any, config: Any) -> None:
    """Download a teacher and students for offline machines."""
    result(
        f"weights: {', '.join(path.name for path in written)}  (in {config.to})",
        f"there:   edgekd train … --weights-dir {shell_word(config.to)}",
    )


@command(app, "edgekd.api:export", pick=lambda config: "choose" if config.auto else "export")
def export(artifacts: Any, config: Any) -> None:
    """Write the file that a device runs. It is checked against the torch student."""
    if config.auto:
        _chosen(artifacts)
        return
    for artifact in artifacts:
        result(f"artifact: {artifact.folder}  ({artifact.precision}, {artifact.agreement})")
    from edgekd.export.run import int8_speed

    speed = int8_speed(artifacts[-1])
    if speed is not None:
        result(f"speed:    one image, one thread, on this machine: INT8 {speed}")
    result(f"next:     edgekd benchmark {shell_word(artifacts[-1].folder.parent.parent)} --quick")


def _chosen(chosen: Any) -> None:
    """Print the recommended file; exit with 1 if no file meets the budget."""
    from edgekd.benchmark.report.recommend import check_recommendation, print_choice

    print_choice(chosen.report, chosen.left_out)
    result(f"report:   {chosen.report.folder}/report.html")
    check_recommendation(chosen.report)
    result(f"artifact: {chosen.artifacts[-1].folder}")


@command(app, "edgekd.api:verify")
def verify(links: Any, config: Any) -> None:
    """Repeat the parity check of an artifact. Exit code 1 if it fails."""
    for link in links:
        word = "holds" if link["passed"] else "BROKEN"
        result(
            f"{word}: {link['link']}  (same class {100 * link['top1_agreement']:.1f} %, largest logit error "
            f"{link['max_error_relative']:.2g} of the range, {link['n']} images)"
        )
    broken = next((link for link in links if not link["passed"]), None)
    if broken is not None:
        raise GateFailed(
            f"{config.artifact} does not match the student; the step {broken['link']} failed: "
            f"{broken['reason']}.",
            "Export again with --overwrite, or measure the accuracy of an INT8 file: edgekd benchmark.",
        )


@command(
    app, "edgekd.api:benchmark", pick=lambda config: "make_bundle" if config.bundle else "benchmark"
)
def benchmark(report: Any, config: Any) -> None:
    """Measure latency and accuracy of the exported files. Accuracy is in domain and out of distribution."""
    from edgekd.benchmark.report.write import check_gates, print_report

    if config.bundle:
        _bundle(report, config)
        return
    print_report(report)
    result(
        f"report: {report.folder}/report.html  (also report.md, report.json, MODEL_CARD.md and the raw data)"
    )
    check_gates(report)


def _bundle(line: str, config: Any) -> None:
    """Print the next steps for a bundle: the command to run on the device, and the command that imports the result."""
    from edgekd.configs.benchmark import SuiteOptions

    words = [str(path) for path in config.paths]
    for name in SuiteOptions.model_fields:
        if name in config.model_fields_set and name != "paths":
            value = getattr(config, name)
            for one in value if isinstance(value, tuple) else (value,):
                words += [f"--{name.replace('_', '-')}", one]
    result(
        f"bundle:  {config.bundle}  (copy it to the device)",
        f"there:   {line}",
        f"then:    edgekd benchmark {shlex.join([*words, '--import', 'RESULT'])}",
    )


@command(app, "edgekd.api:report")
def report(page: Any, _: Any) -> None:
    """Compare finished benchmarks on one page. Nothing is measured again."""
    result(f"comparison: {page}  (also comparison.md)")


@command(app, "edgekd.api:evaluate")
def evaluate(rows: Any, _: Any) -> None:
    """Print the accuracy of a teacher and of a run's student. By domain and part: train, val, test, unseen."""
    columns = _AGREEMENT if rows and "top1_agreement" in rows[0] else _ACCURACY
    header = ["subject", "domain", "part", "images", *(title for title, _ in columns.values())]
    lines = [header]
    for row in rows:
        numbers = [
            "–" if row[key] is None else f"{factor * row[key]:.{1 if factor > 1 else 2}f}"
            for key, (_, factor) in columns.items()
        ]
        lines.append([row["subject"], row["domain"], row["part"] or "–", f"{row['n']:,}", *numbers])
    _print_columns(lines, names=3)


def _print_columns(lines: Sequence[Sequence[str]], names: int) -> None:
    """Print lines of cells below each other: the first `names` to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for cells in lines:
        padded = [
            f"{cell:<{width}}" if place < names else f"{cell:>{width}}"
            for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        out.print("  ".join(padded), markup=False)


_ACCURACY = {"top1": ("top-1 %", 100), "macro": ("macro %", 100)}
_AGREEMENT = {
    "top1_agreement": ("same class %", 100),
    "m_rel": ("M_rel %", 100),
    "recall": ("recall@5 %", 100),
    "m_neigh": ("M_neigh@10 %", 100),
    "m_vlalign": ("M_vlalign@5", 1),
    "angle": ("angle °", 1),
    "distance": ("distance²", 1),
}
"""Key of a row → its column's title and the factor on its numbers."""


@command(app, "edgekd.api:predict")
def predict(predictions: Any, config: Any) -> None:
    """Classify images, folders, a video or a camera. Use a run's student or an exported file."""
    from edgekd.inference.predict import print_predictions

    print_predictions(predictions, config)


@command(app, "edgekd.api:demo")
def demo(page: Any, _: Any) -> None:
    """Open a local web page that classifies your pictures. It shows teacher, student and exported files side by
    side."""
    result(f"demo: {page.url} (stop it with Ctrl-C)")
    page.serve()


@command(app, "edgekd.api:push")
def push(address: Any, config: Any) -> None:
    """Upload a run or an exported file to the Hugging Face Hub."""
    result(f"uploaded: {address}", f"there:    edgekd pull {config.repo} --out model")


@command(app, "edgekd.api:pull")
def pull(folder: Any, _: Any) -> None:
    """Download what edgekd push uploaded."""
    result(f"model: {folder}")
    for path in sorted(folder.glob("artifacts/*")):
        result(f"next:  edgekd predict {shell_word(path)} IMAGE")


@command(app, "edgekd.api:study")
def study(made: Any, _: Any) -> None:
    """Compare recipes over seeds and unseen domains. The result is a table with intervals."""
    from edgekd.benchmark.report.render import print_document
    from edgekd.studies.write import study_document

    if made.tables:
        print_document(study_document(made.folder.name, made.tables))
        result(f"study: {made.folder}/table.md  (also table.csv, table.png, cells.jsonl)")
    else:
        result(
            f"part: of {made.folder}; when all parts are done, run the command without --part to make the tables"
        )
    if made.failures:
        first = made.failures[0]
        raise EdgekdError(
            f"{len(made.failures)} cells failed and are missing above; the first is {first.cell.key}: {first.reason}",
            "Fix the cause and run the same command again; finished cells are kept.",
        )


@command(data, "edgekd.api:check_data")
def check(found: Any, _: Any) -> None:
    """Find unreadable images, duplicates and class imbalance. With a teacher, also find near-duplicates and label
    errors."""
    result(*found.summary(), f"page: {found.page}")


@command(classes, "edgekd.api:add_class")
def add(changed: Any, config: Any) -> None:
    """Add a class by its name, a text vector or a few images. A name is embedded with the run's prompts."""
    from edgekd.targets.bank import read_bank
    from edgekd.targets.bank_change import describe_last

    result(
        f"classes: {', '.join(changed.classes)}",
        f"{config.name}: {describe_last(read_bank(config.artifact / changed.bank))}",
    )


@command(classes, "edgekd.api:remove_class")
def remove(changed: Any, _: Any) -> None:
    """Remove a class that was added since the export."""
    result(f"classes: {', '.join(changed.classes)}")


@command(vl, "edgekd.artifacts.vl:train_vl", "train")
def vl_train(run: Any, _: Any) -> None:
    """Train a small student that takes an image and a text."""
    result(
        f"student: {run.folder}  ({run.record['data']}, validation accuracy {100 * run.record['val_accuracy']:.1f} %, "
        f"{run.record['train_seconds']:.0f} s)",
        f"next:    edgekd vl evaluate {shell_word(run.folder)}",
    )


@command(vl, "edgekd.artifacts.vl:evaluate_vl", "evaluate")
def vl_evaluate(rows: Any, _: Any) -> None:
    """Print the accuracy in and out of domain. The last column is the accuracy of the most frequent answer."""
    lines = [["suite", "examples", "accuracy %", "constant answer %"]]
    for row in rows:
        shares = (f"{100 * row[key]:.1f}" for key in ("accuracy", "majority"))
        lines.append([row["suite"], f"{row['n']:,}", *shares])
    _print_columns(lines, names=1)
    if rows and rows[0]["synthetic"]:
        out.print(
            "synthetic: the sentences were generated from class and domain names.", markup=False
        )


@command(vl, "edgekd.artifacts.vl:export_vl", "export")
def vl_export(record: Any, config: Any) -> None:
    """Write the student as an ONNX file and check it against torch. Inputs are picture and token ids."""
    from edgekd.artifacts.vl import artifact_folder

    parity = record["parity"]
    result(
        f"artifact: {artifact_folder(config.run)}  (same answer as the torch student on "
        f"{100 * parity['top1_agreement']:.1f} % of {parity['n']} examples)",
        f"next:     edgekd vl evaluate {shell_word(config.run)} --onnx",
    )


@app.command("doctor")
def print_doctor() -> None:
    """Print versions, processor, accelerators, folders and hub."""
    from edgekd.cli.doctor import examine

    _print(examine())


@known.command()
def students(
    pattern: Annotated[
        str | None, typer.Argument(help='Search timm\'s names, for example "*mobilenet*".')
    ] = None,
) -> None:
    """List short names, or timm names that match a pattern."""
    from edgekd.cli.doctor import student_lines

    _print(student_lines(pattern))


@known.command()
def teachers(
    pattern: Annotated[
        str | None, typer.Argument(help='Search open_clip\'s names, for example "*B-32*".')
    ] = None,
) -> None:
    """List kinds of teachers, or matching names of open_clip."""
    from edgekd.cli.doctor import teacher_lines

    _print(teacher_lines(pattern))


@known.command()
def recipes() -> None:
    """List training recipes with their stages and terms."""
    from edgekd.cli.doctor import recipe_lines

    _print(recipe_lines())


@command(known, "edgekd.api:missing_embeddings")
def missing(names: Any, _: Any) -> None:
    """List images missing from a file of embeddings. The names are those needed in the file."""
    _print(names)


@known.command()
def targets() -> None:
    """List export targets with their precisions, and device profiles."""
    from edgekd.cli.doctor import target_lines

    _print(target_lines())


def _print(lines: list[str]) -> None:
    for line in lines:
        typer.echo(line)


def main(arguments: list[str] | None = None) -> Any:
    """Run the command line. User errors print one sentence and a hint and exit with 2. A failed gate exits with 1."""
    # Let idle OpenMP threads spin briefly before they sleep (docs/train.md). It must be set before torch is imported.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    open_streams()
    raise_on_sigterm()
    try:
        app(arguments)
    except EdgekdError as error:
        leave(error)
    except (
        OSError
    ) as error:  # a path that the system refuses: too long, a loop, a file in place of a folder
        name, reason = error.filename or "A file", error.strerror or error
        leave(
            EdgekdError(f"{name} cannot be used ({reason}).", "Check the path and its permissions.")
        )
    except SystemExit as ended:
        if ended.code == 130:  # typer turns any KeyboardInterrupt into 130 without a message
            leave(stopped_by(ended))
        raise
