"""Readers of text files: descriptions of classes, vocabularies, captions."""

from __future__ import annotations

import csv
import shlex
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgekd.core.errors import EdgekdError, did_you_mean
from edgekd.core.files import write_json
from edgekd.core.readers import parse_json, printable, read_text
from edgekd.distill.text_bank import readable

QUESTION = "Use a single sentence to describe the appearance and shape of {}. Only describe the shape and appearance."
"""Prompt for the language model in the paper (Li et al., ICCV 2023), passed to a `command:` with the class name."""
DESCRIPTIONS_FILE = "descriptions.json"
"""File in a run folder."""
COMMAND_SECONDS = 120
Descriptions = Mapping[str, tuple[str, ...]]
"""Class name → its sentences, each appended to the class's prompts (label enrichment; Li et al., ICCV 2023)."""


def descriptions_for(spec: str, classes: Sequence[str]) -> Descriptions:
    """Return sentences for every class.

    Args:
        spec: a `.json` file (class → sentence, or a list of them), a text file (`class: sentence` per line), or
            `command:PROGRAM ARGUMENTS`, run once per class with `QUESTION` as its last argument.
        classes: the classes to describe; others in the file are ignored.
    """
    if spec.startswith("command:"):
        return {name: (_run_command(spec.removeprefix("command:"), name),) for name in classes}
    path = Path(spec)
    known: dict[str, tuple[str, ...]] = {}
    for name, sentences in _read_descriptions(path):
        if readable(name) in known:
            raise EdgekdError(
                f'{path} describes the class "{name}" twice.', "Keep one entry per class."
            )
        known[readable(name)] = sentences
    missing = [name for name in classes if not known.get(readable(name))]
    if missing:
        first = readable(missing[0])
        hint = f'The entry of "{first}" is empty.' if first in known else did_you_mean(first, known)
        raise EdgekdError(
            f"{path} has no description of {len(missing)} of {len(classes)} classes: {', '.join(missing[:8])}.",
            f"{hint} Every class needs a description.",
        )
    return {name: known[readable(name)] for name in classes}


def stored_descriptions(
    path: Path | None, spec: str, classes: Sequence[str], *, may_run: bool
) -> Descriptions:
    """Return sentences for every class: those in the file `path`, if it exists, and for the others those of `spec`.

    A language model answers differently every time, so training and prediction agree only if its output is read back. A
    command runs only if `may_run`: it was given to this very process, and not read from a file.
    """
    stored = {}
    if path is not None and path.exists():
        stored = {readable(name): sentences for name, sentences in _read_descriptions(path)}
    missing = [name for name in classes if not stored.get(readable(name))]
    if missing and spec.startswith("command:") and not may_run:
        raise EdgekdError(
            f'There is no stored description of "{missing[0]}", and a command from a run is never executed.',
            f"Restore the run's {DESCRIPTIONS_FILE}, or give descriptions on the command line.",
        )
    new = descriptions_for(spec, missing) if missing else {}
    return {name: new[name] if name in new else stored[readable(name)] for name in classes}


def write_descriptions(
    path: Path, classes: Iterable[str], describe: Callable[[str], str | Sequence[str]]
) -> None:
    """Write a descriptions file with the sentences that a function returns for each class."""
    answers = {name: describe(name) for name in classes}
    write_json(path, {n: a if isinstance(a, str) else list(a) for n, a in answers.items()})


def _run_command(command: str, name: str) -> str:
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise EdgekdError(
            f"The description command cannot be parsed ({str(error).lower()}): {command}",
            "Quote it as in a shell.",
        ) from error
    if not words:
        raise EdgekdError("The description command is empty.", "Write command:PROGRAM ARGUMENTS.")
    words.append(QUESTION.format(readable(name)))
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, check=False, timeout=COMMAND_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EdgekdError(
            f'The description command failed for the class "{name}" ({error}).',
            "Try it in a shell first.",
        ) from error
    answer = " ".join(done.stdout.split())
    if done.returncode or not answer:
        reason = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        raise EdgekdError(
            f'The description command failed for the class "{name}" (exit code {done.returncode}: {reason[:160]}).',
            "The command gets the question as its last argument and must print one sentence.",
        )
    return answer


def _read_descriptions(path: Path) -> list[tuple[str, tuple[str, ...]]]:
    text = read_text(path, "descriptions file", "Give a .json or text file, or command:PROGRAM.")
    if path.suffix.lower() != ".json":
        found: list[tuple[str, tuple[str, ...]]] = []
        for line in filter(None, map(str.strip, text.splitlines())):
            name, _, sentence = map(str.strip, line.partition(":"))
            if not name or not sentence:
                raise EdgekdError(
                    f'{path} has a line without a description: "{printable(line[:80])}".',
                    "Write class: sentence.",
                )
            found.append((name, (sentence,)))
        return found
    pairs = [
        (name, (sentences,) if isinstance(sentences, str) else sentences)
        for name, sentences in _json_pairs(path, text, "class names mapped to sentences")
    ]
    if not pairs or not all(
        isinstance(s, (list, tuple)) and all(isinstance(t, str) for t in s) for _, s in pairs
    ):
        raise EdgekdError(
            f"{path} does not map class names to sentences.",
            'Write {"dog": "A dog has four legs ...", ...}.',
        )
    return [(name, tuple(t.strip() for t in sentences if t.strip())) for name, sentences in pairs]


def _json_pairs(path: Path, text: str, what: str) -> list[tuple[str, Any]]:
    """Return the entries of a JSON object, including duplicate names; empty for any other value."""
    try:
        loaded = parse_json(text, pairs=True)
    except ValueError as error:
        raise EdgekdError(f"{path} is not valid JSON ({error}).", f"Write {what}.") from error
    return [e for e in loaded if isinstance(e, tuple)] if isinstance(loaded, list) else []


def read_vocabulary(path: Path) -> tuple[str, ...]:
    """Read names to distil for, one per line; empty lines and lines that start with # are skipped.

    Fewer than two names, and a name twice (after `_` → space, without case), are an `EdgekdError`.
    """
    text = read_text(path, "vocabulary", "Check --vocabulary.")
    lines = [printable(line.strip()) for line in text.splitlines()]
    names = tuple(line for line in lines if line and not line.startswith("#"))
    counts = Counter(readable(name).lower() for name in names)
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        raise EdgekdError(
            f"The vocabulary {path} has the same name more than once: {', '.join(twice[:8])}.",
            "Keep one of them.",
        )
    if len(names) < 2:
        raise EdgekdError(f"The vocabulary {path} has fewer than two names.", "Write one per line.")
    return names


def read_captions(path: Path, ids: Sequence[str]) -> list[str]:
    """Return the caption of each image of `ids`, from a JSON object (id → caption) or a CSV (image, caption).

    An image without a caption, or with two, is an `EdgekdError`.
    """
    text = read_text(path, "captions file", "Check --captions.")
    pairs: list[tuple[Any, Any]]
    if path.suffix.lower() == ".json":
        pairs = _json_pairs(path, text, "image ids mapped to captions")
    else:
        rows = csv.DictReader(text.splitlines())
        try:
            if not {"image", "caption"} <= set(rows.fieldnames or ()):
                raise EdgekdError(
                    f"{path} has no column image or caption.",
                    "Its first line must be: image,caption.",
                )
            pairs = [(row["image"], row["caption"]) for row in rows]
        except csv.Error as error:
            raise EdgekdError(
                f"{path} is not valid CSV ({error}).", "Write lines of image,caption."
            ) from error
    found: dict[str, str] = {}
    for name, caption in pairs:
        if name in found:
            raise EdgekdError(f"{path} has two captions for {name}.", "Keep one.")
        if isinstance(caption, str) and caption.strip():
            found[name] = caption.strip()
    missing = [name for name in ids if name not in found]
    if missing:
        raise EdgekdError(
            f"{path} has no caption for {len(missing):,} of {len(ids):,} training images, for example {missing[0]}.",
            "Images are named by their path inside the data folder, with forward slashes.",
        )
    return [found[name] for name in ids]
