"""Vision-language students: train, evaluate and export."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.configs.verbs import verb
from edgekd.configs.vl import VlEvaluateConfig, VlExportConfig, VlTrainConfig
from edgekd.core.console import shell_word
from edgekd.core.errors import EdgekdError
from edgekd.targets.registry import DEFAULT_TARGET, artifact_name

if TYPE_CHECKING:
    from edgekd.distill.vl.run import VlRun

PARITY_EXAMPLES = 256


@verb(VlTrainConfig)
def train_vl(config: VlTrainConfig) -> VlRun:
    """Train a vision-language student and write its run folder."""
    from edgekd.distill.vl.train import train_vl

    return train_vl(config)


@verb(VlEvaluateConfig)
def evaluate_vl(config: VlEvaluateConfig) -> list[dict[str, Any]]:
    """Measure accuracy on the examples that did not train, of the torch student or its exported file."""
    from edgekd.distill.vl.run import evaluate_vl, load_vl_run
    from edgekd.export.vl import open_vl

    loaded = load_vl_run(config.run)
    if not config.onnx:
        return evaluate_vl(loaded, config.data, most=config.most)
    path = artifact_folder(loaded.folder) / "model.onnx"
    if not path.is_file():
        raise EdgekdError(
            f"{config.run} has not been exported.",
            f"First: edgekd vl export {shell_word(config.run)}",
        )
    return evaluate_vl(loaded, config.data, open_vl(path), config.most)


def artifact_folder(run: Path) -> Path:
    """Return where a run's exported file is."""
    return run / "artifacts" / artifact_name(DEFAULT_TARGET, "fp32")


@verb(VlExportConfig)
def export_vl(config: VlExportConfig) -> dict[str, Any]:
    """Write the run's student as ONNX into its `artifacts/onnxruntime-fp32`, check it, and return the record."""
    from edgekd.distill.vl.run import load_vl_run, torch_predict
    from edgekd.distill.vl.tasks import load_examples
    from edgekd.export.vl import export_vl_model

    loaded = load_vl_run(config.run)
    trained = loaded.config
    if trained.blind:
        raise EdgekdError(
            "A student that does not look at the picture is a control, not a product.",
            "Train another.",
        )
    known, split = load_examples(trained, config.data)
    reader = loaded.reader(known)
    shown = split.val[:PARITY_EXAMPLES]
    tokens = reader.texts(shown).numpy()
    return export_vl_model(
        loaded.student,
        artifact_folder(loaded.folder),
        facts={
            "task": trained.task,
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
        overwrite=config.overwrite,
    )
