"""Quantization-aware training on the exporter's side: from calibrated INT8 to a trained one, in the same dialect.

What trains is a replay of the INT8 file itself; who trains it, and with which lessons, is a `Tuner` from outside. Every
candidate is written as a file and measured as a file, the untrained one first, so the result is never worse than that
on the validation images.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import torch
from numpy.typing import NDArray
from torch import nn

from edgekd.console import say
from edgekd.export.bias import correct_biases
from edgekd.export.calibrators import Calibrator
from edgekd.export.dialect import OnnxDialect
from edgekd.export.evaluate import Evaluate
from edgekd.export.quantize import Calibrated
from edgekd.export.replay import Grid, Replay
from edgekd.targets.bank import ClassBank

PATIENCE = 5
"""Evaluations in a row without a better file that end the training."""


@dataclass(frozen=True)
class Tuner:
    """Who trains, and what decides."""

    pixels: NDArray[np.uint8]
    """`[N, H, W, 3]`, validation images of the training domains, prepared."""
    labels: NDArray[np.int64]
    """`[N]`, their classes."""
    domains: NDArray[np.int64]
    """`[N]`, which domain each belongs to."""
    train: Callable[[Replay, Callable[[int], bool]], None]
    """Trains the network in place and asks the second argument now and then, with the number of steps done; it says
    whether to go on."""
    head: Callable[[], nn.Linear]
    """The student's last layer as it is now: features → logits, or with `bank` → embeddings of any length."""
    facts: dict[str, Any]
    """For `artifact.json`: recipe, terms, steps."""
    bank: ClassBank | None = None
    """What makes logits of the embeddings that the file ends in; None: it ends in logits."""

    def logits(self, answers: NDArray[np.float32]) -> NDArray[np.float32]:
        """What a file says about `pixels` → logits `[N, C]`."""
        return answers if self.bank is None else self.bank.logits(answers)

    def score(self, logits: NDArray[np.float32]) -> tuple[float, float]:
        """Top-1 in 0–1, averaged over domains without weights, then, among equals, minus the cross-entropy."""
        right = logits.argmax(axis=1) == self.labels
        accuracy = float(
            np.mean([right[self.domains == domain].mean() for domain in np.unique(self.domains)])
        )
        each = torch.nn.functional.cross_entropy(
            torch.from_numpy(logits), torch.from_numpy(self.labels)
        )
        return accuracy, -float(each)


def quantize_tuned(
    fp32: Path,
    out: Path,
    calibration: NDArray[np.uint8],
    *,
    dialect: OnnxDialect,
    tuner: Tuner,
    calibrator: Calibrator = "minmax",
) -> tuple[dict[str, Any], Evaluate]:
    """Write the INT8 file `out` of the FP32 file `fp32`, trained with its rounding in place.

    Args:
        calibration: RGB uint8 `[N, H, W, 3]`, prepared with the model's own preprocess.
        calibrator: how much of the activations' ranges is covered before training (`calibrators.py`).

    Returns:
        For `artifact.json` what was done, with `qat`: facts of the training, validation top-1 of FP32, of INT8 before
        and after, the step that was chosen (0: training found nothing better). And what the trained network says in
        torch, for the parity check.

    Raises:
        EdgekdError: useless calibration images, or an operation that cannot be trained.
    """
    calibrated = dialect.calibrate(fp32, calibration, calibrator)
    described = dialect.write(calibrated, out)
    calibrated = with_corrected_biases(calibrated, dialect.grid)
    network = Replay(calibrated.model, onnx.load(out), dialect.grid)
    full = tuner.score(tuner.logits(dialect.answers(fp32, tuner.pixels)))
    best = before = tuner.score(tuner.logits(dialect.answers(out, tuner.pixels)))
    say(
        f"qat: validation top-1 {100 * full[0]:.1f} % in FP32, {100 * before[0]:.1f} % in INT8 before training"
    )
    state, head = copy.deepcopy(network.state_dict()), Replay.head_of(calibrated.model)
    chosen = worse = 0
    trial = out.with_name("trial.onnx")

    def go_on(step: int) -> bool:
        nonlocal best, described, state, head, chosen, worse
        now = tuner.head()
        tuned = dataclasses.replace(
            calibrated,
            model=network.tuned(calibrated.model, now),
            ranges=network.tuned_ranges(calibrated.ranges),
        )
        written = dialect.write(tuned, trial)
        score = tuner.score(tuner.logits(dialect.answers(trial, tuner.pixels)))
        better = score > best
        say(
            f"qat: step {step}: validation top-1 {100 * score[0]:.1f} %{', the best so far' if better else ''}"
        )
        if better:
            best, described, chosen, worse = score, written, step, 0
            state, head = copy.deepcopy(network.state_dict()), copy.deepcopy(now)
            trial.replace(out)
        else:
            worse += 1
        return worse < PATIENCE

    tuner.train(network, go_on)
    trial.unlink(missing_ok=True)
    network.load_state_dict(state)
    facts = {
        **tuner.facts,
        "chosen_step": chosen,
        "validation_images": len(tuner.pixels),
        "validation_fp32": round(full[0], 5),
        "validation_before": round(before[0], 5),
        "validation_after": round(best[0], 5),
    }
    method = described["method"] + (", trained with this rounding (qat)" if chosen else "")
    return {**described, "method": method, "qat": facts}, _torch_answers(
        network.cpu(), network.rounded(head.cpu()), embeds=tuner.bank is not None
    )


def with_corrected_biases(calibrated: Calibrated, grid: Grid) -> Calibrated:
    """Where training starts: with the biases of the untrained file, and nothing left to correct in those it learns."""
    model = onnx.ModelProto()
    model.CopyFrom(calibrated.model)
    constants = {
        tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer
    }
    layers = set(calibrated.layers)
    weighted = [
        n for n in model.graph.node if n.name in layers and n.input[1] in constants
    ]  # not products of tokens
    found = {n.input[1]: grid(n, constants[n.input[1]]) for n in weighted}
    correct_biases(
        model,
        calibrated.means,
        {name: scales for name, scales in found.items() if scales is not None},
    )
    return dataclasses.replace(calibrated, model=model, means={})


def _torch_answers(network: Replay, head: nn.Linear, *, embeds: bool) -> Evaluate:
    @torch.inference_mode()
    def answers(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        found = head(network(torch.from_numpy(np.array(images))))  # [B, C] or [B, D]
        said: NDArray[np.float32] = (
            nn.functional.normalize(found, dim=1) if embeds else found
        ).numpy()
        return said

    return answers
