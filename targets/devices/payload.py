"""What is sent to a device: agent, artifacts, one file of encoded images, and a job, each named by its hash.

`edgekd-agent.pyz` is the agent and the package's own modules that it runs in one file. The modules lie in it under the
names they have here, byte for byte; tests/targets/test_agent.py compares them. A bundle is the same as a folder, for a
machine that cannot be reached from here.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgekd.core.errors import EdgekdError
from edgekd.core.files import disk_errors, short_hash, write_bytes, write_text
from edgekd.core.folders import BUNDLE, publishing
from edgekd.core.manifest import read_artifact
from edgekd.core.readers import inside, printable, sha256_file
from edgekd.data.image_set import ImageSet
from edgekd.data.images import read_bytes
from edgekd.data.sources.source import FileReader
from edgekd.targets.agent.__main__ import RESULT
from edgekd.targets.agent.job import Job
from edgekd.targets.registry import TARGETS

AGENT = "edgekd-agent.pyz"
_OPENERS = [one for one in TARGETS.values() if one.packages is not None]
SHARED = (
    "core/errors.py",
    "core/formats.py",
    "core/machine.py",
    "core/predictor.py",
    "core/readers.py",
    "data/images.py",
    "data/resize.py",
    "targets/__init__.py",
    "targets/bank.py",
    "targets/bank_change.py",
    "targets/feed.py",
    "targets/registry.py",
    "targets/session.py",
    "targets/timing/__init__.py",
    "targets/timing/energy.py",
    "targets/timing/intervals.py",
    "targets/timing/stopwatch.py",
    *(f"{one.opener.replace('.', '/').removeprefix('edgekd/')}.py" for one in _OPENERS),
    *(f"targets/{file}" for one in _OPENERS for file in one.modules),
)
"""Modules of the package that run on a device too; beside each other they import numpy, Pillow and the runtime only."""
_START = '''"""Start the agent, or exit with one sentence where this Python cannot."""
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
for name, version, least in (("numpy", numpy.__version__, (1, 22)), ("Pillow", PIL.__version__, (10, 1))):
    if tuple(int(part) for part in version.split(".")[:2]) < least:
        refuse("The device has %s %s; the agent needs %d.%d or newer." % ((name, version) + least), "Update it there.")

from edgekd.targets.agent.__main__ import main  # noqa: E402

sys.exit(main(sys.argv[1:]))
'''
_EMPTY = b'"""Part of the device agent."""\n'
_TIME = (1980, 1, 1, 0, 0, 0)  # the same sources give the same bytes


def agent_bytes() -> bytes:
    """Return the agent as one executable zip file; equal for equal sources."""
    agent = Path(__file__).parents[1] / "agent"
    contents = {"__main__.py": _START.encode(), "edgekd/__init__.py": _EMPTY}
    contents |= {f"edgekd/{folder}/__init__.py": _EMPTY for folder in ("core", "data")}
    contents |= {f"edgekd/{name}": _module(name) for name in SHARED}
    contents |= {f"edgekd/targets/agent/{p.name}": p.read_bytes() for p in agent.glob("*.py")}
    buffer = io.BytesIO()
    buffer.write(b"#!/usr/bin/env python3\n")
    with zipfile.ZipFile(buffer, "a", zipfile.ZIP_DEFLATED) as archive:
        for name, content in sorted(contents.items()):
            archive.writestr(zipfile.ZipInfo(name, _TIME), content, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def _module(name: str) -> bytes:
    """Read a file of the package through its parent's `__path__`, since a checkout has these folders elsewhere."""
    parent, _, file = ("edgekd/" + name).rpartition("/")
    [folder] = importlib.import_module(parent.replace("/", ".")).__path__
    return (Path(folder) / file).read_bytes()


def write_agent(path: Path) -> None:
    """Write the agent to `path`, executable."""
    write_bytes(path, agent_bytes())
    path.chmod(0o755)


def agent_name(agent: Path) -> str:
    """Return the name of an agent on a device; it contains a hash, so that releases do not replace each other."""
    return f"edgekd-agent-{sha256_file(agent)[:16]}.pyz"


class ImagePack:
    """A zip file of encoded images, stored as they are; equal images lie in it once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._archive = zipfile.ZipFile(path, "w", zipfile.ZIP_STORED)
        self._places: dict[str, int] = {}

    def add(self, images: ImageSet, index: int) -> int:
        """Return the position of an image in the pack, added if it is not there yet."""
        encoded = encoded_image(images, index)
        digest = hashlib.sha256(encoded).hexdigest()
        if digest not in self._places:
            self._places[digest] = place = len(self._places)
            with disk_errors(self._path):
                self._archive.writestr(zipfile.ZipInfo(f"{place:08d}", _TIME), encoded)
        return self._places[digest]

    def close(self) -> str:
        """Finish the file; return its SHA-256."""
        with disk_errors(self._path):
            self._archive.close()
        return sha256_file(self._path)


def encoded_image(images: ImageSet, index: int) -> bytes:
    """Return a file as it lies on disk; an image made in memory as PNG, which keeps every pixel."""
    if isinstance(images.reader, FileReader):
        return read_bytes(images.reader.root / images.reader.paths[index])
    buffer = io.BytesIO()
    images.read(index).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


@dataclass(frozen=True)
class Payload:
    """Files on this machine and where they go, relative to the agent's folder on the device."""

    files: Mapping[str, Path]
    """Name on the device → file here, the agent first."""
    job_folder: str

    @property
    def agent(self) -> str:
        """Name of the agent on the device."""
        return next(iter(self.files))


def artifact_folder_name(folder: Path) -> str:
    """Return the name of an artifact on a device, which contains a hash of its files."""
    names = ("artifact.json", *read_artifact(folder).files)
    return f"artifact-{short_hash(*(sha256_file(folder / name) for name in names))}"


def assemble(job: Job, pack: Path, artifacts: Mapping[str, Path], scratch: Path) -> Payload:
    """Return everything a job needs: its image file `pack`, `artifacts` by folder name on the device, and the agent.

    What is made now goes to `scratch`.
    """
    agent, job_file = scratch / AGENT, scratch / "job.json"
    write_agent(agent)
    job_file.write_text(job.to_json(), encoding="utf-8")
    job_folder = f"job-{short_hash(job.to_json(), sha256_file(agent))}"
    files = {agent_name(agent): agent}
    for name, folder in artifacts.items():
        for file in ("artifact.json", *read_artifact(folder).files):
            files[f"{name}/{file}"] = inside(folder, file)
    files |= {job.image_file: pack, f"{job_folder}/job.json": job_file}
    return Payload(files, job_folder)


def bundle_command(job_folder: str) -> str:
    """Return the one line to run inside a bundle's folder on the device."""
    return f"python3 {AGENT} run {job_folder}"


def write_bundle(payload: Payload, folder: Path, title: str, packages: Sequence[str]) -> None:
    """Write everything a device needs to `folder`, which must not hold anything yet.

    The README names what is measured, `title`, and the runtimes that the device needs, `packages`.
    """
    if folder == Path() or printable(str(folder)) != str(folder):
        raise EdgekdError(
            f'"bundle:{printable(str(folder))}" is not a folder name.',
            "Name a new one: --device bundle:DIR.",
        )
    with publishing(folder, BUNDLE, overwrite=False) as scratch:
        for name, source in payload.files.items():
            target = inside(scratch, AGENT if name == payload.agent else name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
        write_text(
            scratch / "README.txt",
            f"A measurement of {title}.\n\n"
            f"The device needs Python 3.9 or newer with numpy, Pillow 10.1 or newer, and {' and '.join(packages)}.\n"
            f"Copy this whole folder there, then, inside it:\n\n    {bundle_command(payload.job_folder)}\n\n"
            "If it is interrupted, run the same line again to resume. Bring back the file\n\n"
            f"    {payload.job_folder}/{RESULT}\n\nand give it to edgekd benchmark --import.\n",
        )
