"""Read a saved Core ML package as plain operations with decompressed constants."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekd.core.errors import EdgekdError, optional
from edgekd.export.onnx.write import quiet

WEIGHTS = Path("Data") / "com.apple.CoreML" / "weights"
"""Folder of the weights in a package."""


@dataclass(frozen=True)
class Ref:
    """A value computed at run time: the program's input, or the result of an operation."""

    name: str


Constant = NDArray[Any] | str | bool | int | float | None
Value = Ref | Constant | tuple["Ref | Constant", ...]


@dataclass(frozen=True)
class Op:
    """One operation of a MIL program."""

    kind: str
    """Name of the operation in MIL, for example `conv`."""
    name: str
    """Name of the layer in the program."""
    inputs: dict[str, Value]
    outputs: tuple[str, ...]
    dtypes: tuple[str, ...]
    """Declared type of each output: `fp16`, `fp32`, `int8`, `int32`, …"""
    shapes: tuple[tuple[int, ...], ...]

    @property
    def reads(self) -> set[str]:
        """Return the names of its computed inputs."""
        values = [
            item
            for value in self.inputs.values()
            for item in (value if isinstance(value, tuple) else (value,))
        ]
        return {item.name for item in values if isinstance(item, Ref)}


@dataclass(frozen=True)
class MilProgram:
    """The `main` function of an `.mlpackage`, in execution order."""

    input_name: str
    input_shape: tuple[int, ...]
    """`[1, 3, H, W]`, pixels from 0 to 255."""
    ops: tuple[Op, ...]
    outputs: tuple[str, ...]

    @property
    def logits(self) -> str:
        """Return the input of the last softmax of a classifier, or the output of a program without classes."""
        name = self.outputs[0]
        if any(op.kind == "classify" for op in self.ops):
            softmax = [op for op in self.ops if op.kind == "softmax" and op.reads]
            if not softmax:
                raise EdgekdError(
                    "The Core ML program has no softmax, so its logits cannot be found.",
                    "Export it again.",
                )
            [name] = softmax[-1].reads
        makers = {output: op for op in self.ops for output in op.outputs}
        while (op := makers.get(name)) is not None and op.kind == "cast" and op.reads:
            [name] = op.reads
        return name


def read_program(package: Path) -> MilProgram:
    """Load the MIL program of an `.mlpackage`, with every weight decompressed as in Core ML.

    It is an `EdgekdError` without coremltools, and for a package that is missing, unreadable or no ML program.
    """
    package = Path(package)
    coremltools = import_coremltools()
    from coremltools.converters.mil.frontend.milproto.load import load

    if not package.is_dir():
        raise EdgekdError(
            f"There is no Core ML package at {package}.", "Check the path; a package is a folder."
        )
    try:
        with quiet():
            spec = coremltools.models.utils.load_spec(str(package))
            if spec.WhichOneof("Type") != "mlProgram":
                raise EdgekdError(
                    f"{package} has no ML program.", "Export it again with --target coreml."
                )
            loaded = load(
                spec,
                specification_version=spec.specificationVersion,
                file_weights_dir=str(package / WEIGHTS),
            )
    except EdgekdError:
        raise
    except Exception as error:  # protobuf, blob reader and type inference have no other common base
        raise EdgekdError(
            f"{package} cannot be read as a Core ML package ({error}).", "Export it again."
        ) from error
    function = loaded.functions["main"]
    (name, source), *others = function.inputs.items()
    if others or len(source.shape) != 4 or source.shape[:2] != (1, 3):
        raise EdgekdError(
            f"{package} does not take one RGB image.", "Export it again with --target coreml."
        )
    ops = [op for op in function.operations if op.op_type != "const" and not _is_stored(op)]
    outputs = tuple(var.name for var in function.outputs)
    return MilProgram(name, tuple(source.shape), tuple(map(_op, ops)), outputs)


def import_coremltools() -> Any:
    """Return coremltools, without its remarks about versions and macOS; it is `NotHere` where it is missing."""
    with quiet():
        return optional("coremltools", "coreml", "The Core ML target")


def _is_stored(op: Any) -> bool:
    """Return whether an operation is a compressed weight, which Core ML expands when it loads the model."""
    return bool(op.op_type.startswith("constexpr_"))


def _op(op: Any) -> Op:
    from coremltools.converters.mil.mil import types

    dtypes, shapes = [], []
    for var in op.outputs:
        dtypes.append(types.builtin_to_string(var.dtype) if hasattr(var, "dtype") else "?")
        shapes.append(tuple(int(n) for n in (getattr(var, "shape", None) or ())))
    inputs: dict[str, Value] = {
        name: tuple(map(_value, var)) if isinstance(var, list | tuple) else _value(var)
        for name, var in op.inputs.items()
        if var is not None
    }
    names = tuple(var.name for var in op.outputs)
    return Op(op.op_type, op.name, inputs, names, tuple(dtypes), tuple(shapes))


def _value(var: Any) -> Ref | Constant:
    if var.op is None or not (var.op.op_type == "const" or _is_stored(var.op)):
        return Ref(var.name)
    if _is_stored(var.op):
        return np.asarray(var.op.materialized_val_inference())
    value = var.val
    if isinstance(value, np.ndarray | str | bool | int | float) or value is None:
        return value
    return value.item() if isinstance(value, np.generic) else None  # class labels: a type of MIL's
