"""The command line: typed flags that say the same words as `edgekd.api`, one-sentence errors, exit codes 0, 1 and 2.

Heavy imports live inside the commands, so that `edgekd --help` answers at once.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgekd.cli_vl import vl
from edgekd.errors import EdgekdError
from edgekd.version import __version__

if TYPE_CHECKING:
    from edgekd.manifest import Precision

app = typer.Typer(
    name="edgekd",
    help="CLIP-grade robustness on small devices: distil a compact student, export it, and measure the exported file "
    "in and out of domain.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
known = typer.Typer(
    help="What edgekd knows: students, teachers, recipes, targets.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(known, name="list")
app.add_typer(vl, name="vl")

RunArgument = Annotated[
    Path | None, typer.Argument(help="Run folder. [default: the newest under runs/]", show_default=False)
]
DataOption = Annotated[
    str | None, typer.Option(help="Images: toy, a folder, or a .csv/.parquet manifest.", show_default=False)
]


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


@app.command()
def train(
    student: Annotated[
        str | None, typer.Option(help="Friendly or timm name: mobilenetv3, vit_tiny, … [default: mobilenetv3]")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Images: toy, a folder (class/img, domain/class/img, train|val|test/class/img), or a .csv/.parquet "
            "manifest. [default: toy]"
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            help="toy, NAME:TAG (open_clip), hf-hub:ORG/MODEL, local-dir:FOLDER, embeddings:FILE.npz. [default: toy]"
        ),
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="See edgekd list recipes. [default: vl2v-adip]")] = None,
    test_domain: Annotated[
        str | None,
        typer.Option(
            help="Domain to leave out as unseen; auto is the last by name, none leaves none out. [default: auto]"
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps of all stages together.")] = None,
    epochs: Annotated[
        float | None,
        typer.Option(
            help="Passes over the training images, instead of steps. [default: 20; toy: a fixed number of steps]"
        ),
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per step over all processes. [default: 64]")] = None,
    size: Annotated[
        int | None, typer.Option(help="Input side in pixels. [default: the student's own; toy: 48]")
    ] = None,
    lr: Annotated[
        float | None, typer.Option(help="Peak learning rate. [default: 3e-4; on toy data 1e-3; from scratch 2e-3]")
    ] = None,
    views: Annotated[int | None, typer.Option(help="Cached augmented views per image. [default: 4]")] = None,
    online_teacher: Annotated[
        bool | None, typer.Option("--online-teacher", help="Ask the teacher at every step instead of caching.")
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(help="photo, imagenet7, imagenet80, domain, or a file of templates. [default: the recipe's]"),
    ] = None,
    descriptions: Annotated[
        str | None,
        typer.Option(help="Sentences about each class for its prompts: a .json or text file, or command:PROGRAM."),
    ] = None,
    captions: Annotated[Path | None, typer.Option(help="A caption per training image: .json or .csv.")] = None,
    vocabulary: Annotated[
        Path | None, typer.Option(help="Names to distil for, one per line, with a recipe that uses no labels.")
    ] = None,
    pretrained: Annotated[
        str | None,
        typer.Option(help="hub, scratch or toy (shipped). [default: hub; on toy data toy]"),
    ] = None,
    student_weights: Annotated[Path | None, typer.Option(help="Start from this safetensors or torch file.")] = None,
    bn: Annotated[
        str | None, typer.Option(help="BatchNorm statistics: frozen or train. [default: frozen; from scratch: train]")
    ] = None,
    ema: Annotated[
        float | None, typer.Option(help="Decay of the averaged weights, 0 for none. [default: 0.99]")
    ] = None,
    average: Annotated[
        str | None, typer.Option(help="Weights to keep: ema, swad, wise-ft or none. [default: ema]")
    ] = None,
    select: Annotated[str | None, typer.Option(help="last, or best on source validation. [default: last]")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights, order and dropout. [default: 0]")] = None,
    precision: Annotated[str | None, typer.Option(help="32-true, bf16-mixed or 16-mixed. [default: 32-true]")] = None,
    compile: Annotated[bool | None, typer.Option("--compile", help="Compile the student with torch.compile.")] = None,
    accelerator: Annotated[str | None, typer.Option(help="auto, cpu or cuda. [default: auto]")] = None,
    devices: Annotated[int | None, typer.Option(help="Processes on this machine. [default: 1]")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder. [default: runs/STUDENT-RECIPE-DATA]")] = None,
    resume: Annotated[
        bool | None,
        typer.Option(
            "--resume", help="Go on where a killed run stopped: the one in --out, else the newest unfinished."
        ),
    ] = None,
    overwrite: Annotated[bool | None, typer.Option("--overwrite", help="Replace an earlier run in --out.")] = None,
    smoke: Annotated[bool | None, typer.Option("--smoke", help="A few steps: does it run at all?")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with any of these settings.")] = None,
    set: Annotated[
        list[str] | None, typer.Option(help="Any setting as name=value or a.b=value; may be repeated.")
    ] = None,
) -> None:
    """Distil a compact student from a CLIP teacher."""
    given = {name: value for name, value in locals().items() if name not in ("config", "set")}
    from edgekd import api
    from edgekd.console import result

    run = api.train(config=config, settings=set or [], **given)
    folder = run.folder
    result(
        f"student: {folder}  ({run.steps} steps in {run.train_seconds:.0f} s, {run.images_per_second:.0f} images/s, "
        f"data_wait {run.data_wait_percent:.0f} %)",
        f"next:    edgekd export {folder} --target onnxruntime --int8",
    )


@app.command()
def export(
    run: RunArgument = None,
    target: Annotated[str, typer.Option(help="See edgekd list targets.")] = "onnxruntime",
    int8: Annotated[bool, typer.Option("--int8", help="8-bit integers, calibrated on training images.")] = False,
    fp16: Annotated[bool, typer.Option("--fp16", help="16-bit floats.")] = False,
    fp32: Annotated[bool, typer.Option("--fp32", help="32-bit floats (the default).")] = False,
    data: DataOption = None,
    calibration_images: Annotated[
        int, typer.Option(help="Training images that INT8 ranges are measured on.", min=1)
    ] = 300,
    compute_capability: Annotated[
        str | None, typer.Option(help="TensorRT: the GPUs to build for, for example 8.6,8.9.", show_default=False)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace artifacts of the same name.")] = False,
) -> None:
    """Write the file a device runs, and check it against the torch student."""
    from edgekd import api
    from edgekd.console import result

    flags: dict[Precision, bool] = {"int8": int8, "fp16": fp16, "fp32": fp32}
    wanted = [name for name, given in flags.items() if given]
    if len(wanted) > 1:
        raise EdgekdError(
            "More than one precision was asked for.",
            "Give one of --int8, --fp16, --fp32, and export again for another.",
        )
    artifacts = api.export(
        run,
        target=target,
        precision=wanted[0] if wanted else "fp32",
        data=data,
        calibration_images=calibration_images,
        overwrite=overwrite,
        options={"compute_capability": compute_capability} if compute_capability else {},
    )
    for artifact in artifacts:
        parity = artifact.parity
        result(
            f"artifact: {artifact.folder}  ({artifact.precision}, top-1 agreement with the torch student "
            f"{100 * parity['top1_agreement']:.1f} % on {parity['n']} images)"
        )
    folder = artifacts[-1].folder
    assert folder is not None
    result(f"next:     edgekd benchmark {folder.parent.parent} --quick")


@app.command()
def benchmark(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Run folders (all their artifacts) or artifact folders. [default: the newest run]", show_default=False
        ),
    ] = None,
    data: DataOption = None,
    ood: Annotated[
        list[str] | None,
        typer.Option(help="Further unseen images as NAME=DIR; each of their domains is a suite; may be repeated."),
    ] = None,
    suites: Annotated[
        list[str] | None, typer.Option(help="Suites made from the in-domain test images: corruptions.")
    ] = None,
    texture_shape: Annotated[
        str | None, typer.Option(help="Folder of cue-conflict images (SHAPE/SHAPE1-TEXTURE2.png): shape bias.")
    ] = None,
    corruption_images: Annotated[
        int | None, typer.Option(help="Images in each of the 75 cells of the corruptions. [default: 200]", min=1)
    ] = None,
    gate: Annotated[
        list[str] | None,
        typer.Option(
            help='What every artifact must fulfil, such as "ood_avg_drop<=1.5"; exit code 1 if not; may be repeated.'
        ),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with a [gates] table.")] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Set two artifacts beside each other: latency ratio, paired accuracy.")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Short latency measurement, marked as such.")] = False,
    threads: Annotated[
        int | None, typer.Option(help="Threads of the runtime. [default: the runtime's own choice]", min=1)
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Report folder. [default: RUN/benchmark]")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier report in --out.")] = False,
) -> None:
    """Measure latency, in-domain and out-of-distribution accuracy of the exported files."""
    from edgekd import api
    from edgekd.benchmark.report import print_gates, print_table
    from edgekd.console import result

    report = api.benchmark(
        *(paths or []),
        data=data,
        ood=ood or (),
        suites=[name.strip() for given in suites or () for name in given.split(",")],
        texture_shape=texture_shape,
        corruption_images=corruption_images,
        gates=gate or (),
        config=config,
        compare=compare,
        quick=quick,
        threads=threads,
        out=out,
        overwrite=overwrite,
    )
    print_table(report)
    folder = report.folder
    result(f"report: {folder}/report.md  (also report.json, report.png, predictions.npz, latency.npz)")
    print_gates(report)


@app.command()
def evaluate(
    run: Annotated[Path | None, typer.Argument(help="Run folder whose student to evaluate beside the teacher.")] = None,
    data: DataOption = None,
    teacher: Annotated[str | None, typer.Option(help="Teacher spec. [default: the run's, or toy]")] = None,
    prompts: Annotated[
        str | None,
        typer.Option(help="photo, imagenet7, imagenet80, domain, or a file of templates. [default: the run's]"),
    ] = None,
    descriptions: Annotated[
        str | None, typer.Option(help="Sentences about each class for its prompts, as for edgekd train.")
    ] = None,
    agreement: Annotated[
        bool, typer.Option("--agreement", help="How alike teacher, student and artifacts are, on the test images.")
    ] = False,
    probe: Annotated[
        bool, typer.Option("--probe", help="Linear probe and nearest neighbours on the student's features.")
    ] = False,
) -> None:
    """Accuracy per domain of a teacher's zero-shot classifier, and of a run's student, on any images."""
    from edgekd import api
    from edgekd.console import out

    rows = api.evaluate(
        run, data=data, teacher=teacher, prompts=prompts, descriptions=descriptions, agreement=agreement, probe=probe
    )
    columns = _AGREEMENT if agreement else {"top1": ("top-1 %", 100), "macro": ("macro %", 100)}
    titles = "".join(f"{title:>{len(title) + 2}}" for title, _ in columns.values())
    out.print(f"{'subject':<18}{'domain':<16}{'images':>8}{titles}", markup=False)
    for row in rows:
        cells = ""
        for name, (title, factor) in columns.items():
            number = "–" if row[name] is None else format(factor * row[name], ".1f" if factor > 1 else ".2f")
            cells += f"{number:>{len(title) + 2}}"
        out.print(f"{row['subject']:<18}{row['domain']:<16}{row['n']:>8,}{cells}", markup=False)


_AGREEMENT = {
    "top1_agreement": ("same class %", 100),
    "m_rel": ("M_rel %", 100),
    "recall": ("recall@5 %", 100),
    "m_neigh": ("M_neigh@10 %", 100),
    "m_vlalign": ("M_vlalign@5", 1),
    "angle": ("angle °", 1),
}
"""Key of a row → its column's title and the factor on its numbers."""


@app.command()
def doctor() -> None:
    """What this machine has: versions, processor, accelerators, folders, hub."""
    from edgekd.doctor import examine

    for line in examine():
        typer.echo(line)


@known.command()
def students(
    pattern: Annotated[str | None, typer.Argument(help='Search timm\'s names, for example "*mobilenet*".')] = None,
) -> None:
    """Friendly names, or timm's names that match a pattern."""
    from edgekd.doctor import student_lines

    _print(student_lines(pattern))


@known.command()
def teachers(
    pattern: Annotated[str | None, typer.Argument(help='Search open_clip\'s names, for example "*B-32*".')] = None,
) -> None:
    """Kinds of teachers, or open_clip's NAME:TAG that match a pattern."""
    from edgekd.doctor import teacher_lines

    _print(teacher_lines(pattern))


@known.command()
def recipes() -> None:
    """Training recipes with their stages and terms."""
    from edgekd.doctor import recipe_lines

    _print(recipe_lines())


@known.command()
def targets() -> None:
    """Export targets with their precisions."""
    from edgekd.doctor import target_lines

    _print(target_lines())


def _print(lines: list[str]) -> None:
    for line in lines:
        typer.echo(line)


def main(arguments: list[str] | None = None) -> Any:
    """Entry point. A user's mistake is one sentence, a hint, and exit code 2; a failed gate is exit code 1."""
    try:
        app(arguments)
    except EdgekdError as error:
        typer.echo(f"error: {error.message}" + (f"\nhint:  {error.hint}" if error.hint else ""), err=True)
        sys.exit(error.exit_code)
    except SystemExit as leaving:
        # typer has turned Ctrl-C into 130, the shell's number for it, without a word.
        if leaving.code == 130:
            typer.echo("stopped; a training run goes on with --resume", err=True)
        raise


if __name__ == "__main__":
    main()
