"""`edgekd export`, `edgekd verify` and `edgekd classes`: what is done with artifacts."""

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
from edgekd.core.errors import EdgekdError, did_you_mean
from edgekd.core.formats import EXACT, Input
from edgekd.core.manifest import AnyPrecision
from edgekd.targets.registry import AUTO, DEFAULT_TARGET


class FileOptions(Config):
    """What the file is."""

    run: OptionalPath = option(default=None, kw_only=False)
    """Run folder. Default: the newest under runs/."""
    target: str = DEFAULT_TARGET
    """See edgekd list targets; auto: every runtime that the device has, measured, with one file recommended."""
    precision: AnyPrecision = option(
        default="fp32",
        switches={
            "--int8": ("int8", "8-bit weights and activations, calibrated on training images."),
            "--int8-weights": ("int8-weights", "Core ML, LiteRT: 8-bit weights alone."),
            "--fp16": ("fp16", "16-bit floats."),
            "--fp32": ("fp32", "32-bit floats (the default)."),
            "--w8a8": ("w8a8", "Earlier name of Core ML's --int8."),
            "--palettize": (
                {"4": "pal4", "6": "pal6"},
                "Core ML: weights as indices of 4 or 6 bits into a palette.",
            ),
        },
    )
    """One of the target's precisions."""
    head: Literal["classes", "embedding"] = "classes"
    """What the file ends in: classes, or embedding: the image's vector, with class vectors beside the file that can be
    added to (edgekd classes add)."""
    input: Input | None = option(
        default=None,
        switches={
            "--resize-in-graph": (
                "picture",
                "ONNX Runtime: as --input picture, so that no other program has to resize as Pillow does.",
            )
        },
    )
    """What the file takes: uint8, RGB pixels `[B, H, W, 3]` of the student's size; float: `[B, 3, H, W]`, normalised
    already, as other programs feed them; or picture: RGB pixels of any height and width, which the file resizes.
    Default: the profile's, or uint8."""
    profile: str | None = option(default=None, group="Device")
    """Device profile, by name or .toml file: its compute capability, its deployment target, its input."""
    compute_capability: str | None = option(default=None, group="Device")
    """TensorRT: the GPUs to build for, for example 8.6,8.9."""
    deployment_target: str | None = option(default=None, group="Device")
    """Core ML: oldest system to run on. Default: iOS17."""
    inference_precision: Literal["f32", "bf16", "f16"] | None = option(default=None, group="Device")
    """OpenVINO, with --fp16 or --int8: what float layers compute in: f32, bf16 or f16. Default: f32."""
    padding: bool | None = option(default=None, group="Device")
    """ONNX Runtime, with --int8: zero channels around depthwise convolutions, up to the 16 that the int8 kernels of x86
    processors compute at a time. Default: yes."""
    test_kit: bool = False
    """Put 8 of the run's test images into the artifact, with the expected logits and programs that compare. They go
    wherever the file goes, so mind their licence."""
    overwrite: bool = False
    """Replace artifacts of the same name."""


class QuantizationOptions(Config):
    """How the file is calibrated, and how far it may differ from the student."""

    data: OptionalSpec = option(default=None)
    """Where the run's images are now, if they have moved: toy, a folder, or a .csv/.parquet manifest."""
    calibration_images: int = option(default=300, ge=1)
    """Training images that INT8 ranges are measured on."""
    calibrator: str | None = None
    """INT8: how ranges are chosen: minmax, percentile, entropy or mse. Default: minmax; TensorRT, LiteRT: mse."""
    max_drop_id: float | None = option(default=None, ge=0)
    """INT8: points of top-1 it may lose on ID validation, against FP32; the worst layers stay in float."""
    max_drop_ood: float | None = option(default=None, ge=0)
    """INT8: the same on corrupted ID validation images."""
    search_seconds: float = option(default=300.0, ge=0)
    """INT8 with --max-drop-…: time for finding the layers to keep in float."""
    min_agreement: float | None = option(default=None, ge=0, le=100)
    """Percent of images on which the file must predict the torch student's class. Default: the precision's; INT8 97."""


class AutoOptions(Config):
    """What --target auto chooses by."""

    budget: Words = option(default=())
    """What the file must fulfil, as gates with commas: "ood_avg_drop<=1.0, p90_ms<=20, mb<=5"; exit code 1 if none
    does."""
    device: str | None = None
    """Where it is to run: local or ssh://[USER@]HOST[:PORT], as for edgekd benchmark. Default: in this Python."""


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
                f"--budget and --device choose a file, and --target {self.target} is one already.",
                f"Give --target {AUTO}, or judge a file: edgekd benchmark --gate.",
            )
        target = get_target(self.target)
        if self.precision not in target.precisions:
            raise EdgekdError(
                f"{self.target} takes no {self.precision}.",
                f"It takes: {', '.join(target.precisions)}.",
            )
        if self.calibrator is not None and self.calibrator not in target.calibrators:
            raise EdgekdError(
                f'{target.name} has no calibrator "{self.calibrator}".',
                did_you_mean(self.calibrator, target.calibrators),
            )
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
                    f"--target {AUTO} tries every precision with its default settings, so {name} has no use.",
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
                f"A largest drop can be set for INT8 on {', '.join(mixed)} only.",
                f"Add --int8, with --target {' or '.join(mixed)}.",
            )
        if self.min_agreement is not None and self.precision in EXACT:
            raise EdgekdError(
                f"{self.precision} has to agree with the student: a file that does not is wrong.",
                "Leave out --min-agreement.",
            )


class VerifyConfig(Config):
    """A repetition of an artifact's parity check."""

    artifact: AnyPath = option(kw_only=False)
    """Artifact folder, in its run or copied anywhere."""
    data: OptionalSpec = option(default=None)
    """Where the images are; needed outside the run: toy, a folder, or a .csv/.parquet manifest."""


class ClassConfig(Config):
    """A class of an artifact that ends in an embedding."""

    artifact: AnyPath = option(kw_only=False)
    """Artifact folder, in its run or copied anywhere."""
    name: str = option(kw_only=False)
    """Name of the class, for example "fire hydrant"."""


class AddClassConfig(ClassConfig):
    """A class to add."""

    images: Paths = option(default=())
    """By a few images of it, embedded by the artifact: an image or a folder; may be repeated."""
    text_vector: OptionalPath = option(default=None)
    """By the teacher's text vectors of it, in a .npy file: `[D]` or `[prompts, D]`."""
    teacher: str | None = None
    """By its name and the run's prompts: where the teacher is now. Default: the run's."""
    descriptions: str | None = None
    """Sentences about the class for its prompts, as for edgekd train."""

    @check
    def _one_source(self) -> None:
        if self.descriptions and (self.images or self.text_vector is not None):
            raise EdgekdError(
                "Descriptions stand behind the class's name, and its name is not used.",
                "Leave them out.",
            )
        if bool(self.images) + (self.text_vector is not None) + (self.teacher is not None) > 1:
            raise EdgekdError(
                "A class comes from one source.", "Give --images, --text-vector or --teacher."
            )
