"""Read and write tensors: safetensors with facts in the metadata, and files of `torch.save`."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.core.errors import EdgekdError
from edgekd.core.files import write_bytes
from edgekd.core.readers import RESTORE, open_regular, parse_json, read_errors

if TYPE_CHECKING:
    from torch import Tensor

_FACTS = "edgekd"
"""Single metadata entry with all facts as JSON, since safetensors writes several entries in random order."""


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any] | None = None
) -> None:
    """Write tensors as safetensors atomically; equal tensors and facts give equal bytes.

    Args:
        facts: JSON values, stored as one metadata entry.
    """
    from safetensors.torch import save

    data = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {_FACTS: json.dumps(facts, sort_keys=True, ensure_ascii=False)} if facts else None
    write_bytes(path, save(data, metadata=header))


def read_tensors(
    path: Path, what: str, hint: str = RESTORE
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a safetensors file. Return the tensors by name, and edgekd's facts or else the header's metadata.

    Raises:
        EdgekdError: the file is missing, or not safetensors.
    """
    from safetensors import safe_open

    with read_errors(path, what, "safetensors", hint):
        open_regular(path).close()
        with safe_open(path, framework="pt") as handle:
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
            metadata = handle.metadata() or {}
        facts = parse_json(metadata[_FACTS]) if _FACTS in metadata else metadata
        if not isinstance(facts, dict):
            raise ValueError("its facts are not a JSON object")
        return tensors, facts


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """Return the hex SHA-256 of the names and values of tensors."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_torch(path: Path, value: Mapping[str, Any]) -> None:
    """Write tensors and plain values with `torch.save`, atomically."""
    import torch

    buffer = io.BytesIO()
    torch.save(value, buffer)
    write_bytes(path, buffer.getbuffer())


@contextlib.contextmanager
def loaded_from(path: Path) -> Iterator[None]:
    """Turn any error of loading the state of another run into an `EdgekdError`."""
    try:
        yield
    except EdgekdError:
        raise
    except Exception as error:  # torch and its callers raise many types
        raise EdgekdError(
            f"{path} does not belong to this run.", "Train again with --overwrite."
        ) from error


def read_torch(path: Path, what: str, hint: str = RESTORE, allow: Sequence[Any] = ()) -> Any:
    """Read tensors and plain values from a file of `torch.save`, never code.

    Args:
        allow: further allowed types, as for `torch.serialization.safe_globals`.

    Raises:
        EdgekdError: the file is missing, damaged, or has pickled code.
    """
    import pickle

    import torch

    with (
        read_errors(path, what, "torch file of tensors", hint),
        open_regular(path) as handle,
        torch.serialization.safe_globals(list(allow)),
    ):
        start = handle.read(2)
        handle.seek(0)
        try:
            return torch.load(handle, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            # A zip archive or the first opcode of a pickle: a torch file with other objects than tensors.
            if start == b"PK" or start[:1] == b"\x80":
                raise EdgekdError(
                    f"The {what} at {path} contains pickled code, which edgekd does not run.",
                    "Save its tensors alone: safetensors.torch.save_file(model.state_dict(), ...).",
                ) from error
            raise
