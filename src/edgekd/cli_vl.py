"""`edgekd vl`: vision-language students on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

vl = typer.Typer(
    help="Small vision-language students: questions, entailment, multiple choice (CLIP-TD-style distillation).",
    no_args_is_help=True,
    rich_markup_mode=None,
)

RunFolder = Annotated[Path, typer.Argument(help="Run folder of edgekd vl train.")]
SameData = Annotated[
    str | None, typer.Option(help="The same data at another place. [default: the run's]")
]


@vl.command()
def train(
    task: Annotated[
        str, typer.Option(help="vqa, ve (entailment) or choice (multiple choice).")
    ] = "vqa",
    data: Annotated[
        str | None,
        typer.Option(
            help="vqa: easy-vqa; ve, choice: images as for edgekd train, whose class and domain names become synthetic "
            "sentences. [default: easy-vqa, else toy]"
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            help="toy, NAME:TAG (open_clip), hf-hub:ORG/MODEL, local-dir:FOLDER. [default: toy]"
        ),
    ] = None,
    control: Annotated[
        str | None,
        typer.Option(
            help="clip-td, or what it has to beat: none, pooled-only, uniform, unweighted, random-tokens, "
            "shuffled-teacher, question-only. [default: clip-td]"
        ),
    ] = None,
    select: Annotated[
        str | None,
        typer.Option(
            help="Tokens to match: relevance, random, all, none. [default: the control's]"
        ),
    ] = None,
    confidence: Annotated[
        str | None,
        typer.Option(
            help="Weight of an example: label, max, relative, none. [default: the control's]"
        ),
    ] = None,
    pooled: Annotated[
        bool | None,
        typer.Option("--pooled/--no-pooled", help="Match the teacher's pooled vectors too."),
    ] = None,
    weight: Annotated[
        float | None, typer.Option(help="Weight of the distillation. [default: 10]")
    ] = None,
    distance: Annotated[str | None, typer.Option(help="l1 or cosine. [default: l1]")] = None,
    fraction: Annotated[
        float | None,
        typer.Option(help="Share of the training pictures, for example 0.01. [default: 1]"),
    ] = None,
    test_domain: Annotated[
        str | None,
        typer.Option(
            help="Domain to leave out as unseen (easy-vqa: held-out, six colour-shape pairs). [default: none]"
        ),
    ] = None,
    student: Annotated[
        str | None, typer.Option(help="Friendly or timm name. [default: mobilenetv3]")
    ] = None,
    pretrained: Annotated[
        str | None, typer.Option(help="hub, scratch or toy. [default: scratch]")
    ] = None,
    student_weights: Annotated[
        Path | None, typer.Option(help="Start the backbone from this file.")
    ] = None,
    freeze_backbone: Annotated[
        bool | None,
        typer.Option(
            "--freeze-backbone/--train-backbone",
            help="Train the joint layers alone, on what the pretrained backbone sees; it looks once at each picture.",
        ),
    ] = None,
    size: Annotated[int | None, typer.Option(help="Input side in pixels. [default: 96]")] = None,
    layers: Annotated[
        int | None, typer.Option(help="Layers of the joint transformer. [default: 2]")
    ] = None,
    width: Annotated[int | None, typer.Option(help="Its width. [default: 128]")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps. [default: 600]")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples per step. [default: 64]")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate. [default: 1e-3]")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of weights and order. [default: 0]")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Run folder. [default: runs/vl-TASK-CONTROL]")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier run in --out.")
    ] = False,
) -> None:
    """Train a small student that looks and reads."""
    given = dict(locals())
    from edgekd.console import result, shell_word
    from edgekd.vl import train_vl

    run = train_vl(**given)
    result(
        f"student: {run.folder}  ({run.record['data']}, validation accuracy {100 * run.record['val_accuracy']:.1f} %, "
        f"{run.record['train_seconds']:.0f} s)",
        f"next:    edgekd vl evaluate {shell_word(run.folder)}",
    )


@vl.command()
def evaluate(
    run: RunFolder,
    data: SameData = None,
    onnx: Annotated[
        bool, typer.Option("--onnx", help="Ask the exported file and not the torch student.")
    ] = False,
) -> None:
    """Accuracy in domain and on the domain left out, beside the most frequent answer's."""
    from edgekd.console import out
    from edgekd.vl import evaluate_vl

    rows = evaluate_vl(run, data=data, onnx=onnx)
    out.print(
        f"{'suite':<24}{'examples':>10}{'accuracy %':>12}{'constant answer %':>19}", markup=False
    )
    for row in rows:
        numbers = f"{row['n']:>10,}{100 * row['accuracy']:>12.1f}{100 * row['majority']:>19.1f}"
        out.print(f"{row['suite']:<24}{numbers}", markup=False)
    if rows and rows[0]["synthetic"]:
        out.print(
            "synthetic: the sentences were generated from class and domain names.", markup=False
        )


@vl.command()
def export(
    run: RunFolder,
    data: SameData = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier export.")
    ] = False,
) -> None:
    """Write the student as ONNX, picture and token ids in, and check it against torch."""
    from edgekd.console import result, shell_word
    from edgekd.vl import artifact_folder, export_vl

    record = export_vl(run, data=data, overwrite=overwrite)
    parity = record["parity"]
    result(
        f"artifact: {artifact_folder(run)}  (same answer as the torch student on "
        f"{100 * parity['top1_agreement']:.1f} % of {parity['n']} examples)",
        f"next:     edgekd vl evaluate {shell_word(run)} --onnx",
    )
