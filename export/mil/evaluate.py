"""A reference evaluator for Core ML programs, for parity checks and range analysis without Core ML.

It computes the saved program, operation by operation, in float32. Results that the program declares as float16 are
rounded to float16, including overflow to infinity. It checks the file, not the kernels of a device, which may
accumulate in another precision or flush subnormal numbers to zero.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgekd.core.errors import EdgekdError
from edgekd.export.mil.ops import OPS
from edgekd.export.mil.program import MilProgram, Op, Ref

Arithmetic = Literal["declared", "float32"]
"""Round every result to its declared type, or keep all of them in float32 to see what the numbers should be."""
Watch = Callable[[tuple[Tensor, ...]], Tensor]
"""Measures the outputs of an operation; its result is collected under the operation's name."""
_BATCH = 8
"""Batch size: large enough to amortise Python's overhead, and small enough for the activations of every student."""


def logits_of(
    program: MilProgram, images: NDArray[np.uint8], arithmetic: Arithmetic = "declared"
) -> NDArray[np.float32]:
    """Return the logits float32 `[B, C]` (the input of the last softmax), or embeddings, of RGB uint8 `[B, H, W,
    3]`."""
    name = program.logits
    return evaluate(program, images, [name], arithmetic)[0][name].reshape(len(images), -1)


def evaluate(
    program: MilProgram,
    images: NDArray[np.uint8],
    wanted: Sequence[str],
    arithmetic: Arithmetic = "declared",
    watch: Watch | None = None,
) -> tuple[dict[str, NDArray[np.float32]], dict[str, NDArray[np.float32]]]:
    """Run `program` on RGB uint8 `[B, H, W, 3]`, as large as its input; an unknown operation is an `EdgekdError`.

    Returns the tensors `wanted`, and what `watch` measured of every operation; each float32, one row per image.
    """
    ops = [op for op in program.ops if op.kind != "classify"]  # names the largest probability
    _refuse_unknown(ops)
    constants = [{name: _constant(value) for name, value in op.inputs.items()} for op in ops]
    last_use = {name: number for number, op in enumerate(ops) for name in op.reads}

    def one(pixels: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:  # [1, 3, H, W]
        values, seen = {program.input_name: pixels}, {}
        for number, (op, inputs) in enumerate(zip(ops, constants, strict=True)):
            given = {name: _computed(value, values) for name, value in inputs.items()}
            try:
                made = OPS[op.kind](**given)
            except NotImplementedError as error:
                raise _unknown(str(error), op) from error
            outputs = made if isinstance(made, tuple) else (made,)
            if watch is not None:
                seen[op.name] = watch(outputs)
            for name, dtype, output in zip(op.outputs, op.dtypes, outputs, strict=True):
                rounds = dtype == "fp16" and arithmetic == "declared"
                values[name] = output.half().float() if rounds else output
            for name in op.reads:
                if last_use[name] == number and name not in wanted:
                    del values[name]
        return {name: values[name] for name in wanted}, seen

    parts, notes = [], []
    # A program is for one image; vmap runs it on several without changing its fixed shapes.
    with torch.inference_mode():
        for start in range(0, len(images), _BATCH):
            batch = torch.from_numpy(np.array(images[start : start + _BATCH]))
            pixels = batch.permute(0, 3, 1, 2).unsqueeze(1).float().contiguous()  # [B, 1, 3, H, W]
            outputs, seen = torch.func.vmap(one)(pixels)
            parts.append(outputs)
            notes.append(seen)
    return _stacked(parts), _stacked(notes)


def _refuse_unknown(ops: Sequence[Op]) -> None:
    for op in ops:
        if op.kind not in OPS:
            raise _unknown(f"the Core ML operation {op.kind}", op)
        if foreign := set(op.inputs) - set(inspect.signature(OPS[op.kind]).parameters):
            raise _unknown(f"{', '.join(sorted(foreign))} of the Core ML operation {op.kind}", op)


def _unknown(what: str, op: Op) -> EdgekdError:
    return EdgekdError(
        f"The reference evaluator does not support {what} (of {op.name}), so this file cannot be checked here.",
        "Choose a student from edgekd list students.",
    )


def _constant(value: Any) -> Any:
    """Return floating-point arrays as float32 tensors, and other values unchanged."""
    if isinstance(value, tuple):
        return tuple(map(_constant, value))
    if isinstance(value, np.ndarray) and value.dtype.kind == "f" and value.ndim:
        return torch.from_numpy(value.astype(np.float32))
    return value.item() if isinstance(value, np.ndarray) and value.ndim == 0 else value


def _computed(value: Any, values: dict[str, Tensor]) -> Any:
    if isinstance(value, tuple):
        return tuple(_computed(item, values) for item in value)
    return values[value.name] if isinstance(value, Ref) else value


def _stacked(parts: list[dict[str, Tensor]]) -> dict[str, NDArray[np.float32]]:
    names = parts[0] if parts else {}
    return {name: torch.cat([part[name] for part in parts]).numpy() for name in names}
