"""Manifests of training runs and exported artifacts."""

from __future__ import annotations

import html
import os
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from edgekd.core.console import shell_word, warn
from edgekd.core.errors import EdgekdError
from edgekd.core.files import write_json, write_text
from edgekd.core.formats import RENAMED
from edgekd.core.formats import Input as Input
from edgekd.core.formats import Precision as Precision
from edgekd.core.preprocess import Preprocess
from edgekd.core.readers import (
    inside,
    plain_path,
    printable,
    printable_values,
    read_object,
    sha256_file,
)

LABELS_FILE = "labels.txt"
"""File with the classes of an artifact for other programs; edgekd itself reads only `artifact.json`."""
FileName = Annotated[str, AfterValidator(plain_path)]
"""A plain relative path below the manifest's folder."""


def _renamed(value: Any) -> Any:
    if not isinstance(value, str) or value not in RENAMED:
        return value
    warn(f"{value} is now called {RENAMED[value]}; the next version drops the old name.")
    return RENAMED[value]


AnyPrecision = Annotated[Precision, BeforeValidator(_renamed)]
"""A precision, including earlier names."""


class TensorSpec(BaseModel):
    """One input or output of an artifact. `shape` holds ints and names; a name is a free dimension."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    dtype: str
    shape: tuple[int | str, ...]
    layout: str


def _with_sides(image: TensorSpec) -> TensorSpec:
    if len(image.shape) < 2:
        raise ValueError("the shape of the image has no height and width")
    return image


class _Manifest(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    shown: ClassVar[tuple[str, ...]]
    """Base of manifests, with a table for notebooks."""
    schema_version: int = 1
    folder: Path | None = Field(default=None, exclude=True)
    """Path of the folder; not stored, so that the folder can be moved."""

    @model_validator(mode="before")
    @classmethod
    def _escape(cls, data: Any) -> Any:
        return printable_values(data)

    def _repr_html_(self) -> str:
        rows = ""
        for name in self.shown:
            value = getattr(self, name)
            text = ", ".join(value) if isinstance(value, tuple) else str(value)
            heading = f"<th style='text-align:left'>{name.replace('_', ' ')}</th>"
            rows += f"<tr>{heading}<td style='text-align:left'>{html.escape(text)}</td></tr>"
        return f"<table>{rows}</table>"


Manifest = TypeVar("Manifest", bound=_Manifest)


class _Record(BaseModel):
    """Base of records with further unchecked fields."""

    model_config = ConfigDict(extra="allow")


class Parity(_Record):
    """The fields of the parity record that are read."""

    n: int = Field(ge=1)
    max_error_relative: float = Field(ge=0)
    cosine: float
    top1_agreement: float = Field(ge=0, le=1)
    kl: float
    passed: bool = True
    min_agreement: float | None = Field(default=None, ge=0, le=1)


class _Source(_Record):
    run: str | None = None
    student_sha256: str | None = None
    split_hash: str | None = None
    split_seed: int | None = None
    train_domains: list[str] | None = None
    unlabelled_domains: list[str] | None = None
    test_domain: str | None = None


class _Details(_Record):
    builder: str | None = None
    builder_version: str | None = None
    compute_capabilities: list[str] | None = None
    max_batch: int | None = Field(default=None, ge=1, le=65_536)


class Artifact(_Manifest):
    """`artifact.json`: everything needed to load, check and use an exported model without edgekd.

    The input is RGB uint8, normalised in the graph and resized where height and width are free; or float32 planes,
    normalised by `preprocess`. The output is `logits`, calibrated on the run's ID validation images, or `embedding`, of
    which `bank` makes them.
    """

    shown = ("name", "target", "precision", "classes", "input", "agreement", "folder")
    name: str
    """Name of the folder: `<target>-<precision>`, with the suffixes `-embedding`, `-float-input` and
    `-picture-input`."""
    target: str
    format: str
    precision: Precision
    files: dict[FileName, str] = Field(min_length=1)
    """File name → SHA-256, the model first."""
    inputs: tuple[Annotated[TensorSpec, AfterValidator(_with_sides)], ...] = Field(min_length=1)
    outputs: tuple[TensorSpec, ...] = Field(min_length=1)
    classes: tuple[str, ...] = Field(min_length=1)
    bank: FileName | None = None
    """File of the class vectors (targets/bank.py) if the output is an embedding; None for logits."""
    preprocess: Preprocess
    quantization: dict[str, Any] | None = None
    """Method, calibration images and layers in float; None for fp32 and fp16."""
    parity: dict[str, Any]
    """Agreement and logit error against the torch student on real images (export/parity.py)."""
    details: dict[str, Any] = Field(default_factory=dict)
    """Facts of this format: builder, devices, unverified properties."""
    source: dict[str, Any]
    """Student name, recipe, teacher, run folder's name, sha256 of the student's weights; of the split: hash, seed,
    domains trained on and left out."""
    versions: dict[str, str]
    created: str
    """UTC, ISO 8601."""

    @model_validator(mode="before")
    @classmethod
    def _earlier_precisions(cls, data: Any) -> Any:
        """Convert precisions of version 0.1, in which `int8` meant only 8-bit weights and `w8a8` also activations."""
        if not isinstance(data, dict):
            return data
        precision, quantization = data.get("precision"), data.get("quantization")
        method = quantization.get("method") if isinstance(quantization, dict) else None
        if precision == "int8" and str(method).startswith("weights int8"):
            precision = "int8-weights"
        return {**data, "precision": RENAMED.get(str(precision), precision)}

    @model_validator(mode="after")
    def _bank_is_a_file(self) -> Artifact:
        if self.bank is not None and self.bank not in self.files:
            raise ValueError("the class bank is not among the files")
        return self

    @model_validator(mode="after")
    def _records_hold_what_is_read_of_them(self) -> Artifact:
        try:
            Parity.model_validate(self.parity)
            _Source.model_validate(self.source)
            details = _Details.model_validate(self.details)
        except ValidationError as error:
            raise ValueError(first_problem(error)) from error
        if details.builder and not (details.builder_version and details.compute_capabilities):
            raise ValueError("details name a builder without its version and GPUs")
        return self

    @property
    def model_file(self) -> str:
        return next(iter(self.files))

    @property
    def input(self) -> Input:
        if self.inputs[0].dtype == "float32":
            return "float"
        return "picture" if isinstance(self.inputs[0].shape[1], str) else "uint8"

    def write(self, folder: Path) -> None:
        """Write `artifact.json`, and `labels.txt` with one class per line for other programs."""
        write_text(folder / LABELS_FILE, "".join(f"{name}\n" for name in self.classes))
        write_json(folder / "artifact.json", self.model_dump(mode="json"))

    @property
    def agreement(self) -> str:
        """Agreement with the torch student at the export, in words."""
        share, n = self.parity["top1_agreement"], self.parity["n"]
        return f"top-1 agreement with the torch student {100 * share:.1f} % on {n} images"


def read_artifact(folder: Path, *, check_hashes: bool = True) -> Artifact:
    """Load `artifact.json` of an artifact folder and verify every file's hash.

    Raises:
        EdgekdError: the folder or a file is missing or altered, or the schema is unknown.
    """
    folder = Path(folder)
    artifact = _read(Artifact, folder, "artifact", "Export it again", unversioned=None)
    for name, expected in artifact.files.items():
        path = inside(folder, name)
        if check_hashes:
            if not path.is_file():
                raise EdgekdError(
                    f"The artifact at {folder} lacks its file {name}.",
                    "Copy the whole folder again.",
                )
            if sha256_file(path) != expected:
                raise EdgekdError(
                    f"{path} is not the file that was exported: its SHA-256 differs from artifact.json.",
                    "Copy the folder again, or export again with --overwrite.",
                )
    return artifact


def _read(
    kind: type[Manifest], folder: Path, what: str, again: str, *, unversioned: int | None
) -> Manifest:
    """Return the manifest `what.json` of a folder.

    Args:
        again: hint for making it again.
        unversioned: schema version of a file without one; None refuses it.
    """
    data = read_object(folder / f"{what}.json", what, f"{again} with --overwrite.")
    version = data.get("schema_version", unversioned)
    if version != 1:
        raise EdgekdError(
            f"The {what} at {folder} has schema version {shown_value(version)}; "
            "this edgekd reads version 1.",
            f"{again}, or use the edgekd that wrote it.",
        )
    try:
        return kind.model_validate(data).model_copy(update={"folder": folder})
    except ValidationError as error:
        raise EdgekdError(
            f"The {what} at {folder} is damaged: {first_problem(error)}.",
            f"{again} with --overwrite.",
        ) from error


def first_problem(error: ValidationError) -> str:
    """Return Pydantic's first error as `field: reason`."""
    problem = error.errors()[0]
    place = ".".join(str(part) for part in problem["loc"]) or "file"
    return printable(f"{place[:80]}: {problem['msg'][:200]}")


def shown_value(value: object) -> str:
    """Return a value of an untrusted file as short text without control characters."""
    return printable(str(value))[:80]


class Run(_Manifest):
    """`run.json`: the facts of a finished training run. Paths are relative to the run's folder."""

    shown = (
        "name",
        "student",
        "recipe",
        "teacher",
        "data",
        "classes",
        "test_domain",
        "steps",
        "folder",
    )
    name: str
    student: str
    recipe: str
    data: str
    teacher: str
    teacher_id: str
    classes: tuple[str, ...] = Field(min_length=1)
    preprocess: Preprocess
    split_hash: str
    test_domain: str | None
    seed: int
    steps: int
    train_seconds: float
    images_per_second: float
    data_wait_percent: float
    selection: str
    """Rule by which the weights were selected, such as `last EMA`; it does not use the OOD split."""
    student_sha256: str
    versions: dict[str, str]
    created: str

    def write(self, folder: Path) -> None:
        write_json(folder / "run.json", self.model_dump(mode="json"))


def read_run(folder: Path) -> Run:
    """Load `run.json`; raise `EdgekdError` for an unfinished run or another folder."""
    folder = Path(folder)
    if not folder.is_dir():
        raise EdgekdError(f"There is no run at {folder}.", "Train one: edgekd train.")
    if not (folder / "run.json").is_file():
        hint = (
            "Finish it: edgekd train --resume --out " + shell_word(folder)
            if (folder / "config.json").is_file()
            else ""
        )
        raise EdgekdError(
            f"{folder} has no finished run.", hint or "Give a folder written by edgekd train."
        )
    return _read(Run, folder, "run", "Train it again", unversioned=1)


def newest_run() -> Path:
    """Return the most recently finished run under `runs/`."""
    finished = sorted(Path("runs").glob("*/run.json"), key=os.path.getmtime)
    if not finished:
        raise EdgekdError("There is no finished run under runs/.", "Train one first: edgekd train.")
    return finished[-1].parent
