"""Options of `edgekd benchmark`, `edgekd report` and `edgekd evaluate`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from edgekd.configs.base import (
    AnyPath,
    Config,
    Counts,
    Items,
    OptionalPath,
    OptionalSpec,
    Paths,
    Words,
    check,
    option,
)
from edgekd.core.errors import EdgekdError
from edgekd.core.formats import MOST_BATCH, MOST_THREADS


class SuiteOptions(Config):
    """Models and test images."""

    paths: Paths = option(default=(), kw_only=False)
    """Run folders (all their artifacts) or artifact folders. Default: the newest run."""
    data: OptionalSpec = option(default=None)
    """Other images, or the current place of the run's images: toy, a folder, or a .csv/.parquet manifest."""
    ood: Items = option(default=())
    """More unseen images as NAME=DIR or wilds:NAME=DIR. Each domain becomes a suite, and training images are excluded;
    may be repeated."""
    unknown: Items = option(default=())
    """Images of none of the model's classes as NAME=DIR, to measure out-of-distribution detection; may be repeated."""
    test: Items = option(default=())
    """More in-domain test images as NAME=DIR (suite test:NAME); may be repeated."""
    texture_shape: str | None = None
    """Folder of cue-conflict images (SHAPE/SHAPE1-TEXTURE2.png), to measure shape bias."""


class SpeedOptions(Config):
    """Measurement of speed."""

    quick: bool = False
    """Make a short latency measurement and mark the report accordingly."""
    threads: int | None = option(default=None, ge=1, le=MOST_THREADS)
    """Threads of the runtime. Default: the profile's, or the runtime's own choice."""
    energy: str | None = None
    """Measure energy per image with this sensor of the device: rapl, nvml, ina or battery."""
    batch_sizes: Counts = option(default=())
    """Also measure throughput at these batch sizes, such as 1,8,32, with each of --thread-counts."""
    thread_counts: Counts = option(default=())
    """Also measure throughput at these thread counts, such as 1,2, with each of --batch-sizes."""
    profile: str | None = None
    """Device profile (name or .toml file) that sets the threads and prints its cautions (see edgekd list targets)."""

    @property
    def grid(self) -> tuple[tuple[int, int | None], ...]:
        """Return the pairs (batch size, threads) to measure throughput at; None is the runtime's default."""
        if not self.batch_sizes and not self.thread_counts:
            return ()
        threads = self.thread_counts or (self.threads,)
        return tuple((batch, n) for batch in self.batch_sizes or (1,) for n in threads)

    @check
    def _counts(self) -> None:
        for given, most in ((self.batch_sizes, MOST_BATCH), (self.thread_counts, MOST_THREADS)):
            if any(not 1 <= number <= most for number in given):
                raise EdgekdError(
                    f'"{",".join(map(str, given))}" has a number below 1 or above {most:,}.',
                    "Give numbers that the device can take.",
                )


class BenchmarkConfig(SpeedOptions, SuiteOptions):
    """A measurement of runs and artifacts."""

    suites: Words = option(default=(), group="Suite")
    """Suites to make from the in-domain test images: corruptions."""
    corruption_images: int | None = option(default=None, ge=1, group="Suite")
    """Images in each of the 75 cells of the corruptions. Default: 200."""
    vocabulary: Items = option(default=(), group="Suite")
    """Also classify with other prompts, as NAME=FILE. Lines with {} are templates, other lines are class names to add;
    may be repeated."""
    device: Items = option(default=(), group="Devices")
    """Device to run the artifacts on: local, ssh://[USER@]HOST[:PORT], adb:SERIAL, or bundle:DIR (write a folder to
    copy to a machine without a connection); may be repeated. Default: this machine."""
    keep: bool = option(default=False, group="Devices")
    """Keep agent, artifacts and images on the device for the next measurement."""
    result: OptionalPath = option(default=None, flag="--import", group="Devices")
    """Import the result that a device wrote for a bundle."""
    gates: Items = option(default=(), flag="--gate", group="Report")
    """Condition that every artifact must meet, such as "ood_avg_drop<=1.5". The exit code is 1 if one does not; may be
    repeated."""
    compare: bool = option(default=False, group="Report")
    """Compare two artifacts by latency ratio and paired accuracy."""
    out: OptionalPath = option(default=None, group="Report")
    """Report folder. Default: RUN/benchmark, or benchmark-2, … if there are earlier reports."""
    overwrite: bool = option(default=False, group="Report")
    """Replace an earlier report in --out, or in RUN/benchmark."""
    examples: bool = option(default=True, group="Report")
    """Include misclassified images in report.html."""

    @classmethod
    def from_file(cls, values: dict[str, Any], path: Path) -> dict[str, Any]:
        """Return the table [benchmark], and the conditions of [gates]."""
        gates = values.get("gates")
        if gates is None and cls.verb() in values:
            return super().from_file(values, path)
        if not isinstance(gates, dict) or not gates:
            raise EdgekdError(
                f"{path} has no [gates].",
                'Write a table: [gates], then lines such as p90_ms = "<=20".',
            )
        own = super().from_file(values, path) if cls.verb() in values else {}
        return own | {"gates": (*_gates_of_table(gates), *own.get("gates", ()))}

    @classmethod
    def load(cls, **given: Any) -> BenchmarkConfig:
        """Load the configuration; gates of the caller are added to those of the file."""
        more = super().load(gates=given.pop("gates", None)).gates
        config = super().load(**given)
        return config.model_copy(update={"gates": (*config.gates, *more)})

    @property
    def bundle(self) -> str | None:
        """Return the folder of a `bundle:` device, if there is one."""
        specs = [spec for spec in self.device if spec.startswith("bundle:")]
        return specs[0].removeprefix("bundle:") if specs else None

    @check
    def _devices(self) -> None:
        if self.bundle:
            if len(self.device) > 1 or self.result:
                raise EdgekdError(
                    "A bundle cannot be combined with other devices or an import.",
                    "Measure on other devices with another command.",
                )
            if self.compare or self.suites:
                raise EdgekdError(
                    "A bundle does not support corruptions or a comparison.",
                    "Leave out --suites and --compare.",
                )
        elif (self.device or self.result) and (self.compare or (self.device and self.result)):
            raise EdgekdError(
                "--compare, --device and --import cannot be combined.", "Give one of them."
            )
        if self.result and (self.batch_sizes or self.thread_counts):
            raise EdgekdError(
                "The throughput settings of an imported result are those of its bundle.",
                "Leave out --batch-sizes and --thread-counts.",
            )


def _gates_of_table(table: Mapping[str, object]) -> list[str]:
    """Return the `[gates]` table of a TOML file as expressions: `ood_avg_drop = "<=1.5"`, or a list of such limits."""
    expressions = []
    for metric, limits in table.items():
        for limit in limits if isinstance(limits, list) else [limits]:
            if not isinstance(limit, str) or not limit.strip().startswith(("<", ">")):
                raise EdgekdError(
                    f"The gate {metric} = {limit!r} has no operator.",
                    f'Write {metric} = "<={limit}" or ">={limit}".',
                )
            expressions.append(f"{metric}{limit}")
    return expressions


class ReportConfig(Config):
    """A comparison of finished benchmarks."""

    paths: Paths = option(default=(), kw_only=False)
    """Report folders, or run folders for their newest report. Default: the newest run."""
    out: AnyPath = option(default=Path("comparison"))
    """Folder of the comparison."""
    overwrite: bool = False
    """Replace an earlier comparison in --out."""


class EvaluateConfig(Config):
    """An evaluation of a teacher, and of a run's student."""

    run: OptionalPath = option(default=None, kw_only=False)
    """Run folder, to evaluate its student too. Default: only the teacher; the newest run with --agreement, --probe or
    --shots."""
    data: OptionalSpec = option(default=None)
    """Images: toy, a folder, or a .csv/.parquet manifest. Default: the run's, or toy."""
    teacher: str | None = None
    """Teacher, as for edgekd train. Default: the run's, or toy."""
    prompts: str | None = None
    """Prompt templates: photo, imagenet7, imagenet80, domain, or a file. Default: the run's."""
    descriptions: str | None = None
    """Descriptions of the classes, as for edgekd train."""
    agreement: bool = option(default=False, group="Instead of accuracy")
    """Measure the agreement of student and artifacts with the teacher on the test images."""
    probe: bool = option(default=False, group="Instead of accuracy")
    """Evaluate a linear probe and nearest neighbours on the student's features."""
    shots: int | None = option(default=None, ge=1, group="Instead of accuracy")
    """Evaluate few-shot classification with this many images of each new class (the run's unseen classes, or
    --data's)."""
    keys: Literal["student", "teacher"] = option(default="student", group="Instead of accuracy")
    """With --shots: cache the embeddings of the student, or of the teacher (ten views per image)."""

    @check
    def _teacher(self) -> None:
        alone = not (self.run or self.teacher or self.agreement or self.probe or self.shots)
        if alone and self.data not in (None, "toy"):
            raise EdgekdError(
                f"No teacher is given for {self.data}, and the built-in one is for the toy images only.",
                "Name one: --teacher local-dir:FOLDER or NAME:TAG; --teacher toy forces the built-in one.",
            )

    @check
    def _one_question(self) -> None:
        shots = self.shots is not None
        if self.keys != "student" and not shots:
            raise EdgekdError(
                "--keys needs --shots.",
                "Give the number of images of each class: --shots 4.",
            )
        if not (self.agreement or self.probe or shots):
            return
        if (
            (self.agreement + self.probe + shots > 1)
            or self.prompts
            or self.descriptions
            or (self.probe and self.data)
            or (self.teacher and not self.agreement)
        ):
            raise EdgekdError(
                "--agreement, --probe and --shots cannot be combined with each other or with other texts or images.",
                "Give one of them.",
            )
