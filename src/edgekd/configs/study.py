"""`edgekd study`."""

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
"""Settings of a run that a study decides, and what to give instead."""


class StudyOptions(Config):
    """What a study compares, and on what."""

    recipes: Words = option(default=("erm", "kd", "edgekd"), kw_only=False, flag="--recipes")
    """Recipes to compare, with commas; NAME=RECIPE renames one. See edgekd list recipes."""
    protocol: Literal["lodo", "class-disjoint", "k-shot", "low-shot", "adapt"] = "lodo"
    """lodo (unseen domains), adapt (unlabelled images of them), class-disjoint (classes), k-shot (a few images of such
    classes) or low-shot (labels)."""
    seeds: int = option(default=3, ge=1)
    """How many seeds, from 0."""
    test_domains: Words = option(default=())
    """Domains to leave out in turn, with commas. Default: all; low-shot: the last."""
    unseen_classes: Words = option(default=())
    """class-disjoint, k-shot: classes with commas, or a part such as 30%. Default: 50%."""
    fractions: Numbers = option(default=())
    """low-shot: parts of the training labels. Default: 0.01,0.1,1."""
    shots: Numbers = option(default=())
    """k-shot: images of each unseen class. Default: 1,4,16."""
    adapt_images: Numbers = option(default=())
    """adapt: images of the new domain that train without labels. Default: 25,50,100,200,400."""
    baseline: str | None = None
    """Recipe that the others are compared with. Default: erm, or the first."""
    oracle: bool = False
    """lodo, low-shot: beside each result the best step's, chosen on the unseen images."""
    jobs: int = option(default=1, ge=1)
    """Cells side by side, in processes that share cores and GPUs."""
    part: str | None = option(default=None)
    """i/n: run the i-th of n parts of the cells, for a scheduler's job array; the whole study makes the tables."""
    keep: bool = False
    """Keep the run folders of finished cells."""
    out: OptionalPath = option(default=None)
    """Study folder; one that stopped goes on. Default: studies/PROTOCOL-DATA."""
    recipe_settings: Items = option(default=(), flag="--recipe-set", group="Settings")
    """Setting of one recipe as RECIPE:name=value or RECIPE:a.b=value; may be repeated."""


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
    """A comparison of recipes; what a single run can be given holds for every recipe."""

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
                    f"{part:g} is not a part of the labels.",
                    "Give numbers above 0, up to 1: 0.01,0.1,1.",
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
        """`part` as numbers; (1, 1) is everything."""
        words = (self.part or "1/1").split("/")
        if len(words) == 2 and all(word.isascii() and word.isdigit() for word in words):
            number, parts = map(int, words)
            if 1 <= number <= parts:
                return number, parts
        raise EdgekdError(f"{self.part} is no part of a study.", "Count from 1: --part 3/8.")

    @property
    def by_class(self) -> bool:
        """Whether classes are unseen, and not domains."""
        return self.protocol in ("class-disjoint", "k-shot")

    @property
    def folder(self) -> Path:
        """`out`; None: the same folder for the same words, so that the study goes on there."""
        return self.out or Path("studies") / f"{self.protocol}-{Path(self.data).stem}"

    def train_config(self, settings: Sequence[str]) -> TrainConfig:
        """Return what was given for every run, with the `a.b=c` strings of one recipe."""
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
    """Return the error for a setting of a run that a study decides."""
    return EdgekdError(
        f"A study decides {name} itself, and it is set.", f"Take it out; give {DECIDED[name]}."
    )
