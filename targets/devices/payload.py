"""What is sent to a device: agent, artifacts, one file of encoded images, and a job, each named by its content."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgekd.core.files import disk_errors, sha256_file, short_hash
from edgekd.core.manifest import read_artifact
from edgekd.core.readers import inside
from edgekd.data.image_set import FileReader, ImageSet
from edgekd.data.images import read_bytes
from edgekd.targets.agent.job import Job
from edgekd.targets.devices.zipapp import write_agent

_TIME = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class Payload:
    """Files on this machine and where they go, relative to the agent's folder on the device."""

    files: Mapping[str, Path]
    """Name on the device → file here, the agent first."""
    job_folder: str

    @property
    def agent(self) -> str:
        return next(iter(self.files))


class ImagePack:
    """A zip file of encoded images, stored as they are; equal images lie in it once.

    Args:
        path: file to write.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._archive = zipfile.ZipFile(path, "w", zipfile.ZIP_STORED)
        self._places: dict[str, int] = {}

    def add(self, images: ImageSet, index: int) -> int:
        """Position of an image in the pack, which it joins if it is not there yet."""
        encoded = encoded_image(images, index)
        digest = hashlib.sha256(encoded).hexdigest()
        if digest not in self._places:
            self._places[digest] = len(self._places)
            with disk_errors(self._path):
                self._archive.writestr(
                    zipfile.ZipInfo(f"{self._places[digest]:08d}", _TIME), encoded
                )
        return self._places[digest]

    def close(self) -> str:
        """Finish the file; its SHA-256."""
        with disk_errors(self._path):
            self._archive.close()
        return sha256_file(self._path)


def encoded_image(images: ImageSet, index: int) -> bytes:
    """A file as it lies on disk; an image that is drawn or altered in memory as PNG, which keeps every pixel."""
    if isinstance(images.reader, FileReader):
        return read_bytes(images.reader.root / images.reader.paths[index])
    buffer = io.BytesIO()
    images.read(index).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def agent_name(agent: Path) -> str:
    """Name of an agent on a device: what it is, so that another release's does not take its place."""
    return f"edgekd-agent-{sha256_file(agent)[:16]}.pyz"


def artifact_folder_name(folder: Path) -> str:
    """Name of an artifact on a device: what its files are, not where they lie."""
    hashes = [
        sha256_file(folder / name) for name in ("artifact.json", *read_artifact(folder).files)
    ]
    return f"artifact-{short_hash(*hashes)}"


def assemble(job: Job, pack: Path, artifacts: Mapping[str, Path], scratch: Path) -> Payload:
    """Everything a job needs.

    Args:
        job: names its artifacts' folders and its image file as they are to be called on the device.
        pack: the image file here.
        artifacts: folder name on the device → artifact folder here.
        scratch: folder for the files that are made now.
    """
    agent, job_file = scratch / "edgekd-agent.pyz", scratch / "job.json"
    write_agent(agent)
    job_file.write_text(job.to_json(), encoding="utf-8")
    job_folder = f"job-{short_hash(job.to_json(), sha256_file(agent))}"
    files = {agent_name(agent): agent}
    for name, folder in artifacts.items():
        files |= {
            f"{name}/{file}": inside(folder, file)
            for file in ("artifact.json", *read_artifact(folder).files)
        }
    files |= {job.image_file: pack, f"{job_folder}/job.json": job_file}
    return Payload(files, job_folder)
