"""A folder for a machine that nobody can reach: carried there, run with one line, and its result carried back."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from edgekd.core.errors import EdgekdError
from edgekd.core.files import write_text
from edgekd.core.folders import BUNDLE, publishing
from edgekd.core.readers import inside, printable
from edgekd.targets.agent.__main__ import RESULT
from edgekd.targets.devices.payload import Payload

AGENT = "edgekd-agent.pyz"


def bundle_command(job_folder: str) -> str:
    """The one line to run inside the folder on the device."""
    return f"python3 {AGENT} run {job_folder}"


def write_bundle(payload: Payload, folder: Path, title: str, packages: Sequence[str]) -> None:
    """Write everything a device needs to `folder`, which must not hold anything yet.

    Args:
        title: what is measured, for the README.
        packages: the runtimes that the device's Python needs, by the names of their packages.

    Raises:
        EdgekdError: the folder holds something.
    """
    if folder == Path() or printable(str(folder)) != str(folder):
        raise EdgekdError(
            f'"bundle:{printable(str(folder))}" names no folder.',
            "Name a new one: --device bundle:DIR.",
        )
    with publishing(folder, BUNDLE, overwrite=False) as scratch:
        for name, source in payload.files.items():
            target = inside(scratch, AGENT if name == payload.agent else name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
        line = bundle_command(payload.job_folder)
        write_text(
            scratch / "README.txt",
            f"A measurement of {title}.\n\n"
            f"The device needs Python 3.9 or newer with numpy, Pillow 10.1 or newer, and {' and '.join(packages)}.\n"
            f"Copy this whole folder there, then, inside it:\n\n    {line}\n\n"
            "Stopped or restarted, the same line goes on where it stopped. Bring back the file\n\n"
            f"    {payload.job_folder}/{RESULT}\n\nand give it to edgekd benchmark --import.\n",
        )
