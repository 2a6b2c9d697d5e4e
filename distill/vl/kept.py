"""What is asked of a network once per picture, kept on disk for the next run that asks the same.

Without augmentation a teacher, or a student's frozen backbone, says the same about a picture in every run.
"""

from __future__ import annotations

from collections.abc import Callable

from filelock import FileLock
from torch import Tensor

from edgekd.core.console import warn
from edgekd.core.errors import EdgekdError
from edgekd.core.files import cache_folder, disk_errors, short_hash, write_tensors
from edgekd.core.readers import read_tensors


def kept(
    kind: str, facts: tuple[str, ...], ask: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """`ask()`, or what it gave when it was last called for the same `kind` and `facts`.

    Args:
        kind: what is kept, with the version of how it is computed.
        facts: everything else that the values depend on.

    Raises:
        EdgekdError: the cache folder cannot be written.
    """
    path = cache_folder("vl") / f"{kind}-{short_hash(kind, *facts)}.safetensors"
    with disk_errors(path), FileLock(f"{path}.lock"):  # runs side by side compute once
        if path.exists():
            try:
                return read_tensors(path, "stored answers of a network")[0]
            except EdgekdError as error:
                warn(f"{error.message} It is made again.")
        values = ask()
        write_tensors(path, values)
        return values
