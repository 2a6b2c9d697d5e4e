"""Device profiles: export and measurement settings for devices, with a source for every claim."""

from __future__ import annotations

from collections.abc import Collection
from datetime import date
from pathlib import Path
from typing import Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from edgekd.core.console import say
from edgekd.core.errors import EdgekdError, check_known
from edgekd.core.formats import MOST_THREADS
from edgekd.core.manifest import AnyPrecision, Input, first_problem
from edgekd.core.readers import read_toml

FOLDER = Path(__file__).parent
Claim = Literal[
    "runtime", "precisions", "threads", "compute_capability", "deployment_target", "input"
]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Source(_Frozen):
    """A public page."""

    title: str = Field(min_length=1)
    url: str = Field(pattern=r"^https://\S+$")
    checked: date | None = None
    """Date on which all claims with this source were found on the page; None if it was not checked."""

    @property
    def named(self) -> str:
        """Return the address, and whether it was checked."""
        return self.url if self.checked else f"{self.url}, not checked"


class Caution(_Frozen):
    """A caution for measurements on the device."""

    text: str = Field(min_length=1)
    source: str


class Profile(_Frozen):
    """One class of devices. `because` names the source of each field that states a fact."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    summary: str
    runtime: str
    """Runtime of the artifact on the device."""
    precisions: tuple[AnyPrecision, ...] = Field(min_length=1)
    """Recommended precisions, best first; others may be slow."""
    input: Input | None = None
    """Input of the file; None is the default, `uint8`."""
    threads: int | None = Field(default=None, ge=1, le=MOST_THREADS)
    """Threads to measure with; None is the runtime's choice."""
    compute_capability: str | None = Field(default=None, pattern=r"^\d+\.\d$")
    deployment_target: str | None = Field(default=None, pattern=r"^(iOS|macOS)\d+$")
    """Minimum system of Core ML models for the device."""
    cautions: tuple[Caution, ...] = ()
    because: dict[Claim, str]
    sources: dict[str, Source]

    @model_validator(mode="after")
    def _everything_has_a_source(self) -> Profile:
        for name in get_args(Claim):
            if getattr(self, name) is not None and name not in self.because:
                raise ValueError(f"{name} has no source: name one under [because]")
        for name in (*self.because.values(), *(caution.source for caution in self.cautions)):
            if name not in self.sources:
                raise ValueError(f'there is no source "{name}" under [sources]')
        return self


Settings = TypeVar("Settings", bound=BaseModel)


def follow_profile(config: Settings, names: Collection[str], *, cautions: bool = False) -> Settings:
    """Return a configuration with its `profile`'s values of those settings `names` that were not given; report both.

    Args:
        config: any with a field `profile`, a name or file; None leaves it as it is.
        cautions: report what a measurement there must mind, too.
    """
    spec = getattr(config, "profile", None)
    if spec is None:
        return config
    profile = load_profile(spec)
    names = sorted({*names} & {*Profile.model_fields})
    claims = {name: claim for name in names if (claim := getattr(profile, name)) is not None}
    used = {name: claim for name, claim in claims.items() if getattr(config, name) is None}
    because = {str(name): profile.sources[source].named for name, source in profile.because.items()}
    for name, claim in used.items():
        say(f"{profile.name}: {name.replace('_', ' ')} {claim} ({because[name]})")
    if not claims:
        what = " or ".join(name.replace("_", " ") for name in names)
        say(f"{profile.name}: sets no {what}; the device runs {profile.runtime}")
    for caution in profile.cautions if cautions else ():
        say(f"{profile.name}: {caution.text} ({profile.sources[caution.source].named})")
    return config.model_copy(update=used)


def profile_names() -> list[str]:
    """Return the names of the profiles that come with edgekd."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load_profile(spec: str | Path) -> Profile:
    """Load the profile of this name, or in this TOML file; a claim without a source is an `EdgekdError`."""
    path = Path(spec)
    if path.suffix != ".toml":
        path = FOLDER / f"{spec}.toml"
        check_known(str(spec), profile_names(), f'There is no profile "{spec}".')
    try:
        return Profile.model_validate(
            read_toml(path, "profile", "Name a profile, or a .toml file like those that ship.")
        )
    except ValidationError as error:
        raise EdgekdError(
            f"{path} is not a profile: {first_problem(error)}.", "docs/devices.md shows one."
        ) from error
