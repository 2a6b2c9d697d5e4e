"""The network of an INT8 ONNX file, in torch and with gradients, so that it can be trained as the device will run it.

The graph is the file's own: every Q/DQ pair stands where the quantizer put it and rounds by the file's scale and zero
point, and weights, with BatchNorm folded in, are rounded by the scales that the quantizer would give them at this very
step. Rounding passes gradients straight through (Bengio et al. 2013); the range of each activation is learned as one
factor on what calibration measured (LSQ, Esser et al. 2020, of the factor).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgekd.export.replay_ops import OPS, unsupported

Grid = Callable[[onnx.NodeProto, NDArray[np.float32]], tuple[int, NDArray[Any]] | None]
"""Node and its float weight → the axis of its output channels and one scale for each; None where it stays float."""

WEIGHTED_OPS = ("Conv", "Gemm", "MatMul")
MIN_FACTOR = 0.1
"""Of a range: below, a quantizer would have thrown away three of its eight bits' worth of calibration."""
_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)


class Replay(nn.Module):
    """Images → the features that the last layer, the head, reads; rounded wherever the file rounds.

    The head gives the logits, or ahead of its division by its length the embedding.

    Args:
        fp32: the float model, whose weights train.
        int8: the model that the quantizer made of it.
        grid: the quantizer's rule for the scales of weights.

    Raises:
        EdgekdError: an operation that is not known here.
    """

    def __init__(self, fp32: onnx.ModelProto, int8: onnx.ModelProto, grid: Grid) -> None:
        super().__init__()
        self._grid = grid
        floats = {tensor.name: tensor for tensor in fp32.graph.initializer}
        stored = {
            tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in int8.graph.initializer
        }
        maker = {name: node for node in int8.graph.node for name in node.output}
        head = _head(int8)
        self.features: str = head.input[0]
        self._head = head
        self._head_is_rounded = head.input[1] in maker
        self.input: str = int8.graph.input[0].name
        self._nodes = _needed(int8, self.features, maker)
        self._attributes = [
            {item.name: onnx.helper.get_attribute_value(item) for item in n.attribute}
            for n in self._nodes
        ]
        unknown = sorted(
            {n.op_type for n in self._nodes} - {*OPS, "QuantizeLinear", "DequantizeLinear", "Cast"}
        )
        if unknown:
            raise unsupported(f"the operation {', '.join(unknown)}")
        readers = _learned(self._nodes, maker)
        self._weights: dict[str, nn.Parameter] = {}
        """Value in the graph → what it is made of. Names hold dots, so not a ParameterDict."""
        self._rounded: dict[str, onnx.NodeProto] = {}
        self._biases: dict[str, tuple[str, str]] = {}
        """Bias → the weight beside it and the scale of the input: with the product of both scales it is an integer."""
        self._names: dict[str, str] = {}
        fixed: dict[str, Tensor] = {}
        self._factors: dict[str, nn.Parameter] = {}
        self._scales: dict[str, tuple[float, int, int, int]] = {}
        for node in self._nodes:
            if node.op_type == "QuantizeLinear":
                zero, scale = stored[node.input[2]], stored[node.input[1]]
                kind = np.iinfo(zero.dtype)
                self._scales[node.input[1]] = (
                    float(scale),
                    int(zero),
                    int(kind.min),
                    int(kind.max),
                )
                self._factors.setdefault(node.input[1], nn.Parameter(torch.ones(())))
            elif node.op_type == "DequantizeLinear" and node.input[0] in stored:
                name, value = node.input[0].removesuffix("_quantized"), node.output[0]
                if value in readers and name in floats:
                    self._train(value, name, floats[name])
                    if stored[node.input[0]].dtype == np.int8:
                        self._rounded[value] = readers[value]
                    else:
                        reader = readers[value]
                        self._biases[value] = (reader.input[1], maker[reader.input[0]].input[1])
                else:
                    fixed[value] = _dequantized(node, stored)
        for name, array in stored.items():
            if name in readers and name in floats:
                self._train(name, name, floats[name])
            elif array.dtype in (np.float16, np.float32, np.int64, np.int32):
                kept = array.astype(np.float32) if array.dtype == np.float16 else array
                fixed[name] = torch.from_numpy(np.array(kept))
        for number, parameter in enumerate([*self._weights.values(), *self._factors.values()]):
            self.register_parameter(f"p{number}", parameter)
        self._fixed = {name: f"c{number}" for number, name in enumerate(fixed)}
        for name, buffer in self._fixed.items():
            self.register_buffer(buffer, fixed[name], persistent=False)

    @property
    def weights(self) -> list[nn.Parameter]:
        """Weights and biases of the layers before the head, those of LayerNorm among them."""
        return list(self._weights.values())

    @property
    def factors(self) -> list[nn.Parameter]:
        """One per activation that is rounded, on its calibrated range, in `MIN_FACTOR` to 1."""
        return list(self._factors.values())

    def forward(self, images: Tensor) -> Tensor:
        """RGB `[B, H, W, 3]`, uint8 or float in 0–255 → float32 features `[B, d]`."""
        self.clamp_factors()
        fixed: dict[str, Tensor] = {
            name: getattr(self, buffer) for name, buffer in self._fixed.items()
        }
        values = {**fixed, **self._weights, self.input: images.float()}
        steps = {
            value: self._weight_scale(values[value], node) for value, node in self._rounded.items()
        }
        for value, step in steps.items():
            values[value] = _to_grid(values[value], step)
        for value, (weight, scale) in self._biases.items():
            step = steps[weight].reshape(-1) * (
                self._scales[scale][0] * self._factors[scale].detach()
            )
            values[value] = _to_grid(values[value], step, bits=32)
        for node, given in zip(self._nodes, self._attributes, strict=True):
            if node.output[0] in values:
                continue  # a constant, prepared above
            if node.op_type == "QuantizeLinear":
                values[node.output[0]] = self._round(values[node.input[0]], node.input[1])
            elif node.op_type == "DequantizeLinear":
                values[node.output[0]] = values[node.input[0]]  # rounding has left it a float
            elif node.op_type == "Cast":
                x = values[node.input[0]]
                values[node.output[0]] = x.float() if given["to"] in _FLOATS else x.long()
            else:
                made = OPS[node.op_type](
                    [values[name] if name else None for name in node.input], given
                )
                values.update(
                    zip(node.output, made if isinstance(made, tuple) else (made,), strict=False)
                )
        return values[self.features]

    @torch.no_grad()
    def rounded(self, head: nn.Linear) -> nn.Linear:
        """A copy of `head` with its weights rounded as the file's last layer has them."""
        copy = nn.Linear(head.in_features, head.out_features, device=head.weight.device)
        transposed = _transposed(self._head)
        weight = head.weight if transposed else head.weight.T
        if self._head_is_rounded:
            weight = _to_grid(weight, self._weight_scale(weight, self._head))
        copy.weight.copy_(weight if transposed else weight.T)
        copy.bias.copy_(head.bias)
        return copy.requires_grad_(False)

    @staticmethod
    def head_of(fp32: onnx.ModelProto) -> nn.Linear:
        """The float model's last layer, features → logits, or → the embedding before it has length 1."""
        last = _head(fp32)
        stored = {tensor.name: tensor for tensor in fp32.graph.initializer}
        weight, bias = (
            torch.tensor(onnx.numpy_helper.to_array(stored[name])) for name in last.input[1:3]
        )
        weight = weight if _transposed(last) else weight.T
        head = nn.Linear(weight.shape[1], weight.shape[0])
        head.load_state_dict({"weight": weight, "bias": bias})
        return head.requires_grad_(False)

    @torch.no_grad()
    def clamp_factors(self) -> None:
        """Keep every range within what calibration saw.

        A quantizer drops a ReLU or a clip whose bound its range already gives; a wider range would bring back what they
        cut off.
        """
        for factor in self._factors.values():
            factor.clamp_(MIN_FACTOR, 1.0)

    @torch.no_grad()
    def tuned(self, fp32: onnx.ModelProto, head: nn.Linear) -> onnx.ModelProto:
        """A copy of the float model with the weights as they are now, and `head` as its last layer."""
        model = onnx.ModelProto()
        model.CopyFrom(fp32)
        last = _head(model)
        named = {
            self._names[value]: weight.detach().cpu().numpy()
            for value, weight in self._weights.items()
        }
        weight = head.weight.detach().cpu().numpy()
        named[last.input[1]] = weight if _transposed(last) else weight.T
        named[last.input[2]] = head.bias.detach().cpu().numpy()
        for tensor in model.graph.initializer:
            if tensor.name in named:
                array = np.ascontiguousarray(named[tensor.name], dtype=np.float32)
                tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
        return model

    def tuned_ranges(
        self, ranges: Mapping[str, tuple[NDArray[np.float32], NDArray[np.float32]]]
    ) -> dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]:
        """The calibrated extremes of each activation, with the learned factors."""
        self.clamp_factors()
        factors = {
            name.removesuffix("_scale"): np.float32(value.item())
            for name, value in self._factors.items()
        }
        return {
            name: (low * factors.get(name, np.float32(1)), high * factors.get(name, np.float32(1)))
            for name, (low, high) in ranges.items()
        }

    def _train(self, value: str, name: str, tensor: onnx.TensorProto) -> None:
        array = onnx.numpy_helper.to_array(tensor).astype(np.float32)
        self._weights[value] = nn.Parameter(torch.from_numpy(np.array(array)))
        self._names[value] = name

    def _round(self, x: Tensor, scale_name: str) -> Tensor:
        scale, zero, low, high = self._scales[scale_name]
        rounded: Tensor = _Rounded.apply(x, scale * self._factors[scale_name], zero, low, high)
        return rounded

    def _weight_scale(self, weight: Tensor, node: onnx.NodeProto) -> Tensor:
        """One scale per output channel, shaped to divide `weight`."""
        found = self._grid(node, weight.detach().cpu().numpy())
        assert found is not None  # the file has it in INT8
        axis, scales = found
        shape = [1] * weight.ndim
        shape[axis] = -1
        return torch.from_numpy(scales.astype(np.float32)).to(weight.device).reshape(shape)


class _Rounded(torch.autograd.Function):
    """`scale · (clamp(round(x / scale) + zero) − zero)`, with the gradients of LSQ for `x` and `scale`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: int, low: int, high: int) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.bounds = (low - zero, high - zero)
        return (x / scale).round_().clamp_(low - zero, high - zero).mul_(scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x, scale = ctx.saved_tensors
        low, high = ctx.bounds
        steps = x / scale
        rounded = steps.round().clamp_(low, high)
        inside = (steps >= low - 0.5) & (steps <= high + 0.5)
        to_x = gradient * inside
        # d/d scale: what rounding adds, inside; the bound itself, where it cuts off.
        to_scale = (gradient * rounded).sum() - (to_x * steps).sum()
        return to_x, to_scale, None, None, None


def _to_grid(x: Tensor, scale: Tensor, *, bits: int = 8) -> Tensor:
    """`x` as integers of `bits` times `scale`, with the gradient of `x`."""
    reach = 2.0 ** (bits - 1)
    rounded = (x.detach() / scale).round_().clamp_(-reach, reach - 1).mul_(scale)
    return x + (rounded - x.detach())


def _head(model: onnx.ModelProto) -> onnx.NodeProto:
    """The last layer: behind it come at most a cast, a rounding of the logits, or an embedding's way to length 1."""
    maker = {name: node for node in model.graph.node for name in node.output}
    head = maker[model.graph.output[0].name]
    while head.op_type not in WEIGHTED_OPS:
        head = maker[head.input[0]]
    return head


def _transposed(node: onnx.NodeProto) -> bool:
    """Whether a layer's weight is stored as `[outputs, inputs]`."""
    return any(item.name == "transB" and item.i for item in node.attribute)


def _learned(
    nodes: Sequence[onnx.NodeProto], maker: Mapping[str, onnx.NodeProto]
) -> dict[str, onnx.NodeProto]:
    """What may be a weight or a bias → the node that reads it: a layer, a LayerNorm, or the sum behind a product."""
    found = {}
    for node in nodes:
        if node.op_type in (*WEIGHTED_OPS, "LayerNormalization"):
            found.update(dict.fromkeys(node.input[1:], node))
        elif node.op_type == "Add":
            for name, other in (node.input, reversed(node.input)):
                if other in maker and maker[other].op_type == "MatMul":
                    found[name] = node
    return found


def _needed(
    model: onnx.ModelProto, last: str, maker: Mapping[str, onnx.NodeProto]
) -> list[onnx.NodeProto]:
    """The nodes that `last` is computed from, in graph order."""
    wanted, pending = set(), [last]
    while pending:
        node = maker.get(pending.pop())
        if node is not None and node.output[0] not in wanted:
            wanted.add(node.output[0])
            pending.extend(node.input)
    return [node for node in model.graph.node if node.output[0] in wanted]


def _dequantized(node: onnx.NodeProto, stored: Mapping[str, NDArray[Any]]) -> Tensor:
    """What a constant DequantizeLinear gives."""
    values, scale = (
        stored[node.input[0]].astype(np.float32),
        np.asarray(stored[node.input[1]], dtype=np.float32),
    )
    zero = (
        np.asarray(stored[node.input[2]], dtype=np.float32)
        if len(node.input) > 2
        else np.float32(0)
    )
    axis = next((item.i for item in node.attribute if item.name == "axis"), 1)
    shape = [1] * values.ndim
    if scale.ndim:
        shape[axis] = -1
    return torch.from_numpy((values - zero.reshape(shape)) * scale.reshape(shape))
