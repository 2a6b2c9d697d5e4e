"""`edgekd classes`: the classes of an artifact that ends in an embedding, on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

classes = typer.Typer(
    help="The classes of an artifact that was exported with --head embedding: add one, or take it out again.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

ArtifactFolder = Annotated[
    Path, typer.Argument(help="Artifact folder, in its run or copied anywhere.")
]
ClassName = Annotated[str, typer.Argument(help='Name of the class, for example "fire hydrant".')]


@classes.command()
def add(
    artifact: ArtifactFolder,
    name: ClassName,
    images: Annotated[
        list[Path] | None,
        typer.Option(
            help="By a few images of it, embedded by the artifact: an image or a folder; may be repeated."
        ),
    ] = None,
    text_vector: Annotated[
        Path | None,
        typer.Option(
            help="By the teacher's text vectors of it, in a .npy file: [D] or [prompts, D]."
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            help="Where the teacher lies now, which is asked otherwise. [default: the run's]"
        ),
    ] = None,
    descriptions: Annotated[
        str | None,
        typer.Option(help="Sentences about the class behind its prompts, as for edgekd train."),
    ] = None,
) -> None:
    """Add a class: by its name, asked of the teacher with the run's prompts, by a text vector, or by a few images."""
    from edgekd import api
    from edgekd.console import result
    from edgekd.targets.bank import read_bank
    from edgekd.targets.new_class import told

    changed = api.add_class(
        artifact,
        name,
        images=images or (),
        text_vector=text_vector,
        teacher=teacher,
        descriptions=descriptions,
    )
    assert changed.bank is not None
    result(
        f"classes: {', '.join(changed.classes)}",
        f"{name}: {told(read_bank(artifact / changed.bank))}",
    )


@classes.command()
def remove(artifact: ArtifactFolder, name: ClassName) -> None:
    """Take out a class that was added since the export."""
    from edgekd import api
    from edgekd.console import result

    result(f"classes: {', '.join(api.remove_class(artifact, name).classes)}")
