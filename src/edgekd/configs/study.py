"""Options of `edgekd study`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import model_validator

from edgekd.configs.base import (
    Config,
    Items,
    Numbers,
    OptionalPath,
    Words,
    check,
    option,
    put,
    refuse_command,
)
from edgekd.configs.train import RunOptions, TrainConfig
from edgekd.core.errors import EdgekdError

DECIDED = {
    "recipe": "--recipes", "seed": "--seeds", "test_domain": "--test-domains", "out": "--out", "resume": "nothing",
    "overwrite": "another --out", "smoke": "--set steps=4", "unseen_classes": "--unseen-classes",
    "label_fraction": "--fractions", "shots": "--shots", "start": "--protocol k-shot", "adapt": "--adapt-images",
}  # fmt: skip
"""Settings of a run that a study sets itself → the option to use instead."""


class StudyOptions(Config):
    """Recipes and protocol of a study."""

    recipes: Words = option(default=("erm", "kd", "edgekd"), kw_only=False, flag="--recipes")
    """Recipes to compare, separated by commas (see edgekd list recipes). NAME=RECIPE gives one another name."""
    protocol: Literal["lodo", "class-disjoint", "k-shot", "low-shot", "adapt"] = "lodo"
    """lodo (unseen domains), adapt (unlabelled images of them), class-disjoint (classes), k-shot (a few images of such
    classes) or low-shot (labels)."""
    seeds: int = option(default=3, ge=1)
    """How many seeds, from 0."""
    test_domains: Words = option(default=())
    """Domains to leave out in turn, separated by commas. Default: all; the last for low-shot."""
    unseen_classes: Words = option(default=())
    """class-disjoint, k-shot: unseen classes separated by commas, or a share such as 30%. Default: 50%."""
    fractions: Numbers = option(default=())
    """low-shot: fractions of the training labels. Default: 0.01,0.1,1."""
    shots: Numbers = option(default=())
    """k-shot: images of each unseen class. Default: 1,4,16."""
    adapt_images: Numbers = option(default=())
    """adapt: numbers of unlabelled training images of the unseen domain. Default: 25,50,100,200,400."""
    baseline: str | None = None
    """Recipe to compare the others with. Default: erm, or the first."""
    oracle: bool = False
    """lodo, low-shot: beside each result the best step's, chosen on the unseen images."""
    jobs: int = option(default=1, ge=1)
    """Cells side by side, in processes that share cores and GPUs."""
    part: str | None = option(default=None)
    """Run only the i-th of n parts of the cells (i/n), for a job array. The command without --part makes the tables."""
    keep: bool = False
    """Keep the run folders of finished cells."""
    out: OptionalPath = option(default=None)
    """Study folder; an existing study is resumed. Default: studies/PROTOCOL-DATA."""
    recipe_settings: Items = option(default=(), flag="--recipe-set", group="Settings")
    """Setting for one recipe as RECIPE:name=value or RECIPE:a.b=value; may be repeated."""


_BELONGS = {
    "unseen_classes": ("class-disjoint", "k-shot"),
    "test_domains": ("lodo", "low-shot", "adapt"),
    "fractions": ("low-shot",),
    "shots": ("k-shot",),
    "adapt_images": ("adapt",),
    "oracle": ("lodo", "low-shot"),
}
"""Option → the protocols that take it."""


class StudyConfig(RunOptions, StudyOptions):
    """A comparison of recipes. The options of a single run apply to every recipe."""

    whole_file: ClassVar[bool] = True

    @model_validator(mode="before")
    @classmethod
    def _decided(cls, values: Any) -> Any:
        for name in DECIDED.keys() - cls.model_fields.keys():
            if name in values:
                raise decided(name)
        return values

    @check
    def _counts(self) -> None:
        if self.part is not None:
            _ = self.share
        for part in self.fractions:
            if not 0 < part <= 1:
                raise EdgekdError(
                    f"{part:g} is not a fraction of the labels.",
                    "Give numbers above 0 and up to 1: 0.01,0.1,1.",
                )
        for counts, least, hint in (
            (self.adapt_images, 0, "Give whole numbers: 25,100,400."),
            (self.shots, 1, "Give whole numbers from 1: 1,4,16."),
        ):
            for count in counts:
                if count < least or count != int(count):
                    raise EdgekdError(f"{count:g} is not a number of images.", hint)

    @check
    def _protocol(self) -> None:
        for name, protocols in _BELONGS.items():
            if getattr(self, name) and self.protocol not in protocols:
                raise EdgekdError(
                    f"The protocol {self.protocol} takes no {name}.",
                    f"Use --protocol {' or '.join(protocols)}, or leave it out.",
                )

    @property
    def share(self) -> tuple[int, int]:
        """Return `part` as two numbers; (1, 1) is the whole study."""
        words = (self.part or "1/1").split("/")
        if len(words) == 2 and all(word.isascii() and word.isdigit() for word in words):
            number, parts = map(int, words)
            if 1 <= number <= parts:
                return number, parts
        raise EdgekdError(f"{self.part} is not a part of a study.", "Count from 1: --part 3/8.")

    @property
    def by_class(self) -> bool:
        """Return whether classes are unseen rather than domains."""
        return self.protocol in ("class-disjoint", "k-shot")

    @property
    def folder(self) -> Path:
        """Return `out` or its default, which is the same for the same options, so that the study is resumed."""
        return self.out or Path("studies") / f"{self.protocol}-{Path(self.data).stem}"

    def train_config(self, settings: Sequence[str]) -> TrainConfig:
        """Return the configuration of a run, with the `a.b=c` settings of one recipe."""
        given = self.model_dump(include=set(RunOptions.model_fields), exclude_unset=True)
        return TrainConfig.load(**given, settings=settings)

    @classmethod
    def from_file(cls, values: dict[str, Any], path: Path) -> dict[str, Any]:
        """Return the settings of `edgekd train` in the file, and the table [study]."""
        own = super().from_file({cls.verb(): values.pop(cls.verb(), {})}, path)
        settings = own.get("recipe_settings", [])
        for setting in settings if isinstance(settings, list) else (settings,):
            table: dict[str, Any] = {}
            put(table, str(setting).partition(":")[2])
            refuse_command(table, path)
        return TrainConfig.from_file(values, path) | own


def decided(name: str) -> EdgekdError:
    """Return the error for a setting of a run that a study sets itself."""
    return EdgekdError(f"A study sets {name} itself.", f"Leave it out; use {DECIDED[name]}.")
