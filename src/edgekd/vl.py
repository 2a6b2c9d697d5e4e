"""Vision-language students: train, evaluate and export; functions here only wire rooms together."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.console import shell_word
from edgekd.errors import EdgekdError

if TYPE_CHECKING:
    from edgekd.distill.vl.build import VlRun

PARITY_EXAMPLES = 256


def train_vl(*, out: str | Path | None = None, overwrite: bool = False, **options: Any) -> VlRun:
    """Train a vision-language student and write its run folder.

    Args:
        out: run folder; None: `runs/vl-TASK-CONTROL`.
        **options: any field of `edgekd.distill.vl.config.VlConfig`; None means not given.
    """
    from edgekd.distill.vl.config import make_config
    from edgekd.distill.vl.train import train_vl as run_training

    config = make_config(options)
    return run_training(
        config, Path(out or f"runs/vl-{config.task}-{config.control}"), overwrite=overwrite
    )


def evaluate_vl(
    run: str | Path, *, data: str | None = None, onnx: bool = False, most: int = 10**9
) -> list[dict[str, Any]]:
    """Accuracy on the examples that did not train (at most `most`), of the torch student or its exported file."""
    from edgekd.distill.vl.build import load_vl_run
    from edgekd.distill.vl.evaluate import evaluate_vl as evaluate
    from edgekd.export.vl import open_vl

    loaded = load_vl_run(Path(run))
    if not onnx:
        return evaluate(loaded, data, most=most)
    path = artifact_folder(loaded.folder) / "model.onnx"
    if not path.is_file():
        raise EdgekdError(
            f"{run} has not been exported.", f"First: edgekd vl export {shell_word(run)}"
        )
    return evaluate(loaded, data, open_vl(path), most)


def artifact_folder(run: Path) -> Path:
    """Where a run's exported file lies."""
    return run / "artifacts" / "onnxruntime-fp32"


def export_vl(
    run: str | Path, *, data: str | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """Write the run's student, with its text side, as ONNX into `RUN/artifacts/onnxruntime-fp32`, and check it.

    Returns:
        The artifact's record, with `parity`.
    """
    from edgekd.distill.vl.build import load_vl_run
    from edgekd.distill.vl.data import load_vl_data
    from edgekd.distill.vl.evaluate import torch_predict
    from edgekd.distill.vl.examples import make_reader
    from edgekd.distill.vl.split import split_examples
    from edgekd.export.vl import export_vl_model

    loaded = load_vl_run(Path(run))
    config = loaded.config
    if config.blind:
        raise EdgekdError(
            "A student that does not look at the picture is a control, not a product.",
            "Train another.",
        )
    known = load_vl_data(config.task, data or config.data, shifted=config.test_domain != "none")
    split = split_examples(
        known, test_domain=config.test_domain, fraction=config.fraction, seed=config.split_seed
    )
    reader = make_reader(known, loaded.preprocess, loaded.length)
    shown = split.val[:PARITY_EXAMPLES]
    tokens = reader.texts(shown).numpy()
    return export_vl_model(
        loaded.student,
        artifact_folder(loaded.folder),
        size=loaded.preprocess.size,
        text_shape=tokens.shape[1:],
        facts={
            "task": config.task,
            "answers": list(known.answers),
            "synthetic": known.synthetic,
            "preprocess": loaded.preprocess.model_dump(mode="json"),
            "tokenizer": "CLIP BPE: begin 49406, end 49407, padded with 0 behind the end",
            "provenance": {
                "edgekd": loaded.record["edgekd"],
                "data": known.name,
                "val_accuracy": loaded.record["val_accuracy"],
            },
        },
        reference=torch_predict(loaded.student),
        images=reader.pictures(shown).numpy(),
        tokens=tokens,
        overwrite=overwrite,
    )
