"""The parity check: compare the logits of an exported file and its model on the same real images."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax

from edgekd.core.errors import EdgekdError, NotHere
from edgekd.core.formats import EXACT as EXACT
from edgekd.core.manifest import Artifact
from edgekd.core.predictor import Predictor
from edgekd.core.readers import read_arrays
from edgekd.targets.bank import read_bank
from edgekd.targets.registry import target_of
from edgekd.targets.session import open_session

MAX_RELATIVE_ERROR = {"fp32": 1e-3}
"""Maximum logit error per precision, as a share of the reference's logit range."""
MIN_AGREEMENT = {
    "fp32": 0.999,
    "fp16": 0.995,
    "int8": 0.97,
    "int8-weights": 0.97,
    "pal6": 0.97,
    "pal4": 0.97,
}
"""Minimum share of images with the same predicted class, per precision."""
MAX_EXPECTED_LOSS = 0.015
"""Maximum expected loss of a quantized file with a lower agreement, which means little for an undecided student."""

REFERENCE_FILE = "parity.npz"


def compare(reference: NDArray[np.float32], candidate: NDArray[np.float32]) -> dict[str, Any]:
    """Compare the logits of the same images, float `[M, C]` each.

    Returns:
        `n`; `max_abs_error`, `mean_abs_error` and `logit_range` (largest minus smallest reference logit);
        `max_error_relative` = max_abs_error / logit_range; `cosine`, the mean over images; `top1_agreement` in 0–1;
        `expected_loss`, the difference of the reference's mean probabilities of its own and of the candidate's classes,
        divided by its lead over chance (0 if all classes agree, about 1 for random classes);
        `kl`, the mean over images of KL(softmax(reference) ‖ softmax(candidate)) in nats.

    Raises:
        EdgekdError: there are no images, the shapes differ, or logits are not finite.
    """
    if reference.shape != candidate.shape or reference.ndim != 2 or len(reference) == 0:
        raise EdgekdError(
            f"Logits of shape {list(reference.shape)} and {list(candidate.shape)} cannot be compared.",
            "Run both models on the same images, at least one.",
        )
    if not (np.isfinite(reference).all() and np.isfinite(candidate).all()):
        raise EdgekdError(
            "A model gives logits that are not finite.",
            "Check the training run: its weights have probably diverged.",
        )
    a, b = reference.astype(np.float64), candidate.astype(np.float64)
    error = np.abs(a - b)
    span = float(a.max() - a.min())
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosine = (a * b).sum(axis=1) / np.maximum(lengths, np.finfo(np.float64).tiny)  # [M]
    log_p, log_q = log_softmax(a, axis=1), log_softmax(b, axis=1)
    own = np.exp(log_p.max(axis=1))
    lost = own - np.exp(log_p[np.arange(len(b)), b.argmax(axis=1)])
    lead = max(float(own.mean()) - 1 / a.shape[1], np.finfo(np.float64).tiny)
    return {
        "n": len(a),
        "max_abs_error": float(error.max()),
        "mean_abs_error": float(error.mean()),
        "logit_range": span,
        "max_error_relative": float(error.max() / span)
        if span > 0
        else (0.0 if error.max() == 0 else 1.0),
        "cosine": float(cosine.mean()),
        "top1_agreement": float((a.argmax(axis=1) == b.argmax(axis=1)).mean()),
        "expected_loss": float(lost.mean()) / lead,
        "kl": float((np.exp(log_p) * (log_p - log_q)).sum(axis=1).mean()),
    }


def write_reference(path: Path, keys: Sequence[str], logits: NDArray[np.float32]) -> None:
    """Write the torch student's logits `[M, C]` and the content keys of the M images, for checks outside the run.

    The bytes depend only on the arguments.
    """
    np.savez(path, keys=np.array(keys, dtype=np.str_), logits=logits.astype(np.float32))


def read_reference(path: Path) -> tuple[list[str], NDArray[np.float32]]:
    """Return what `write_reference` wrote: content keys and logits float32 `[M, C]`; damaged: `EdgekdError`."""
    hint = "Copy the artifact again."
    arrays = read_arrays(path, "parity reference", hint)
    keys, logits = arrays.get("keys"), arrays.get("logits")
    if (
        keys is None
        or logits is None
        or keys.ndim != 1
        or keys.dtype.kind != "U"
        or logits.ndim != 2
        or logits.dtype != np.float32
        or len(keys) != len(logits)
    ):
        raise EdgekdError(f"The parity reference at {path} is damaged.", hint)
    return [str(key) for key in keys], logits


def check(
    parity: dict[str, Any], precision: str, min_agreement: float | None = None
) -> dict[str, Any]:
    """Return `parity` with `passed` and, if it is False, `reason`, by the thresholds of `precision`.

    Args:
        min_agreement: replaces the thresholds of the precision, 0–1; it is recorded in the result if given.
    """
    reasons = []
    limit = MAX_RELATIVE_ERROR.get(precision)
    if limit is not None and parity["max_error_relative"] > limit:
        reasons.append(
            f"the largest logit error is {parity['max_error_relative']:.2g} of the range, above {limit:g}"
        )
    least = MIN_AGREEMENT[precision] if min_agreement is None else min_agreement
    if parity["top1_agreement"] < least:
        reason = (
            f"top-1 agreement is {100 * parity['top1_agreement']:.1f} %, below {100 * least:.1f} %"
        )
        loss = parity["expected_loss"]
        if precision in EXACT or min_agreement is not None:
            reasons.append(reason)
        elif loss > MAX_EXPECTED_LOSS:
            above = f"above {100 * MAX_EXPECTED_LOSS:.1f} %"
            reasons.append(f"{reason}, and the expected loss is {100 * loss:.1f} %, {above}")
    given = {} if min_agreement is None else {"min_agreement": min_agreement}
    return {**parity, **given, "passed": not reasons} | (
        {"reason": "; ".join(reasons)} if reasons else {}
    )


def runner(
    folder: Path, artifact: Artifact, *, threads: int | None = None
) -> tuple[Predictor, str]:
    """Return what gives an artifact's logits here, its own runtime or the reference of its target, and its name."""
    target = target_of(artifact.format)
    if target.reference is None or not target.compared_by_reference:
        try:
            session = open_session(folder, threads=threads, spinning=False)
            return session.run, session.provider
        except NotHere:
            if target.reference is None:
                raise
    module = importlib.import_module(target.reference)
    evaluate, name = module.reference(artifact, folder)
    if artifact.bank is None:
        return evaluate, name
    bank = read_bank(folder / artifact.bank)
    return lambda images: bank.logits(evaluate(images)), name
