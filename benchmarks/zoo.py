"""Export small timm models to every installed target and precision, and compare the files with torch.

    python benchmarks/zoo.py --out zoo
    python benchmarks/zoo.py --out zoo --models fastvit_t8 --targets onnxruntime openvino --precisions fp32 int8

Weights are random. BatchNorm statistics and offsets differ from 0 and 1, to reveal errors in fusing and folding. The
export checks parity. For INT8 there is no threshold on agreement, since predictions of a random network are not
meaningful; the table shows the logit error instead. Each model runs in a separate process. Finished models are
stored in OUT/zoo.json, so an interrupted run can be resumed, and an environment with other targets can add results.
Targets whose package is missing are skipped. The tables are written to OUT/zoo.md; docs/zoo.md is edited from them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SIZES: dict[str, int] = {
    "convnext_atto": 64,
    "convnextv2_atto": 64,
    "deit_tiny_patch16_224": 224,
    "edgenext_xx_small": 64,
    "efficientformer_l1": 224,
    "efficientformerv2_s0": 224,
    "efficientnet_b0": 64,
    "efficientnet_lite0": 64,
    "efficientvit_b0": 64,
    "efficientvit_m0": 224,
    "fastvit_t8": 64,
    "fbnetv3_b": 64,
    "flexivit_small": 128,
    "ghostnet_100": 64,
    "ghostnetv2_100": 64,
    "ghostnetv3_050": 64,
    "hardcorenas_a": 64,
    "hgnetv2_b0": 64,
    "inception_next_atto": 64,
    "lcnet_050": 64,
    "levit_128s": 224,
    "maxvit_pico_rw_256": 256,
    "mixnet_s": 64,
    "mnasnet_100": 64,
    "mobilenet_edgetpu_v2_xs": 64,
    "mobilenetv1_100": 64,
    "mobilenetv2_100": 64,
    "mobilenetv3_large_100": 64,
    "mobilenetv3_small_100": 64,
    "mobilenetv4_conv_small": 64,
    "mobilenetv4_hybrid_medium": 64,
    "mobileone_s0": 64,
    "mobilevit_xxs": 64,
    "mobilevitv2_050": 64,
    "nest_tiny_jx": 224,
    "pit_ti_224": 224,
    "regnetx_002": 64,
    "regnety_002": 64,
    "repghostnet_050": 64,
    "repvgg_a0": 64,
    "repvit_m0_9": 64,
    "resnet18": 64,
    "resnet26t": 64,
    "resnext26ts": 64,
    "rexnet_100": 64,
    "semnasnet_075": 64,
    "shvit_s1": 64,
    "spnasnet_100": 64,
    "starnet_s1": 64,
    "swin_tiny_patch4_window7_224": 112,
    "tf_efficientnet_lite0": 64,
    "tf_mobilenetv3_large_minimal_100": 64,
    "tinynet_e": 64,
    "tiny_vit_5m_224": 224,
    "vit_tiny_patch16_224": 96,
    "xcit_nano_12_p16_224": 64,
}
"""Input size of each model, small if the model accepts any size."""
PRECISIONS = ("fp32", "fp16", "int8")
IMAGES = 24
STEPS = 2


def network(name: str, size: int) -> Any:
    """Return the deployable graph of a timm model with 10 classes."""
    import timm
    import torch
    from torch import nn

    from edgekd.core.preprocess import Preprocess
    from edgekd.export.graph import Deployable

    torch.manual_seed(0)
    config = timm.get_pretrained_cfg(name)
    options = {"img_size": size} if config is not None and config.fixed_input_size else {}
    backbone = timm.create_model(name, num_classes=0, **options).eval()
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.momentum = None
            module.reset_running_stats()
            module.train()
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.1)
    with torch.no_grad():
        width = backbone(torch.randn(8, 3, size, size)).shape[1]
    head = nn.Linear(width, 10)
    model = Deployable(backbone.eval(), head, Preprocess(size=size))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    batch = torch.from_numpy(pictures(8, size))
    for _ in range(STEPS):
        model.train().eval()  # LeViT and others keep attention biases of evaluation from step to step
        loss = nn.functional.cross_entropy(model(batch), torch.arange(8))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # untrained networks have steep gradients
        optimizer.step()
    return model.train().eval()


def pictures(count: int, size: int) -> NDArray[np.uint8]:
    """Return smooth random images with grain, `[count, size, size, 3]`."""
    from PIL import Image

    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (count, 7, 7, 3), dtype=np.uint8)
    grain = rng.integers(-24, 25, (count, size, size, 3))
    smooth = [np.asarray(Image.fromarray(one).resize((size, size))) for one in coarse]
    return np.clip(np.stack(smooth) + grain, 0, 255).astype(np.uint8)


def export_cell(
    model: Any, folder: Path, target: str, precision: Any, images: NDArray[np.uint8], size: int
) -> dict[str, Any]:
    """Export one cell and return its status: `ok` with figures, `refused` or `traceback` with the reason; empty if the
    target's package is missing."""
    from edgekd.configs.export import ExportConfig
    from edgekd.core.errors import EdgekdError, NotHere
    from edgekd.core.preprocess import Preprocess
    from edgekd.export.artifact import export_model
    from edgekd.export.writer import Source
    from edgekd.targets.session import open_session

    base = folder / "onnxruntime-fp32" / "model.onnx"
    place = folder / f"{target}-{precision}"
    try:
        source = Source(
            model,
            tuple(str(index) for index in range(10)),
            Preprocess(size=size),
            images[IMAGES // 2 :],
            facts={},
            calibration=images[: IMAGES // 2],
        )
        least = 0.0 if precision == "int8" else None
        config = ExportConfig(target=target, precision=precision, min_agreement=least)
        fp32 = base if base.exists() and target != "coreml" else None
        artifact = export_model(source, place, config, fp32_path=fp32)
        found = {
            "status": "ok",
            "mb": round(sum(f.stat().st_size for f in place.rglob("*") if f.is_file()) / 1e6, 2),
            "agreement": artifact.parity["top1_agreement"],
            "error": artifact.parity["max_error_relative"],
            "fused": "fused" in artifact.details,
        }
        if target in ("onnxruntime", "openvino"):
            session = open_session(place, threads=1, spinning=False)
            whole = session.run(images[:5])
            single = np.concatenate([session.run(image[None]) for image in images[:5]])
            span = float(whole.max() - whole.min()) or 1.0
            found["batch_error"] = float(np.abs(whole - single).max()) / span
        return found
    except NotHere:
        return {}
    except EdgekdError as error:
        return {"status": "refused", "why": f"{error.message} {error.hint or ''}".strip()}
    except Exception:
        return {"status": "traceback", "why": traceback.format_exc(limit=-3)}


def run_model(name: str, targets: list[str], precisions: list[str]) -> dict[str, Any]:
    """Return the cells of one model; keys `target-precision`."""
    import torch

    from edgekd.core.errors import EdgekdError

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    size = SIZES[name]
    try:
        model = network(name, size)
    except (RuntimeError, EdgekdError) as error:
        return {"model": {"status": "refused", "why": str(error).splitlines()[0]}}
    images = pictures(IMAGES, size)
    cells = {}
    with tempfile.TemporaryDirectory() as scratch:
        for target, precision in wanted(targets, precisions):
            cell = export_cell(model, Path(scratch), target, precision, images, size)
            if cell:
                cells[f"{target}-{precision}"] = cell
    return cells


def wanted(targets: list[str], precisions: list[str]) -> list[tuple[str, str]]:
    """Return the pairs of target and precision that exist."""
    from edgekd.targets.registry import TARGETS

    return [
        (target, precision)
        for target in targets
        for precision in precisions
        if precision in TARGETS[target].precisions
    ]


def tables(found: dict[str, dict[str, Any]]) -> str:
    """Return one Markdown table per target, with the reasons for refusals below it."""
    from edgekd.targets.registry import TARGETS

    return "\n".join(
        table(target, found)
        for target in TARGETS
        if any(key.startswith(f"{target}-") for cells in found.values() for key in cells)
    )


def table(target: str, found: dict[str, dict[str, Any]]) -> str:
    """Return the table of one target."""
    keys = {precision: f"{target}-{precision}" for precision in PRECISIONS}
    keys = {p: key for p, key in keys.items() if any(key in cells for cells in found.values())}
    lines = [
        f"## {target}\n",
        f"| network | px | fused | {' | '.join(keys)} | batch |",
        "|---" * (len(keys) + 4) + "|",
    ]
    refused: dict[str, list[str]] = {}
    for name, cells in sorted(found.items()):
        mine = {p: cells[key] for p, key in keys.items() if key in cells}
        if not mine:
            continue
        entries = []
        for precision in keys:
            cell = mine.get(precision, {"status": "not run"})
            if cell["status"] == "ok":
                entries.append(f"{cell['mb']:.1f} MB, {cell['error']:.1g}")
            else:
                entries.append(cell["status"])
            if "why" in cell:
                reason = f"{precision}: {cell['why'].strip().splitlines()[-1]}"
                refused.setdefault(reason, []).append(f"`{name}`")
        fused = "yes" if any(cell.get("fused") for cell in mine.values()) else ""
        errors = [cell["batch_error"] for cell in mine.values() if "batch_error" in cell]
        batch = f"{max(errors):.1g}" if errors else ""
        lines.append(f"| `{name}` | {SIZES[name]} | {fused} | {' | '.join(entries)} | {batch} |")
    counts = []
    for key in keys.values():
        states = [cells[key]["status"] for cells in found.values() if key in cells]
        counts.append(f"{states.count('ok')} of {len(states)}")
    lines.append(f"| exported | | | {' | '.join(counts)} | |")
    reasons = [f"- {', '.join(names)}, {reason}" for reason, names in refused.items()]
    return "\n".join([*lines, "", *reasons]) + "\n"


def main() -> None:
    from edgekd.targets.registry import TARGETS

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("zoo"))
    parser.add_argument("--models", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--precisions", nargs="+", default=PRECISIONS, choices=PRECISIONS)
    parser.add_argument("--again", action="store_true", help="repeat finished models too")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run_model(options.one, options.targets, options.precisions)))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    results = options.out / "zoo.json"
    found: dict[str, dict[str, Any]] = json.loads(results.read_text()) if results.exists() else {}
    for name in options.models:
        keys = {"-".join(pair) for pair in wanted(options.targets, options.precisions)}
        if not options.again and keys <= set(found.get(name, {})):
            continue
        line = [sys.executable, __file__, "--one", name, "--targets", *options.targets]
        line += ["--precisions", *options.precisions]
        done = subprocess.run(line, capture_output=True, text=True)
        try:
            cells = json.loads(done.stdout.splitlines()[-1])
        except (IndexError, ValueError):
            why = done.stderr[-2000:].strip() or f"ended with exit status {done.returncode}"
            cells = {key: {"status": "traceback", "why": why} for key in keys}
        found[name] = found.get(name, {}) | cells
        results.write_text(json.dumps(found, indent=1))
        (options.out / "zoo.md").write_text(tables(found), encoding="utf-8")
        print(name, {key: cell["status"] for key, cell in cells.items()}, flush=True)


if __name__ == "__main__":
    main()
