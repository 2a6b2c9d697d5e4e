"""`edgekd benchmark`, `edgekd report` and `edgekd evaluate`: what is measured."""

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
    """What is measured on which images."""

    paths: Paths = option(default=(), kw_only=False)
    """Run folders (all their artifacts) or artifact folders. Default: the newest run."""
    data: OptionalSpec = option(default=None)
    """Other images, or where the run's own are now: toy, a folder, or a .csv/.parquet manifest."""
    ood: Items = option(default=())
    """Further unseen images as NAME=DIR, each of their domains a suite (seen: where it trained), or wilds:NAME=DIR;
    images that trained are left out; may be repeated."""
    unknown: Items = option(default=())
    """Images that show none of the model's classes, as NAME=DIR: how well its confidence separates them from in-domain
    ones; may be repeated."""
    test: Items = option(default=())
    """Further in-domain test images as NAME=DIR, a suite test:NAME; may be repeated."""
    texture_shape: str | None = None
    """Folder of cue-conflict images (SHAPE/SHAPE1-TEXTURE2.png): shape bias."""


class SpeedOptions(Config):
    """How speed is measured."""

    quick: bool = False
    """Short latency measurement, marked as such."""
    threads: int | None = option(default=None, ge=1, le=MOST_THREADS)
    """Threads of the runtime. Default: the profile's, or the runtime's own choice."""
    energy: str | None = None
    """Energy per image by this sensor where the artifacts run: rapl, nvml, ina or battery."""
    batch_sizes: Counts = option(default=())
    """Images per second at these batch sizes too, such as 1,8,32; with each of --thread-counts."""
    thread_counts: Counts = option(default=())
    """Images per second at these thread counts too, such as 1,2; with each of --batch-sizes."""
    profile: str | None = None
    """Device profile, by name or .toml file: its threads, its cautions. See edgekd list targets."""

    @property
    def grid(self) -> tuple[tuple[int, int | None], ...]:
        """Pairs (batch size, threads) to measure throughput at; None leaves the threads to the runtime."""
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
    """Suites made from the in-domain test images: corruptions."""
    corruption_images: int | None = option(default=None, ge=1, group="Suite")
    """Images in each of the 75 cells of the corruptions. Default: 200."""
    vocabulary: Items = option(default=(), group="Suite")
    """Classify the same images with other prompts or further class names, NAME=FILE: lines with {} are templates,
    others class names to add; may be repeated."""
    device: Items = option(default=(), group="Devices")
    """Run the artifacts there: local, ssh://[USER@]HOST[:PORT], adb:SERIAL, or bundle:DIR, which writes a folder to
    carry to a machine nobody can reach; may be repeated. Default: in processes of this command."""
    keep: bool = option(default=False, group="Devices")
    """Leave agent, artifacts and images on the device for the next time."""
    result: OptionalPath = option(default=None, flag="--import", group="Devices")
    """Read the results that a device wrote for a bundle."""
    gates: Items = option(default=(), flag="--gate", group="Report")
    """What every artifact must fulfil, such as "ood_avg_drop<=1.5"; exit code 1 if not; may be repeated."""
    compare: bool = option(default=False, group="Report")
    """Compare two artifacts: latency ratio, paired accuracy."""
    out: OptionalPath = option(default=None, group="Report")
    """Report folder. Default: RUN/benchmark; beside earlier reports benchmark-2, …"""
    overwrite: bool = option(default=False, group="Report")
    """Replace an earlier report in --out, or in RUN/benchmark."""
    examples: bool = option(default=True, group="Report")
    """Show copies of misclassified images in report.html."""

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
        """Load as every configuration; gates given add to those of the file."""
        more = super().load(gates=given.pop("gates", None)).gates
        config = super().load(**given)
        return config.model_copy(update={"gates": (*config.gates, *more)})

    @property
    def bundle(self) -> str | None:
        """Folder of the bundle, if a device is one."""
        specs = [spec for spec in self.device if spec.startswith("bundle:")]
        return specs[0].removeprefix("bundle:") if specs else None

    @check
    def _devices(self) -> None:
        if self.bundle:
            if len(self.device) > 1 or self.result:
                raise EdgekdError(
                    "A bundle is made alone.", "Measure on other devices with another command."
                )
            if self.compare or self.suites:
                raise EdgekdError(
                    "A bundle holds no corruptions and no comparison.",
                    "Leave --suites and --compare out.",
                )
        elif (self.device or self.result) and (self.compare or (self.device and self.result)):
            raise EdgekdError(
                "--compare, --device and --import do not go together.", "Give one of them."
            )
        if self.result and (self.batch_sizes or self.thread_counts):
            raise EdgekdError(
                "A result has the throughput that its bundle requested.",
                "Leave --batch-sizes and --thread-counts out.",
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
    """Report folders, or run folders, whose newest report is taken. Default: the newest run."""
    out: AnyPath = option(default=Path("comparison"))
    """Folder of the comparison."""
    overwrite: bool = False
    """Replace an earlier comparison in --out."""


class EvaluateConfig(Config):
    """An accuracy of a teacher, and of a run's student."""

    run: OptionalPath = option(default=None, kw_only=False)
    """Run folder whose student to evaluate beside the teacher. Default: the teacher alone; with --agreement, --probe or
    --shots the newest run."""
    data: OptionalSpec = option(default=None)
    """Images: toy, a folder, or a .csv/.parquet manifest. Default: the run's, or toy."""
    teacher: str | None = None
    """Teacher spec. Default: the run's, or toy."""
    prompts: str | None = None
    """photo, imagenet7, imagenet80, domain, or a file of templates. Default: the run's."""
    descriptions: str | None = None
    """Sentences about each class for its prompts, as for edgekd train."""
    agreement: bool = option(default=False, group="Instead of accuracy")
    """How alike teacher, student and artifacts are, on the test images."""
    probe: bool = option(default=False, group="Instead of accuracy")
    """Linear probe and nearest neighbours on the student's features."""
    shots: int | None = option(default=None, ge=1, group="Instead of accuracy")
    """New classes from so many images of each: those the run left out, or --data's."""
    keys: Literal["student", "teacher"] = option(default="student", group="Instead of accuracy")
    """With --shots, whose embeddings of these images are kept: student, or teacher (of ten views of each)."""

    @check
    def _teacher(self) -> None:
        alone = not (self.run or self.teacher or self.agreement or self.probe or self.shots)
        if alone and self.data not in (None, "toy"):
            raise EdgekdError(
                f"No teacher was named for {self.data}, and the built-in one is for the toy images alone.",
                "Name one: --teacher local-dir:FOLDER or NAME:TAG; --teacher toy forces the built-in one.",
            )

    @check
    def _one_question(self) -> None:
        shots = self.shots is not None
        if self.keys != "student" and not shots:
            raise EdgekdError(
                "Keys are those of a few images, and none are shown.",
                "Say how many of each class: --shots 4.",
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
                "Agreement and shots take the run's own texts, a probe its images too.",
                "Give one of them alone.",
            )
