"""What is asked of a network once per picture, kept on disk for the next run that asks the same.

Without augmentation a teacher, or a student's frozen backbone, says the same about a picture in every run.
"""

from __future__ import annotations

from collections.abc import Callable

from filelock import FileLock
from safetensors.torch import save
from torch import Tensor

from edgekd.console import warn
from edgekd.errors import EdgekdError
from edgekd.files import cache_folder, short_hash, write_bytes
from edgekd.readers import read_tensors


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
    with FileLock(f"{path}.lock"):  # runs side by side ask once
        if path.exists():
            try:
                return read_tensors(path, "stored answers of a network")[0]
            except EdgekdError as error:
                warn(f"{error.message} It is made again.")
        values = {name: value.contiguous() for name, value in ask().items()}
        write_bytes(path, save(values))
        return values
