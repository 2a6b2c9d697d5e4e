"""The command line: typed flags that say the same words as `edgekd.api`, one-sentence errors, exit codes 0, 1 and 2.

Heavy imports live inside the commands, so that `edgekd --help` answers at once.
"""

from __future__ import annotations

import shlex
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from edgekd.cli_classes import classes
from edgekd.cli_vl import vl
from edgekd.errors import EdgekdError, Stopped
from edgekd.version import __version__

if TYPE_CHECKING:
    from edgekd.export.calibrators import Calibrator
    from edgekd.manifest import Input, Precision

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
    help="What edgekd knows: students, teachers, recipes, targets.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(known, name="list")
app.add_typer(classes, name="classes")
app.add_typer(vl, name="vl")

RunArgument = Annotated[
    Path | None,
    typer.Argument(help="Run folder. [default: the newest under runs/]", show_default=False),
]
DataOption = Annotated[
    str | None,
    typer.Option(help="Images: toy, a folder, or a .csv/.parquet manifest.", show_default=False),
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
        str | None,
        typer.Option(help="Friendly or timm name: mobilenetv3, vit_tiny, … [default: mobilenetv3]"),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Images: toy, a folder (class/img, domain/class/img, train|val|test/class/img), or a .csv/.parquet "
            "manifest. [default: toy]"
        ),
    ] = None,
    unlabelled: Annotated[
        list[str] | None,
        typer.Option(
            help="Images without labels that train too: a folder however deep, a .csv/.parquet manifest, or toy:STYLE; "
            "may be repeated."
        ),
    ] = None,
    unlabelled_share: Annotated[
        float | None,
        typer.Option(help="Part of each batch that is unlabelled. [default: 0.5]"),
    ] = None,
    augment: Annotated[
        str | None,
        typer.Option(
            help="Student's views: plain, or restyle for half of them in other styles. [default: plain]"
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            help="toy, NAME:TAG (open_clip), hf-hub:ORG/MODEL, local-dir:FOLDER, embeddings:FILE.npz. [default: toy]"
        ),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="See edgekd list recipes. [default: vl2v-adip]")
    ] = None,
    test_domain: Annotated[
        str | None,
        typer.Option(
            help="Domain to leave out as unseen; auto is the last by name, none leaves none out. [default: auto]"
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Optimizer steps of all stages together.")
    ] = None,
    epochs: Annotated[
        float | None,
        typer.Option(
            help="Passes over the training images, instead of steps. [default: 20; toy: a fixed number of steps]"
        ),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Images per step over all processes. [default: 64]")
    ] = None,
    size: Annotated[
        int | None, typer.Option(help="Input side in pixels. [default: the student's own; toy: 48]")
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(
            help="Peak learning rate. [default: 3e-4; on toy data 1e-3; from scratch 2e-3]"
        ),
    ] = None,
    views: Annotated[
        int | None, typer.Option(help="Cached augmented views per image. [default: 4]")
    ] = None,
    online_teacher: Annotated[
        bool | None,
        typer.Option("--online-teacher", help="Ask the teacher at every step instead of caching."),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            help="photo, imagenet7, imagenet80, domain, or a file of templates. [default: the recipe's]"
        ),
    ] = None,
    descriptions: Annotated[
        str | None,
        typer.Option(
            help="Sentences about each class for its prompts: a .json or text file, or command:PROGRAM."
        ),
    ] = None,
    captions: Annotated[
        Path | None, typer.Option(help="A caption per training image: .json or .csv.")
    ] = None,
    vocabulary: Annotated[
        Path | None,
        typer.Option(help="Names to distil for, one per line, with a recipe that uses no labels."),
    ] = None,
    pretrained: Annotated[
        str | None,
        typer.Option(help="hub, scratch or toy (shipped). [default: hub; on toy data toy]"),
    ] = None,
    student_weights: Annotated[
        Path | None, typer.Option(help="Start from this safetensors or torch file.")
    ] = None,
    bn: Annotated[
        str | None,
        typer.Option(
            help="BatchNorm statistics: frozen or train. [default: frozen; from scratch: train]"
        ),
    ] = None,
    ema: Annotated[
        float | None,
        typer.Option(help="Decay of the averaged weights, 0 for none. [default: 0.99]"),
    ] = None,
    average: Annotated[
        str | None, typer.Option(help="Weights to keep: ema, swad, wise-ft or none. [default: ema]")
    ] = None,
    select: Annotated[
        str | None, typer.Option(help="last, or best on source validation. [default: last]")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of weights, order and dropout. [default: 0]")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="32-true, bf16-mixed or 16-mixed. [default: 32-true]")
    ] = None,
    compile: Annotated[
        bool | None, typer.Option("--compile", help="Compile the student with torch.compile.")
    ] = None,
    accelerator: Annotated[
        str | None, typer.Option(help="auto, cpu or cuda. [default: auto]")
    ] = None,
    devices: Annotated[
        int | None, typer.Option(help="Processes on this machine. [default: 1]")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Run folder. [default: runs/STUDENT-RECIPE-DATA]")
    ] = None,
    resume: Annotated[
        bool | None,
        typer.Option(
            "--resume",
            help="Go on where a killed run stopped: the one in --out, else the newest unfinished.",
        ),
    ] = None,
    overwrite: Annotated[
        bool | None, typer.Option("--overwrite", help="Replace an earlier run in --out.")
    ] = None,
    smoke: Annotated[
        bool | None, typer.Option("--smoke", help="A few steps: does it run at all?")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="TOML file with any of these settings.")
    ] = None,
    set: Annotated[
        list[str] | None,
        typer.Option(help="Any setting as name=value or a.b=value; may be repeated."),
    ] = None,
) -> None:
    """Distil a compact student from a CLIP teacher."""
    given = {name: value for name, value in locals().items() if name not in ("config", "set")}
    from edgekd import api
    from edgekd.console import result, shell_word

    run = api.train(config=config, settings=set or [], **given)
    folder = run.folder
    result(
        f"student: {folder}  ({run.steps} steps in {run.train_seconds:.0f} s, {run.images_per_second:.0f} images/s, "
        f"data_wait {run.data_wait_percent:.0f} %)",
        f"next:    edgekd export {shell_word(str(folder))} --target onnxruntime --int8",
    )


@app.command()
def export(
    run: RunArgument = None,
    target: Annotated[str, typer.Option(help="See edgekd list targets.")] = "onnxruntime",
    int8: Annotated[
        bool, typer.Option("--int8", help="8-bit integers, calibrated on training images.")
    ] = False,
    fp16: Annotated[bool, typer.Option("--fp16", help="16-bit floats.")] = False,
    fp32: Annotated[bool, typer.Option("--fp32", help="32-bit floats (the default).")] = False,
    w8a8: Annotated[
        bool,
        typer.Option(
            "--w8a8", help="Core ML: 8-bit activations too, where --int8 means 8-bit weights."
        ),
    ] = False,
    palettize: Annotated[
        str | None,
        typer.Option(
            help="Core ML: weights as indices of 4 or 6 bits into a palette.", metavar="4|6"
        ),
    ] = None,
    deployment_target: Annotated[
        str | None,
        typer.Option(help="Core ML: oldest system to run on. [default: iOS17]", show_default=False),
    ] = None,
    data: DataOption = None,
    calibration_images: Annotated[
        int, typer.Option(help="Training images that INT8 ranges are measured on.", min=1)
    ] = 300,
    calibrator: Annotated[
        str | None,
        typer.Option(
            help="INT8: how ranges are chosen: minmax, percentile, entropy or mse. [default: minmax; TensorRT: mse]",
            show_default=False,
        ),
    ] = None,
    max_drop_id: Annotated[
        float | None,
        typer.Option(
            help="INT8: points of top-1 it may lose on ID validation; the worst layers stay in float.",
            min=0,
        ),
    ] = None,
    max_drop_ood: Annotated[
        float | None, typer.Option(help="INT8: the same on corrupted ID validation images.", min=0)
    ] = None,
    search_seconds: Annotated[
        float,
        typer.Option(help="INT8 with --max-drop-…: time for finding the layers to keep.", min=0),
    ] = 300,
    min_agreement: Annotated[
        float | None,
        typer.Option(
            help="Percent of images on which the file must predict the torch student's class. [default: INT8 97]",
            min=0,
            max=100,
            show_default=False,
        ),
    ] = None,
    compute_capability: Annotated[
        str | None,
        typer.Option(
            help="TensorRT: the GPUs to build for, for example 8.6,8.9.", show_default=False
        ),
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option(
            help="Device profile, by name or .toml file: its compute capability, its deployment target."
        ),
    ] = None,
    head: Annotated[
        str,
        typer.Option(
            help="What the file ends in: classes, or embedding: the image's vector, with class vectors beside the file "
            "that can be added to (edgekd classes add)."
        ),
    ] = "classes",
    input: Annotated[
        str | None,
        typer.Option(
            help="What the file takes: uint8, RGB pixels, or float: planes that are normalised already, as other "
            "programs feed them. [default: the profile's, or uint8]",
            metavar="uint8|float",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace artifacts of the same name.")
    ] = False,
) -> None:
    """Write the file a device runs, and check it against the torch student."""
    from edgekd import api
    from edgekd.console import result, shell_word

    if palettize not in (None, "4", "6"):
        raise EdgekdError(
            f"There are no palettes of {palettize} bits.", "Give --palettize 4 or --palettize 6."
        )
    flags: dict[Precision, bool] = {
        "int8": int8,
        "fp16": fp16,
        "fp32": fp32,
        "w8a8": w8a8,
        "pal4": palettize == "4",
        "pal6": palettize == "6",
    }
    wanted = [name for name, given in flags.items() if given]
    if len(wanted) > 1:
        raise EdgekdError(
            "More than one precision was asked for.",
            "Give one of --int8, --fp16, --fp32, --w8a8, --palettize, and export again for another.",
        )
    switches = {"compute_capability": compute_capability, "deployment_target": deployment_target}
    if profile is not None:
        switches = _profile_switches(profile, target) | {
            name: value for name, value in switches.items() if value
        }
        input = input or _profile_input(profile)
    artifacts = api.export(
        run,
        target=target,
        precision=wanted[0] if wanted else "fp32",
        data=data,
        calibration_images=calibration_images,
        calibrator=cast("Calibrator | None", calibrator),
        max_drop_id=max_drop_id,
        max_drop_ood=max_drop_ood,
        search_seconds=search_seconds,
        min_agreement=min_agreement,
        head=head,
        input=cast("Input", input or "uint8"),
        overwrite=overwrite,
        options={name: value for name, value in switches.items() if value},
    )
    for artifact in artifacts:
        parity = artifact.parity
        result(
            f"artifact: {artifact.folder}  ({artifact.precision}, top-1 agreement with the torch student "
            f"{100 * parity['top1_agreement']:.1f} % "
            f"on {parity['n']} images)"
        )
    speed = api.int8_speed(artifacts[-1])
    if speed is not None:
        result(f"speed:    one image, one thread, on this machine: INT8 {speed}")
    folder = artifacts[-1].folder
    assert folder is not None
    result(f"next:     edgekd benchmark {shell_word(folder.parent.parent)} --quick")


def _profile_switches(spec: str, target: str) -> dict[str, str | None]:
    """What the profile says about the target's own switches, said aloud."""
    from edgekd.console import say
    from edgekd.targets.profiles import load_profile
    from edgekd.targets.registry import get_target

    profile = load_profile(spec)
    found = {name: getattr(profile, name) for name in get_target(target).options}
    sources = {
        str(field): profile.sources[source].named for field, source in profile.because.items()
    }
    for name, value in found.items():
        if value is not None:
            say(f"{profile.name}: {name.replace('_', ' ')} {value} ({sources[name]})")
    if not any(found.values()):
        say(
            f"{profile.name}: says nothing about --target {target}; the device runs {profile.runtime}"
        )
    return found


def _profile_input(spec: str) -> str | None:
    """What the profile says about the file's input, said aloud."""
    from edgekd.console import say
    from edgekd.targets.profiles import load_profile

    profile = load_profile(spec)
    if profile.input is not None:
        say(
            f"{profile.name}: input {profile.input} ({profile.sources[profile.because['input']].named})"
        )
    return profile.input


@app.command()
def verify(
    artifact: Annotated[
        Path, typer.Argument(help="Artifact folder, in its run or copied anywhere.")
    ],
    data: DataOption = None,
) -> None:
    """Repeat the parity check of an artifact, link by link; exit code 1 when it fails."""
    from edgekd import api
    from edgekd.console import result
    from edgekd.errors import GateFailed

    links = api.verify(artifact, data=data)
    for link in links:
        word = "holds" if link["passed"] else "BROKEN"
        result(
            f"{word}: {link['link']}  (same class {100 * link['top1_agreement']:.1f} %, largest logit error "
            f"{link['max_error_relative']:.2g} of the range, {link['n']} images)"
        )
    broken = next((link for link in links if not link["passed"]), None)
    if broken is not None:
        raise GateFailed(
            f"{artifact} is not what the student computes; the link {broken['link']} broke: {broken['reason']}.",
            "Export again with --overwrite; for INT8 look at its accuracy: edgekd benchmark.",
        )


@app.command()
def benchmark(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Run folders (all their artifacts) or artifact folders. [default: the newest run]",
            show_default=False,
        ),
    ] = None,
    data: DataOption = None,
    ood: Annotated[
        list[str] | None,
        typer.Option(
            help="Further unseen images as NAME=DIR, each of their domains a suite, or wilds:NAME=DIR; may be repeated."
        ),
    ] = None,
    unknown: Annotated[
        list[str] | None,
        typer.Option(
            help="Images that show none of the model's classes, as NAME=DIR: how well its confidence tells them from "
            "in-domain ones; may be repeated."
        ),
    ] = None,
    test: Annotated[
        list[str] | None,
        typer.Option(
            help="Further in-domain test images as NAME=DIR, a suite test:NAME; may be repeated."
        ),
    ] = None,
    suites: Annotated[
        list[str] | None,
        typer.Option(help="Suites made from the in-domain test images: corruptions."),
    ] = None,
    texture_shape: Annotated[
        str | None,
        typer.Option(help="Folder of cue-conflict images (SHAPE/SHAPE1-TEXTURE2.png): shape bias."),
    ] = None,
    vocabulary: Annotated[
        list[str] | None,
        typer.Option(
            help="Ask the same images in other words, NAME=FILE: lines with {} are templates, others class names to "
            "add; may be repeated."
        ),
    ] = None,
    corruption_images: Annotated[
        int | None,
        typer.Option(
            help="Images in each of the 75 cells of the corruptions. [default: 200]", min=1
        ),
    ] = None,
    gate: Annotated[
        list[str] | None,
        typer.Option(
            help='What every artifact must fulfil, such as "ood_avg_drop<=1.5"; exit code 1 if not; may be repeated.'
        ),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with a [gates] table.")] = None,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare", help="Set two artifacts beside each other: latency ratio, paired accuracy."
        ),
    ] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Short latency measurement, marked as such.")
    ] = False,
    threads: Annotated[
        int | None,
        typer.Option(help="Threads of the runtime. [default: the runtime's own choice]", min=1),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Report folder. [default: RUN/benchmark; beside earlier reports benchmark-2, …]"
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Replace an earlier report in --out, or in RUN/benchmark."
        ),
    ] = False,
    examples: Annotated[
        bool,
        typer.Option(
            "--examples/--no-examples", help="Show copies of misclassified images in report.html."
        ),
    ] = True,
    device: Annotated[
        list[str] | None,
        typer.Option(
            help="Run the artifacts there: local, ssh://[USER@]HOST[:PORT], adb:SERIAL, or bundle:DIR, which writes a "
            "folder to carry to a machine nobody can reach; may be repeated. [default: in processes of this command]"
        ),
    ] = None,
    keep: Annotated[
        bool,
        typer.Option(
            "--keep", help="Leave agent, artifacts and images on the device for the next time."
        ),
    ] = False,
    energy: Annotated[
        str | None,
        typer.Option(
            help="Energy per image by this sensor where the artifacts run: rapl, nvml, ina or battery."
        ),
    ] = None,
    batch_sizes: Annotated[
        str | None,
        typer.Option(
            help="Images per second at these batch sizes too, such as 1,8,32. [default: none]"
        ),
    ] = None,
    thread_counts: Annotated[
        str | None,
        typer.Option(
            help="Images per second at these thread counts too, such as 1,2. [default: none]"
        ),
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option(
            help="Device profile, by name or .toml file: its threads, its cautions. See edgekd list targets."
        ),
    ] = None,
    import_: Annotated[
        Path | None,
        typer.Option(
            "--import", metavar="RESULT", help="Take in what a device wrote for a bundle."
        ),
    ] = None,
) -> None:
    """Measure latency, in-domain and out-of-distribution accuracy of the exported files."""
    from edgekd import api
    from edgekd.benchmark.report import print_gates, print_table
    from edgekd.console import result

    if profile is not None:
        threads = _follow_profile(profile, threads)
    where = device or []
    if bundles := [spec.removeprefix("bundle:") for spec in where if spec.startswith("bundle:")]:
        if len(where) > 1 or import_:
            raise EdgekdError(
                "A bundle is made alone.", "Measure on other devices with another command."
            )
        if compare or suites:
            raise EdgekdError(
                "A bundle holds no corruptions and no comparison.",
                "Leave --suites and --compare out.",
            )
        line = api.make_bundle(
            *(paths or []),
            folder=bundles[0],
            data=data,
            ood=ood or (),
            unknown=unknown or (),
            test=test or (),
            texture_shape=texture_shape,
            quick=quick,
            threads=threads,
            energy=energy,
            batch_sizes=batch_sizes or (),
            thread_counts=thread_counts or (),
        )
        result(f"bundle:  {bundles[0]}  (copy it to the device)", f"there:   {line}")
        words = [str(path) for path in paths or []]
        named = {
            "--data": [data],
            "--ood": ood,
            "--unknown": unknown,
            "--test": test,
            "--texture-shape": [texture_shape],
        }
        for option, given in named.items():
            words += [
                word for value in given or () if value is not None for word in (option, value)
            ]
        result(f"then:    edgekd benchmark {shlex.join([*words, '--import', 'RESULT'])}")
        return
    report = api.benchmark(
        *(paths or []),
        data=data,
        ood=ood or (),
        unknown=unknown or (),
        test=test or (),
        suites=[name.strip() for given in suites or () for name in given.split(",")],
        texture_shape=texture_shape,
        vocabulary=vocabulary or (),
        corruption_images=corruption_images,
        gates=gate or (),
        config=config,
        compare=compare,
        quick=quick,
        threads=threads,
        out=out,
        overwrite=overwrite,
        examples=examples,
        device=where,
        keep=keep,
        result=import_,
        energy=energy,
        batch_sizes=batch_sizes or (),
        thread_counts=thread_counts or (),
    )
    print_table(report)
    folder = report.folder
    result(
        f"report: {folder}/report.html  (also report.md, report.json, MODEL_CARD.md and the raw data)"
    )
    print_gates(report)


def _follow_profile(spec: str, threads: int | None) -> int | None:
    """Say what the profile warns of; its threads, unless others were given."""
    from edgekd.console import say
    from edgekd.targets.profiles import load_profile

    profile = load_profile(spec)
    for caution in profile.cautions:
        say(f"{profile.name}: {caution.text} ({profile.sources[caution.source].named})")
    return threads if threads is not None else profile.threads


@app.command()
def report(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Report folders, or runs with a report. [default: the newest run]",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the comparison.")] = Path("comparison"),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier comparison in --out.")
    ] = False,
) -> None:
    """Set finished benchmarks beside each other on one page; nothing is measured again."""
    from edgekd import api
    from edgekd.console import result

    page = api.report(*(paths or []), out=out, overwrite=overwrite)
    result(f"comparison: {page}  (also comparison.md)")


@app.command()
def evaluate(
    run: Annotated[
        Path | None, typer.Argument(help="Run folder whose student to evaluate beside the teacher.")
    ] = None,
    data: DataOption = None,
    teacher: Annotated[
        str | None, typer.Option(help="Teacher spec. [default: the run's, or toy]")
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            help="photo, imagenet7, imagenet80, domain, or a file of templates. [default: the run's]"
        ),
    ] = None,
    descriptions: Annotated[
        str | None,
        typer.Option(help="Sentences about each class for its prompts, as for edgekd train."),
    ] = None,
    agreement: Annotated[
        bool,
        typer.Option(
            "--agreement", help="How alike teacher, student and artifacts are, on the test images."
        ),
    ] = False,
    probe: Annotated[
        bool,
        typer.Option(
            "--probe", help="Linear probe and nearest neighbours on the student's features."
        ),
    ] = False,
    shots: Annotated[
        int | None,
        typer.Option(
            help="New classes from so many images of each: those the run left out, or --data's.",
            min=1,
        ),
    ] = None,
    keys: Annotated[
        str,
        typer.Option(
            help="With --shots, whose embeddings of these images are kept: student or teacher."
        ),
    ] = "student",
) -> None:
    """Accuracy of a teacher's zero-shot classifier and a run's student by domain and part: train, val, test, unseen."""
    from edgekd import api
    from edgekd.console import out

    rows = api.evaluate(
        run,
        data=data,
        teacher=teacher,
        prompts=prompts,
        descriptions=descriptions,
        agreement=agreement,
        probe=probe,
        shots=shots,
        keys=keys,
    )
    columns = _AGREEMENT if agreement else {"top1": ("top-1 %", 100), "macro": ("macro %", 100)}
    titles = "".join(f"{title:>{len(title) + 2}}" for title, _ in columns.values())
    widest = max([16, *(len(row["subject"]) for row in rows)]) + 2
    out.print(f"{'subject':<{widest}}{'domain':<16}{'part':<12}{'images':>8}{titles}", markup=False)
    for row in rows:
        cells = ""
        for name, (title, factor) in columns.items():
            number = (
                "–"
                if row[name] is None
                else format(factor * row[name], ".1f" if factor > 1 else ".2f")
            )
            cells += f"{number:>{len(title) + 2}}"
        place = f"{row['domain']:<16}{row['part'] or '–':<12}"
        line = f"{row['subject']:<{widest}}{place}{row['n']:>8,}{cells}"
        out.print(line, markup=False)


@app.command()
def study(
    recipes: Annotated[
        str,
        typer.Option(
            help="Recipes to compare, with commas; NAME=RECIPE renames one. See edgekd list recipes."
        ),
    ] = "erm,kd,vl2v-adip",
    protocol: Annotated[
        str,
        typer.Option(
            help="lodo (unseen domains), class-disjoint (classes), k-shot (a few images of such classes) or low-shot "
            "(labels)."
        ),
    ] = "lodo",
    seeds: Annotated[int, typer.Option(help="How many seeds, from 0.")] = 3,
    test_domains: Annotated[
        str | None,
        typer.Option(
            help="Domains to leave out in turn, with commas. [default: all; low-shot: the last]"
        ),
    ] = None,
    unseen_classes: Annotated[
        str | None,
        typer.Option(
            help="class-disjoint, k-shot: classes with commas, or a part such as 30%. [default: 50%]"
        ),
    ] = None,
    fractions: Annotated[
        str | None,
        typer.Option(help="low-shot: parts of the training labels. [default: 0.01,0.1,1]"),
    ] = None,
    shots: Annotated[
        str | None, typer.Option(help="k-shot: images of each unseen class. [default: 1,4,16]")
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(help="Recipe that the others are compared with. [default: erm, or the first]"),
    ] = None,
    oracle: Annotated[
        bool,
        typer.Option(
            "--oracle",
            help="lodo, low-shot: beside each result the best on the way, chosen by looking at the unseen images.",
        ),
    ] = False,
    jobs: Annotated[
        int, typer.Option(help="Cells side by side, in processes that share cores and GPUs.")
    ] = 1,
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep the run folders of finished cells.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Study folder; one that stopped goes on. [default: studies/PROTOCOL-DATA]"
        ),
    ] = None,
    data: DataOption = None,
    teacher: Annotated[
        str | None, typer.Option(help="Teacher spec, as for edgekd train. [default: toy]")
    ] = None,
    student: Annotated[
        str | None, typer.Option(help="Friendly or timm name. [default: mobilenetv3]")
    ] = None,
    student_weights: Annotated[
        Path | None, typer.Option(help="Start from this safetensors or torch file.")
    ] = None,
    pretrained: Annotated[
        str | None, typer.Option(help="hub, scratch or toy, as for edgekd train.")
    ] = None,
    size: Annotated[int | None, typer.Option(help="Input side in pixels.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per step. [default: 64]")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps of each run.")] = None,
    epochs: Annotated[
        float | None, typer.Option(help="Passes over the training images, instead of steps.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="TOML file with any setting of edgekd train.")
    ] = None,
    set: Annotated[
        list[str] | None,
        typer.Option(help="Setting of every recipe as name=value or a.b=value; may be repeated."),
    ] = None,
    recipe_set: Annotated[
        list[str] | None,
        typer.Option(help="Setting of one recipe as RECIPE:name=value; may be repeated."),
    ] = None,
) -> None:
    """Compare recipes over seeds and unseen domains, with intervals, in one table."""
    given = locals()
    options = {name: given[name] for name in _STUDY_TRAINS}
    from edgekd import api
    from edgekd.console import result
    from edgekd.studies.write import console_lines

    made = api.study(
        recipes,
        protocol=protocol,
        seeds=seeds,
        test_domains=test_domains or (),
        unseen_classes=unseen_classes or (),
        fractions=fractions or (),
        shots=shots or (),
        baseline=baseline,
        oracle=oracle,
        jobs=jobs,
        keep=keep,
        out=out,
        config=config,
        settings=set or (),
        recipe_settings=recipe_set or (),
        **options,
    )
    result(
        *console_lines(made.tables),
        f"study: {made.folder}/table.md  (also table.csv, table.png, cells.jsonl)",
    )
    if made.failures:
        first = made.failures[0]
        raise EdgekdError(
            f"{len(made.failures)} cells failed and are missing above, the first {first.cell.key}: {first.reason}",
            "Mend this and give the same command again: what is finished is kept.",
        )


_STUDY_TRAINS = (
    "data", "teacher", "student", "student_weights", "pretrained", "size", "batch_size", "steps", "epochs",
)  # fmt: skip
"""Flags of `study` that are settings of its runs."""

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


@app.command()
def doctor() -> None:
    """What this machine has: versions, processor, accelerators, folders, hub."""
    from edgekd.doctor import examine

    for line in examine():
        typer.echo(line)


@known.command()
def students(
    pattern: Annotated[
        str | None, typer.Argument(help='Search timm\'s names, for example "*mobilenet*".')
    ] = None,
) -> None:
    """Friendly names, or timm's names that match a pattern."""
    from edgekd.doctor import student_lines

    _print(student_lines(pattern))


@known.command()
def teachers(
    pattern: Annotated[
        str | None, typer.Argument(help='Search open_clip\'s names, for example "*B-32*".')
    ] = None,
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
def missing(
    teacher: Annotated[str, typer.Argument(help="embeddings:FILE.npz")],
    data: DataOption = None,
    unlabelled: Annotated[
        list[str] | None, typer.Option(help="As for edgekd train; may be repeated.")
    ] = None,
) -> None:
    """Images that a file of precomputed embeddings lacks, by the names it must use."""
    from edgekd import api

    _print(api.missing_embeddings(teacher, data=data, unlabelled=unlabelled or ()))


@known.command()
def targets() -> None:
    """Export targets with their precisions, and profiles of devices."""
    from edgekd.doctor import target_lines

    _print(target_lines())


def _print(lines: list[str]) -> None:
    for line in lines:
        typer.echo(line)


def main(arguments: list[str] | None = None) -> Any:
    """Entry point. A user's mistake is one sentence, a hint, and exit code 2; a failed gate is exit code 1."""
    from edgekd.console import clean, open_streams

    open_streams()
    _raise_on_sigterm()
    try:
        app(arguments)
    except EdgekdError as error:
        hint = f"\nhint:  {error.hint}" if error.hint else ""
        typer.echo(clean(f"error: {error.message}{hint}"), err=True)
        sys.exit(error.exit_code)
    except SystemExit as leaving:
        # typer has turned any KeyboardInterrupt into 130, without a word.
        if leaving.code == 130:
            stopped = _stopped(leaving)
            typer.echo(f"stopped: {stopped.message}", err=True)
            if stopped.hint:
                typer.echo(f"hint:    {stopped.hint}", err=True)
            sys.exit(stopped.exit_code)
        raise


def _raise_on_sigterm() -> None:
    """Let SIGTERM unwind like Ctrl-C, so that locks and half-written files go."""

    def stop(number: int, frame: object) -> None:
        raise Stopped(number)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, stop)


def _stopped(leaving: BaseException) -> Stopped:
    """Return what made typer leave: the `Stopped` that a command raised, or a plain Ctrl-C."""
    error: BaseException | None = leaving
    while error is not None:
        if isinstance(error, Stopped):
            return error
        error = error.__cause__ or error.__context__
    return Stopped(signal.SIGINT)


if __name__ == "__main__":
    main()
