"""Load users' weights files: plain tensors, checkpoints of timm and Lightning, wrapped or compiled models."""

from __future__ import annotations

import argparse
import collections
import pathlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

from edgekd.core.errors import EdgekdError
from edgekd.core.tensors import read_tensors, read_torch

_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
"""Keys of the weights in checkpoints, in timm's order: averaged weights first."""
_PREFIXES = ("_orig_mod.", "module.", "model.")
"""Prefixes of torch.compile, DistributedDataParallel and Lightning."""
_COUNTER = "num_batches_tracked"
"""BatchNorm's count of steps, which old files do not have."""


def load_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors or torch file by name, without running any code in it.

    A torch file may hold settings beside the tensors, as timm's and Lightning's checkpoints do. No such file, a damaged
    one, pickled code in it, and no tensors by name are an `EdgekdError`.
    """
    hint = "--student-weights takes safetensors or a torch state dict."
    if path.suffix == ".safetensors":
        return read_tensors(path, "weights file", hint)[0]
    loaded = read_torch(path, "weights file", hint, _settings_types())
    for wrapper in _WRAPPERS:
        if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):
            loaded = loaded[wrapper]
            break
    if not isinstance(loaded, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in loaded.items()
    ):
        raise EdgekdError(f"{path} has no state dict.", "It must map parameter names to tensors.")
    return dict(loaded)


def _settings_types() -> list[Any]:
    """Return the types of settings in checkpoints of timm, Lightning and plain loops, which are safe to unpickle."""
    scalar = np.float64(0).__reduce__()[0]
    return [
        argparse.Namespace,
        collections.defaultdict,
        pathlib.PosixPath,
        (scalar, "numpy.core.multiarray.scalar"),
        (scalar, "numpy._core.multiarray.scalar"),
        np.dtype,
        *(type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "b1")),
    ]


def load_backbone(
    backbone: nn.Module,
    state: Mapping[str, Tensor],
    path: Path,
    classifier: Callable[[], nn.Module],
) -> None:
    """Load a checkpoint of a timm model, with or without classifier, into the model without classifier.

    Names may carry the prefix of a wrapper (`module.`, `_orig_mod.`, any attribute of a Lightning module). Where they
    or their shapes are not timm's own, the family's `checkpoint_filter_fn` translates them, which also resamples a
    ViT's position embedding for another input size. `classifier` builds the same architecture with a classifier, whose
    further names may be in the file; `path` is for messages. Parameters that are missing, unknown or of another shape,
    and two sets of weights that fit, are an `EdgekdError`.
    """
    own = backbone.state_dict()
    with torch.device("meta"):
        head = set(classifier().state_dict()) - set(own)
    name = str(
        getattr(backbone, "pretrained_cfg", {}).get("architecture") or type(backbone).__name__
    )
    plain = _unwrapped(state, own, path)
    problems = []
    for found in (plain, _translated(plain, backbone, name)):
        wrong = [key for key in own if key in found and own[key].shape != found[key].shape]
        missing = [key for key in own if key not in found and not key.endswith(_COUNTER)]
        extra = [key for key in found if key not in own and key not in head]
        if not (wrong or missing or extra):
            backbone.load_state_dict({key: found[key] for key in own if key in found}, strict=False)
            return
        problems.append((missing, extra, wrong))
    missing, extra, wrong = min(problems, key=lambda three: sum(map(len, three)))
    raise EdgekdError(
        f"{path} is not a {name}: {len(missing)} parameters missing, {len(extra)} unknown, {len(wrong)} of another "
        f"shape (for example {(wrong or missing or extra)[0]}).",
        "Give the weights of this architecture with timm's parameter names.",
    )


def _unwrapped(
    state: Mapping[str, Tensor], own: Mapping[str, Tensor], path: Path
) -> dict[str, Tensor]:
    """Return the tensors under the prefix of the model's names, without the prefix; drop the others."""
    places = collections.Counter(
        name[: len(name) - len(rest)] for name in state for rest in _endings(name) if rest in own
    )
    needed = sum(not key.endswith(_COUNTER) for key in own)
    whole = [prefix for prefix, count in places.items() if count >= needed]
    if len(whole) > 1 and "" not in whole:
        names = " and ".join(f'"{prefix}"' for prefix in sorted(whole))
        raise EdgekdError(
            f"{path} has {len(whole)} sets of weights that match: {names}.",
            "Save only the one you need: safetensors.torch.save_file(model.state_dict(), ...).",
        )
    if whole and "" not in whole:
        return {
            name.removeprefix(whole[0]): value
            for name, value in state.items()
            if name.startswith(whole[0])
        }
    found = dict(state)
    while prefix := next((one for one in _PREFIXES if all(k.startswith(one) for k in found)), None):
        found = {name.removeprefix(prefix): value for name, value in found.items()}
        if not all(found):
            break
    return found


def _endings(name: str) -> list[str]:
    """`a.b.c` → `a.b.c`, `b.c`, `c`."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def _translated(state: dict[str, Tensor], backbone: nn.Module, name: str) -> dict[str, Tensor]:
    """Return the tensors with timm's names and the model's shapes, translated by the filter of the model's family."""
    module = sys.modules[timm.models.model_entrypoint(name).__module__]
    filters = (getattr(module, one, None) for one in ("checkpoint_filter_fn", "_filter_fn"))
    translate = next((one for one in filters if one), None)
    if translate is None:
        return state
    try:
        return dict(translate(dict(state), backbone))
    except Exception:  # the filter is for other files
        return state
