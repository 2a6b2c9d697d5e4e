"""Measure the accuracy loss of INT8 for students of several recipes, in and out of domain, with and without mixed
precision.

    python benchmarks/int8_survives.py --out int8 --students toy/mobilenetv3
    python benchmarks/int8_survives.py --out int8 --assets DIR

DIR has `pacs/`, `students/*.safetensors` and `teachers/miniclip`. Every student is trained once, and every file is
exported and measured once. Results are stored in OUT, so an interrupted run can be resumed. The table is OUT/table.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import edgekd
from edgekd.core.errors import EdgekdError, GateFailed
from edgekd.core.files import write_json
from edgekd.core.predictor import in_batches
from edgekd.core.readers import read_json
from edgekd.distill.classification.load_run import LoadedRun, load_run
from edgekd.export.quantize.onnxruntime import OnnxRuntimeInt8
from edgekd.export.run import pixels_of
from edgekd.targets.session import open_session

UNSEEN = "sketch"
SCRATCH: dict[str, Any] = {"data": "toy", "pretrained": "scratch", "steps": 600}
PACS: dict[str, Any] = {"size": 96, "batch_size": 32, "steps": 120}
STUDENTS: dict[str, dict[str, Any]] = {
    "toy/mobilenetv3": {"student": "mobilenetv3", "data": "toy"},
    "pacs/efficientnet_lite0": {
        **PACS,
        "student": "efficientnet_lite0",
        "weights": "tf_efficientnet_lite0",
    },
    "pacs/mobilenetv2": {
        **PACS,
        "student": "mobilenetv2",
        "weights": "mobilenetv2_100_pad_same",
        "student_options": {"pad_type": "same"},
    },
    "pacs/mobilenetv3": {**PACS, "student": "mobilenetv3", "pretrained": "scratch", "steps": 3000},
    "pacs/mobilenetv3_toy": {**PACS, "student": "mobilenetv3", "pretrained": "toy", "steps": 600},
    "pacs/mobilenetv3_small": {
        **PACS,
        "student": "mobilenetv3_small",
        "pretrained": "scratch",
        "steps": 600,
    },
    "toy/mobilenetv3_small": {**SCRATCH, "student": "mobilenetv3_small"},
    "toy/efficientnet": {**SCRATCH, "student": "efficientnet"},
    "toy/mobilenetv4": {**SCRATCH, "student": "mobilenetv4"},
    "toy/vit_tiny": {**SCRATCH, "student": "vit_tiny", "steps": 300},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "FP32": {"precision": "fp32"},
    "PTQ": {"precision": "int8"},
    "PTQ mixed": {"precision": "int8", "max_drop_id": 1.0, "max_drop_ood": 1.5},
}
MAX_DROP_ID, MAX_DROP_OOD = 1.0, 1.5
TURNS = 100
HEADER = (
    "| student | file | ID | OOD | agreement | size MB | p50 ms | p50 / p50 of FP32 | remarks |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def trained(name: str, out: Path, assets: Path | None) -> LoadedRun:
    """Return the student's run, trained if it is missing."""
    folder = out / name.replace("/", "-") / "run"
    if not (folder / "run.json").exists():
        settings = dict(STUDENTS[name])
        weights = settings.pop("weights", None)
        if name.startswith("pacs/"):
            if assets is None:
                raise EdgekdError(
                    f"{name} needs --assets.", "Or name others: --students toy/mobilenetv3."
                )
            settings |= {
                "data": str(assets / "pacs"),
                "teacher": f"local-dir:{assets / 'teachers' / 'miniclip'}",
            }
            if weights is not None:
                settings["student_weights"] = assets / "students" / f"{weights}.safetensors"
        resume = (folder / "checkpoint.pt").exists()
        edgekd.train(
            **settings, test_domain=UNSEEN, out=folder, resume=resume, overwrite=not resume
        )
    return load_run(folder)


def exported(loaded: LoadedRun, variant: str) -> Path:
    """Return the variant's artifact next to the run, exported if missing, including one that failed parity."""
    folder = loaded.folder.parent / variant.replace(" ", "-")
    if not folder.exists():
        written = loaded.folder / "artifacts" / f"onnxruntime-{VARIANTS[variant]['precision']}"
        try:
            edgekd.export(loaded.folder, overwrite=True, **VARIANTS[variant])
        except GateFailed as failed:
            print(failed.message)
            written = written.with_name(written.name + ".failed")
        shutil.copytree(written, folder.with_suffix(".part"), dirs_exist_ok=True)
        folder.with_suffix(".part").rename(folder)
    return folder


def measure(name: str, loaded: LoadedRun) -> list[dict[str, Any]]:
    """Return one row per variant: accuracy, agreement with FP32, size, remarks, and interleaved latency."""
    images, split = loaded.data()
    sets = {
        "id": (pixels_of(loaded, images, split.id_test), images.labels[split.id_test]),
        "ood": (pixels_of(loaded, images, split.ood_test), images.labels[split.ood_test]),
    }
    rows: list[dict[str, Any]] = []
    full: dict[str, NDArray[np.int64]] = {}
    files: dict[str, Path] = {}
    for variant in VARIANTS:
        row: dict[str, Any] = {"student": name, "file": variant}
        rows.append(row)
        folder = exported(loaded, variant)
        files[variant] = folder / "model.onnx"
        predicted = {
            key: in_batches(OnnxRuntimeInt8().open(files[variant]), pixels).argmax(axis=1)
            for key, (pixels, _) in sets.items()
        }
        full = full or predicted
        row |= {
            key: 100 * float((predicted[key] == labels).mean()) for key, (_, labels) in sets.items()
        }
        row["agreement"] = 100 * float(
            np.mean(np.concatenate([predicted[key] == full[key] for key in sets]))
        )
        row["size_mb"] = files[variant].stat().st_size / 1e6
        row["refused"], row["remarks"] = remarks(folder)
        row["n"] = [len(labels) for _, labels in sets.values()]
    times = p50_ms(files, sets["id"][0][:8])
    for row in rows:
        row["p50_ms"], row["ratio"] = times[row["file"]], times[row["file"]] / times["FP32"]
    return rows


def p50_ms(files: dict[str, Path], images: NDArray[np.uint8]) -> dict[str, float]:
    """Return the median processor time of one image per file, ms, one thread, interleaved.

    Processor time equals wall time on an idle machine, and is comparable on a busy one too.
    """
    sessions = {
        name: open_session(path.parent, threads=1, spinning=False) for name, path in files.items()
    }
    samples: dict[str, list[float]] = {name: [] for name in files}
    for turn in range(TURNS + 3):
        for name, session in sessions.items():
            started = time.thread_time()
            session.run(images[turn % len(images)][None])
            samples[name].append(1e3 * (time.thread_time() - started))
    return {name: float(np.median(values[3:])) for name, values in samples.items()}


def remarks(folder: Path) -> tuple[bool, str]:
    """Return whether the artifact failed its parity check, and its quantization record."""
    artifact = json.loads((folder / "artifact.json").read_text(encoding="utf-8"))
    quantization, parity = artifact["quantization"] or {}, artifact["parity"]
    found = []
    if not parity["passed"]:
        found.append(f"refused: {parity['reason']}")
    if "mixed" in quantization:
        found.append(f"{len(quantization['mixed']['kept_in_float'])} layers and additions in float")
    return not parity["passed"], "; ".join(found)


def table(rows: list[dict[str, Any]]) -> str:
    """Return Markdown with drops against FP32 in points, and the files of each student within the limits."""
    lines, base = [HEADER], {row["student"]: row for row in rows if row["file"] == "FP32"}
    for row in rows:
        drops = [row[key] - base[row["student"]][key] for key in ("id", "ood")]
        marks = ["" if row["file"] == "FP32" else f" ({drop:+.1f})" for drop in drops]
        lines.append(
            f"| {row['student']} | {row['file']} | {row['id']:.1f}{marks[0]} | {row['ood']:.1f}{marks[1]} | "
            f"{row['agreement']:.1f} | {row['size_mb']:.2f} | {row['p50_ms']:.2f} | {row['ratio']:.2f} | "
            f"{row['remarks']} |"
        )
    lines.append("")
    for name, full in base.items():
        passing = [
            row["file"]
            for row in rows
            if row["student"] == name
            and row["file"] != "FP32"
            and not row["refused"]
            and full["id"] - row["id"] <= MAX_DROP_ID
            and full["ood"] - row["ood"] <= MAX_DROP_OOD
        ]
        lines.append(
            f"{name}: within {MAX_DROP_ID} points ID and {MAX_DROP_OOD} OOD of FP32: {', '.join(passing) or 'none'}."
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("int8-survives"))
    parser.add_argument("--assets", type=Path)
    parser.add_argument("--students", nargs="+", default=list(STUDENTS), choices=list(STUDENTS))
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in arguments.students:
        finished = arguments.out / name.replace("/", "-") / "rows.json"
        if not finished.exists():
            write_json(finished, measure(name, trained(name, arguments.out, arguments.assets)))
        rows += read_json(finished, "measurement")
        text = table(rows)
        (arguments.out / "table.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
