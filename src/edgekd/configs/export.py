"""Options of `edgekd export`, `edgekd verify` and `edgekd classes`."""

from __future__ import annotations

from typing import Any, Literal

from edgekd.configs.base import (
    AnyPath,
    Config,
    OptionalPath,
    OptionalSpec,
    Paths,
    Words,
    check,
    option,
)
from edgekd.core.errors import EdgekdError, check_known
from edgekd.core.formats import EXACT, Input
from edgekd.core.manifest import AnyPrecision
from edgekd.targets.registry import AUTO, DEFAULT_TARGET


class FileOptions(Config):
    """The file to export."""

    run: OptionalPath = option(default=None, kw_only=False)
    """Run folder. Default: the newest under runs/."""
    target: str = DEFAULT_TARGET
    """Target (see edgekd list targets). auto: export for every available runtime, measure, and recommend a file."""
    precision: AnyPrecision = option(
        default="fp32",
        switches={
            "--int8": ("int8", "8-bit weights and activations, calibrated on training images."),
            "--int8-weights": ("int8-weights", "Core ML, LiteRT: 8-bit weights only."),
            "--fp16": ("fp16", "16-bit floating point."),
            "--fp32": ("fp32", "32-bit floating point (the default)."),
            "--w8a8": ("w8a8", "Earlier name of Core ML's --int8."),
            "--palettize": (
                {"4": "pal4", "6": "pal6"},
                "Core ML: weights as indices of 4 or 6 bits into a palette.",
            ),
        },
    )
    """Precision, one of the target's."""
    head: Literal["classes", "embedding"] = "classes"
    """Output of the file: classes, or embedding with the class vectors in a separate file, so that classes can be added
    later (edgekd classes add)."""
    input: Input | None = option(
        default=None,
        switches={
            "--resize-in-graph": (
                "picture",
                "ONNX Runtime: the same as --input picture.",
            )
        },
    )
    """Input of the file: uint8 (RGB `[B, H, W, 3]` of the student's size), float (normalised `[B, 3, H, W]`), or
    picture (RGB of any height and width, resized in the file). Default: the profile's, or uint8."""
    profile: str | None = option(default=None, group="Device")
    """Device profile (name or .toml file) that sets compute capability, deployment target and input."""
    compute_capability: str | None = option(default=None, group="Device")
    """TensorRT: compute capabilities to build for, for example 8.6,8.9."""
    deployment_target: str | None = option(default=None, group="Device")
    """Core ML: minimum system version. Default: iOS17."""
    inference_precision: Literal["f32", "bf16", "f16"] | None = option(default=None, group="Device")
    """OpenVINO with --fp16 or --int8: precision of float layers: f32, bf16 or f16. Default: f32."""
    padding: bool | None = option(default=None, group="Device")
    """ONNX Runtime with --int8: pad the channels of depthwise convolutions to a multiple of 16, which the int8 kernels
    of x86 processors need to be fast. Default: yes."""
    test_kit: bool = False
    """Add 8 of the run's test images to the artifact, with the expected logits and programs that compare. The images
    are distributed with the file, so check their licence."""
    overwrite: bool = False
    """Replace artifacts of the same name."""


class QuantizationOptions(Config):
    """Calibration, and limits on the difference from the student."""

    data: OptionalSpec = option(default=None)
    """Current place of the run's images if they have moved: toy, a folder, or a .csv/.parquet manifest."""
    calibration_images: int = option(default=300, ge=1)
    """Number of training images for calibration."""
    calibrator: str | None = None
    """INT8: calibrator: minmax, percentile, entropy or mse. Default: minmax; mse for TensorRT and LiteRT."""
    max_drop_id: float | None = option(default=None, ge=0)
    """INT8: maximum loss against FP32 on ID validation, in points of top-1. The costliest layers stay in float to meet
    it."""
    max_drop_ood: float | None = option(default=None, ge=0)
    """INT8: the same limit on corrupted ID validation images."""
    search_seconds: float = option(default=300.0, ge=0)
    """INT8 with --max-drop-…: time limit of the search for layers to keep in float."""
    min_agreement: float | None = option(default=None, ge=0, le=100)
    """Minimum top-1 agreement with the torch student, in percent. Default: the precision's; 97 for INT8."""


class AutoOptions(Config):
    """Criteria of --target auto."""

    budget: Words = option(default=())
    """Gates that the file must pass, separated by commas: "ood_avg_drop<=1.0, p90_ms<=20, mb<=5". The exit code is 1 if
    no file passes."""
    device: str | None = None
    """Device to measure on, as for edgekd benchmark: local or ssh://[USER@]HOST[:PORT]. Default: this Python."""


class ExportConfig(AutoOptions, QuantizationOptions, FileOptions):
    """An export of a run's student."""

    @property
    def auto(self) -> bool:
        """Whether the target is chosen by measuring."""
        return self.target == AUTO

    @property
    def limited(self) -> bool:
        """Whether there is a limit on what INT8 may cost."""
        return self.max_drop_id is not None or self.max_drop_ood is not None

    @property
    def options(self) -> dict[str, Any]:
        """The target's own switches that are set."""
        from edgekd.targets.registry import TARGETS

        names = [name for target in TARGETS.values() for name in target.options]
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    @check
    def _target(self) -> None:
        from edgekd.targets.registry import TARGETS, get_target

        if self.auto:
            self._check_auto()
            return
        if self.budget or self.device:
            raise EdgekdError(
                f"--budget and --device belong to --target {AUTO}, not to --target {self.target}.",
                f"Give --target {AUTO}, or check a file with edgekd benchmark --gate.",
            )
        target = get_target(self.target)
        if self.precision not in target.precisions:
            raise EdgekdError(
                f"The target {self.target} does not support {self.precision}.",
                f"It supports: {', '.join(target.precisions)}.",
            )
        if self.calibrator is not None:
            message = f'{target.name} has no calibrator "{self.calibrator}".'
            check_known(self.calibrator, target.calibrators, message)
        if self.calibrator is not None and self.precision != "int8":
            raise EdgekdError(
                f"{self.precision} has no ranges to choose.", "--calibrator belongs to --int8."
            )
        if self.input is not None and self.input not in target.inputs:
            raise EdgekdError(
                f"The files of {target.name} have no input of the kind {self.input}.",
                f"Choose --input {' or '.join(target.inputs)}.",
            )
        if self.precision == "fp32" and self.inference_precision not in (None, "f32"):
            raise EdgekdError(
                f"An fp32 file gives the student's own logits, which {self.inference_precision} does not.",
                "Export with --fp16 or --int8 for this inference precision.",
            )
        if self.padding is not None and self.precision != "int8":
            raise EdgekdError(f"{self.precision} has no padding.", "--padding belongs to --int8.")
        for name in set(self.options) - set(target.options):
            takers = [other.name for other in TARGETS.values() if name in other.options]
            raise EdgekdError(
                f"{self.target} has no option {name}.", f"It belongs to {', '.join(takers)}."
            )

    @check
    def _kit(self) -> None:
        if self.test_kit and (self.head != "classes" or self.input == "float"):
            raise EdgekdError(
                "A test kit is for files that take pixels and end in classes.",
                "Leave out --test-kit.",
            )

    def _check_auto(self) -> None:
        fixed = {"precision", "head", "input", "calibrator", "min_agreement", "test_kit"} | set(
            self.options
        )
        for name in sorted(fixed & self.model_fields_set):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise EdgekdError(
                    f"--target {AUTO} tries every precision with its default settings, so {name} has no effect.",
                    "Leave it out, or name a target.",
                )

    @check
    def _limits(self) -> None:
        from edgekd.targets.registry import TARGETS

        if self.auto:
            return
        mixed = [target.name for target in TARGETS.values() if target.mixed]
        if self.limited and (self.precision != "int8" or self.target not in mixed):
            raise EdgekdError(
                f"--max-drop-id and --max-drop-ood work only for INT8 on {', '.join(mixed)}.",
                f"Add --int8, with --target {' or '.join(mixed)}.",
            )
        if self.min_agreement is not None and self.precision in EXACT:
            raise EdgekdError(
                f"--min-agreement does not apply to {self.precision}, which must agree with the student.",
                "Leave out --min-agreement.",
            )


class VerifyConfig(Config):
    """A repetition of an artifact's parity check."""

    artifact: AnyPath = option(kw_only=False)
    """Artifact folder, in its run or copied anywhere."""
    data: OptionalSpec = option(default=None)
    """Images, needed for an artifact outside its run: toy, a folder, or a .csv/.parquet manifest."""


class ClassConfig(Config):
    """A class of an artifact that ends in an embedding."""

    artifact: AnyPath = option(kw_only=False)
    """Artifact folder, in its run or copied anywhere."""
    name: str = option(kw_only=False)
    """Class name, for example "fire hydrant"."""


class AddClassConfig(ClassConfig):
    """A class to add."""

    images: Paths = option(default=())
    """Images of the class, which the artifact embeds: a file or a folder; may be repeated."""
    text_vector: OptionalPath = option(default=None)
    """Text vectors of the class from the teacher, in a .npy file: `[D]` or `[prompts, D]`."""
    teacher: str | None = None
    """Teacher that embeds the class name with the run's prompts. Default: the run's."""
    descriptions: str | None = None
    """Descriptions of the class, as for edgekd train."""

    @check
    def _one_source(self) -> None:
        if self.descriptions and (self.images or self.text_vector is not None):
            raise EdgekdError(
                "Descriptions extend the prompt of the class name, which is not used here.",
                "Leave out --descriptions.",
            )
        if bool(self.images) + (self.text_vector is not None) + (self.teacher is not None) > 1:
            raise EdgekdError(
                "More than one source is given for the class.",
                "Give --images, --text-vector or --teacher.",
            )
