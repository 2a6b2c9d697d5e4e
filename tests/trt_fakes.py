"""Stand-ins for `tensorrt` and `cuda.bindings`, and a bundle for them: whatever edgekd does up to the driver's calls.

They are planted on the path of another process. The "GPU" is this process's own memory, and the "engine" takes the
mean of each colour channel, as the ONNX file of `device_fakes` does. Nothing here says how TensorRT behaves.
"""

from __future__ import annotations

import json
from pathlib import Path

from artifact_fakes import write_artifact

TENSORRT = """
import ctypes, json, os
import numpy as np

__version__ = os.environ.get("FAKE_TENSORRT", "10.3.0")

class ILogger:
    INTERNAL_ERROR, ERROR, WARNING = range(3)
    def __init__(self): pass

class Logger(ILogger):
    def __init__(self, severity): pass

class NetworkDefinitionCreationFlag:
    STRONGLY_TYPED = 0

class _Tensor:
    def __init__(self, name, shape): self.name, self.shape = name, shape

class _Network:
    def get_input(self, index): return _Tensor("image", (-1, 16, 16, 3))

class _Profile:
    def set_shape(self, name, smallest, best, largest): self.largest = largest

class _Config:
    def add_optimization_profile(self, profile): self.profile = profile

class Builder:
    def __init__(self, logger): self.logger = logger
    def create_network(self, flags):
        assert flags == 1
        return _Network()
    def create_builder_config(self): return _Config()
    def create_optimization_profile(self): return _Profile()
    def build_serialized_network(self, network, config):
        with open(os.environ["FAKE_BUILDS"], "a") as log: log.write(__version__ + "\\n")
        if os.environ.get("FAKE_REFUSAL"):
            self.logger.log(ILogger.ERROR, "Error Code 10: " + os.environ["FAKE_REFUSAL"])
            return None
        return json.dumps({"version": __version__, "largest": config.profile.largest}).encode()

class OnnxParser:
    num_errors = 0
    def __init__(self, network, logger): pass
    def parse(self, model): return len(model) > 0

class _Context:
    def __init__(self): self.at, self.shape = {}, None
    def set_tensor_address(self, name, address): self.at[name] = address
    def set_input_shape(self, name, shape): self.shape = shape
    def execute_async_v3(self, stream):
        n = int(np.prod(self.shape))
        images = np.ctypeslib.as_array((ctypes.c_uint8 * n).from_address(self.at["image"])).reshape(self.shape)
        answer = images.mean(axis=(1, 2), dtype=np.float32)
        ctypes.memmove(self.at["logits"], answer.ctypes.data, answer.nbytes)
        return True

class _Engine:
    num_io_tensors = 2
    def __init__(self, largest): self.largest = largest
    def create_execution_context(self): return _Context()
    def get_tensor_name(self, index): return ("logits", "image")[index]
    def get_tensor_mode(self, name): return "TensorIOMode.INPUT" if name == "image" else "TensorIOMode.OUTPUT"
    def get_tensor_profile_shape(self, name, profile): return None, None, self.largest
    def get_tensor_shape(self, name): return (-1, 16, 16, 3) if name == "image" else (-1, 3)

class Runtime:
    def __init__(self, logger): pass
    def deserialize_cuda_engine(self, plan):
        told = json.loads(plan)
        return _Engine(told["largest"]) if told["version"] == __version__ else None
"""
CUDA = """
import ctypes, enum, os, time, types

class cudaError_t(enum.Enum):
    cudaSuccess = 0
    cudaErrorNoDevice = 100

class cudaMemcpyKind(enum.Enum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2

GOOD, held = cudaError_t.cudaSuccess, []

def allocate(size, *flags):
    held.append(ctypes.create_string_buffer(size))
    return GOOD, ctypes.addressof(held[-1])

def cudaGetDeviceCount():
    none = os.environ.get("FAKE_NO_GPU")
    return (cudaError_t.cudaErrorNoDevice, 0) if none else (GOOD, 1)

def cudaGetDeviceProperties(index):
    return GOOD, types.SimpleNamespace(name=b"Orin", major=8, minor=7)

def cudaMemcpyAsync(to, source, size, kind, stream):
    ctypes.memmove(to, source, size)
    return (GOOD,)

cudaHostAlloc = cudaMalloc = allocate
cudaStreamCreate = lambda: (GOOD, 1)
cudaStreamSynchronize = lambda stream: (GOOD,)
"""


def plant(folder: Path) -> Path:
    """Write the stand-ins to `folder`, which is then to be on `PYTHONPATH`."""
    (folder / "cuda" / "bindings").mkdir(parents=True)
    (folder / "tensorrt.py").write_text(TENSORRT)
    (folder / "cuda" / "__init__.py").write_text("")
    (folder / "cuda" / "bindings" / "__init__.py").write_text("")
    (folder / "cuda" / "bindings" / "runtime.py").write_text(CUDA)
    return folder


def write_trt_bundle(folder: Path, **details: object) -> Path:
    """The artifact of `device_fakes` as a bundle to build on a device, for batches of up to 8."""
    write_artifact(folder)
    known = {"builder": None, "builder_version": None, "compute_capabilities": [], "max_batch": 8}
    manifest = json.loads((folder / "artifact.json").read_text())
    changes = {"format": "tensorrt", "target": "tensorrt", "details": known | details}
    (folder / "artifact.json").write_text(json.dumps(manifest | changes))
    return folder
