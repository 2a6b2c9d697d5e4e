"""Load checkpoints of about 50 small timm models in the formats of common training programs, and compare features.

    python scripts/sweep_checkpoints.py              # about 5 minutes on one core
    python scripts/sweep_checkpoints.py repvit_m0_9  # these models alone

Each model is built with random weights and a classifier of 7 classes, saved, and loaded with the function behind
`--student-weights`. The reference is the model itself after timm's `reset_classifier(0)`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import timm
import torch
from torch import Tensor

from edgekd.core.errors import EdgekdError
from edgekd.distill.models.students import make_student

MODELS = """
test_vit test_convnext test_nfnet test_byobnet mobilenetv3_small_050 mobilenetv2_050
mobilenetv4_conv_small_050 efficientnet_b0 tf_efficientnet_lite0 mnasnet_050 fbnetc_100 lcnet_050
tinynet_e ghostnet_050 resnet10t resnetv2_18 regnetx_002 regnetz_005 rexnet_100 densenet121 vgg11
repvit_m0_9 repvit_m1 levit_128s levit_conv_128s caformer_s18 convformer_s18 poolformer_s12
poolformerv2_s12 fastvit_t8 mobileone_s0 edgenext_xx_small efficientformer_l1 efficientformerv2_s0
efficientvit_m0 efficientvit_b0 mobilevit_xxs mobilevitv2_050 vit_tiny_patch16_224
deit_tiny_distilled_patch16_224 deit3_small_patch16_224 eva02_tiny_patch14_224
swin_tiny_patch4_window7_224 maxvit_rmlp_pico_rw_256 coatnet_nano_rw_224 xcit_nano_12_p16_224
pit_ti_224 pvt_v2_b0 cait_xxs24_224 crossvit_tiny_240 convit_tiny starnet_s1 hgnetv2_b0
convnext_atto convnextv2_atto tiny_vit_5m_224 shvit_s1 swiftformer_xs
""".split()  # noqa: SIM905


def forms(name: str, state: dict[str, Tensor]) -> dict[str, object]:
    """Return checkpoints in the formats of timm, Lightning, DataParallel and torch.compile."""

    def under(prefix: str) -> dict[str, Tensor]:
        return {prefix + key: value for key, value in state.items()}

    lightning = {"epoch": 1, "hyper_parameters": {"lr": 0.1}, "callbacks": {}}
    return {
        "plain": state,
        "DataParallel": under("module."),
        "torch.compile": under("_orig_mod."),
        "Lightning": lightning
        | {"state_dict": under("model.") | {"loss.weight": torch.ones(3)}},
        "Lightning, compiled": lightning | {"state_dict": under("net._orig_mod.")},
        "timm": {
            "arch": name, "epoch": 2, "version": 2, "args": argparse.Namespace(lr=0.1), "metric": np.float64(70.0),
            "state_dict": state, "optimizer": {"state": {}, "param_groups": []},
        },
    }  # fmt: skip


def failures(name: str, folder: Path) -> list[str]:
    """Return the formats that do not load, or that load with different features."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7).eval()
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and tensor.ndim < 2:  # biases and norms start as constants
            tensor.data.add_(0.02 * torch.rand(tensor.shape))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    model.reset_classifier(0)
    side = model.pretrained_cfg["input_size"][-1]
    views = torch.rand(2, 3, side, side)
    found = []
    with torch.inference_mode():
        expected = model.eval()(views)
        for form, checkpoint in forms(name, state).items():
            path = folder / "weights.pth.tar"
            torch.save(checkpoint, path)
            try:
                student = make_student(name, pretrained="scratch", weights=path, dim=4)
            except EdgekdError as error:
                found.append(f"{form}: {error.message}")
                continue
            if not torch.allclose(student.backbone.eval()(views), expected, atol=1e-4, rtol=1e-4):
                found.append(f"{form}: other features")
    return found


def main() -> None:
    torch.set_num_threads(1)
    failed = 0
    for name in sys.argv[1:] or MODELS:
        with tempfile.TemporaryDirectory() as folder:
            found = failures(name, Path(folder))
        failed += bool(found)
        print(f"{name}: {'; '.join(found) or 'ok'}", flush=True)
    sys.exit(f"{failed} models failed" if failed else 0)


if __name__ == "__main__":
    main()
