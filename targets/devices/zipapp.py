"""`edgekd-agent.pyz`: the agent and the package's own modules that it runs, in one file, made from the package's files.

The modules lie in it under the names they have here, byte for byte; tests/targets/test_agent.py compares them.
"""

from __future__ import annotations

import importlib
import io
import zipfile
from pathlib import Path

from edgekd.core.files import write_bytes

SHARED = (
    "core/errors.py",
    "core/formats.py",
    "data/images.py",
    "core/predictor.py",
    "core/readers.py",
    "data/resize.py",
    "benchmark/measure/energy.py",
    "benchmark/measure/environment.py",
    "benchmark/measure/latency.py",
    "benchmark/measure/intervals.py",
    "targets/__init__.py",
    "targets/bank.py",
    "targets/bank_change.py",
    "targets/feed.py",
    "targets/litert.py",
    "targets/new_class.py",
    "targets/onnxruntime.py",
    "targets/opened.py",
    "targets/openvino.py",
    "targets/placement.py",
    "targets/registry.py",
    "targets/trt_build.py",
    "targets/trt_builders.py",
    "targets/trt_engine.py",
    "targets/tensorrt.py",
)
"""Modules of the package that run on a device too; beside each other they import numpy, Pillow and the runtime only."""

_START = '''"""Starts the agent, or says in one sentence why this Python cannot."""
import json
import sys


def refuse(message, hint):
    sys.stdout.write(json.dumps({"error": [message, hint]}) + "\\n")
    sys.exit(2)


if sys.version_info < (3, 9):
    refuse("The device's Python is %d.%d; the agent needs 3.9 or newer." % sys.version_info[:2], "Name a newer one.")
try:
    import numpy
    import PIL
except ImportError as error:
    refuse(
        "The device's Python lacks a package the agent needs: %s." % error,
        "On the device: python3 -m pip install numpy pillow, and the artifact's runtime, or name a Python with them.",
    )
for name, found, least in (("numpy", numpy.__version__, (1, 22)), ("Pillow", PIL.__version__, (10, 1))):
    if tuple(int(part) for part in found.split(".")[:2]) < least:
        refuse("The device has %s %s; the agent needs %d.%d or newer." % ((name, found) + least), "Update it there.")

from edgekd.targets.agent.__main__ import main  # noqa: E402

sys.exit(main(sys.argv[1:]))
'''
_EMPTY = '"""Part of the device agent."""\n'
_TIME = (1980, 1, 1, 0, 0, 0)  # the same sources give the same bytes


def agent_bytes() -> bytes:
    """The agent as one executable zip file; equal for equal sources."""
    agent = Path(__file__).parents[1] / "agent"
    contents = {"__main__.py": _START.encode(), "edgekd/__init__.py": _EMPTY.encode()}
    for folder in ("benchmark", "benchmark/measure", "core", "data"):
        contents[f"edgekd/{folder}/__init__.py"] = _EMPTY.encode()
    contents |= {f"edgekd/{name}": _module(name) for name in SHARED}
    contents |= {
        f"edgekd/targets/agent/{path.name}": path.read_bytes() for path in agent.glob("*.py")
    }
    buffer = io.BytesIO()
    buffer.write(b"#!/usr/bin/env python3\n")
    with zipfile.ZipFile(buffer, "a", zipfile.ZIP_DEFLATED) as archive:
        for name, content in sorted(contents.items()):
            archive.writestr(zipfile.ZipInfo(name, _TIME), content, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def write_agent(path: Path) -> None:
    """Write the agent to `path`, executable."""
    write_bytes(path, agent_bytes())
    path.chmod(0o755)


def _module(name: str) -> bytes:
    """A file of the package; `edgekd.__path__` is asked part by part, since a checkout keeps the rooms elsewhere."""
    parent, _, file = ("edgekd/" + name).rpartition("/")
    [folder] = importlib.import_module(parent.replace("/", ".")).__path__
    return (Path(folder) / file).read_bytes()
