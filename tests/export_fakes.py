"""Export of a model that no run made: the arguments of `Source` and `ExportConfig` side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgekd.configs.export import ExportConfig
from edgekd.core.manifest import Artifact
from edgekd.export.artifact import Source, export_model
from edgekd.export.graph import Deployable


def export_parts(
    model: Deployable, folder: Path, *, fp32_path: Path | None = None, **given: Any
) -> Artifact:
    """`export_model` with any field of `Source` and `ExportConfig`."""
    fields = Source.__dataclass_fields__
    config = ExportConfig.load(**{k: v for k, v in given.items() if k not in fields})
    source = {k: tuple(v) if k == "classes" else v for k, v in given.items() if k in fields}
    return export_model(Source(model=model, **source), folder, config, fp32_path=fp32_path)
