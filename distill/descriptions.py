"""Label enrichment: a sentence or more about each class, appended to its prompts (Li et al., ICCV 2023).

The sentences come from a file, from a command that is run once per class, or from any Python function, a language model
for example. They are written into the folder of the run, or of the study, whose runs share them, so training, inference
and a resumed run use the same ones.
"""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgekd.core.errors import EdgekdError, did_you_mean
from edgekd.core.files import write_json
from edgekd.core.readers import parse_json, printable, read_text
from edgekd.distill.prompts import readable

QUESTION = "Use a single sentence to describe the appearance and shape of {}. Only describe the shape and appearance."
"""What the paper asked its language model; a `command:` gets it with the class name filled in."""

Descriptions = Mapping[str, tuple[str, ...]]
"""Class name → its sentences."""

DESCRIPTIONS_FILE = "descriptions.json"
"""In a run's folder."""

COMMAND_SECONDS = 120


def descriptions_for(spec: str, classes: Sequence[str]) -> Descriptions:
    """Sentences for every class.

    Args:
        spec: a `.json` file (class → sentence, or a list of them), a text file (`class: sentence` per line), or
            `command:PROGRAM ARGUMENTS`, run once per class with `QUESTION` as its last argument; what it prints counts.
        classes: the classes that need them; others in the file are left alone.

    Raises:
        EdgekdError: unreadable file, a class missing or named twice, a command that fails or prints nothing.
    """
    if spec.startswith("command:"):
        return {name: (_ask(spec.removeprefix("command:"), name),) for name in classes}
    path = Path(spec)
    pairs = _pairs(path)
    known: dict[str, tuple[str, ...]] = {}
    for name, sentences in pairs:
        if readable(name) in known:
            raise EdgekdError(
                f'{path} describes the class "{name}" twice.', "Keep one entry per class."
            )
        known[readable(name)] = sentences
    missing = [name for name in classes if not known.get(readable(name))]
    if missing:
        first = readable(missing[0])
        hint = (
            f'What it says about "{first}" is empty.'
            if first in known
            else did_you_mean(first, known)
        )
        raise EdgekdError(
            f"{path} has no description of {len(missing)} of {len(classes)} classes: {', '.join(missing[:8])}.",
            f"{hint} Every class needs one.",
        )
    return {name: known[readable(name)] for name in classes}


def kept_descriptions(
    path: Path | None, spec: str, classes: Sequence[str], *, may_run: bool
) -> Descriptions:
    """Sentences for every class: those that were written down before, and for the others what `spec` says.

    A language model answers otherwise every time, so what trained is what predicts only if it is read back.

    Args:
        path: a file as a run or a study leaves it; it need not be there.
        spec: as `descriptions_for`.
        may_run: `spec` was given by the caller of this very process. A command that was read from a file never runs.

    Raises:
        EdgekdError: as `descriptions_for`, or a class that only a stored command could describe.
    """
    kept = (
        {readable(name): told for name, told in _pairs(path)}
        if path is not None and path.exists()
        else {}
    )
    missing = [name for name in classes if not kept.get(readable(name))]
    if missing and spec.startswith("command:") and not may_run:
        raise EdgekdError(
            f'There is no kept description of "{missing[0]}", and the command that a run has stored is not run.',
            f"Restore the run's {DESCRIPTIONS_FILE}, or give descriptions on the command line.",
        )
    asked = descriptions_for(spec, missing) if missing else {}
    return {name: asked[name] if name in asked else kept[readable(name)] for name in classes}


def write_descriptions(
    path: Path, classes: Iterable[str], describe: Callable[[str], str | Sequence[str]]
) -> None:
    """Ask any function for every class's sentences and write them as a file that `descriptions` takes."""
    answers = {name: describe(name) for name in classes}
    write_json(
        path,
        {
            name: answer if isinstance(answer, str) else list(answer)
            for name, answer in answers.items()
        },
    )


def _ask(command: str, name: str) -> str:
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise EdgekdError(
            f"The description command cannot be read ({str(error).lower()}): {command}",
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
            "It gets the question as its last argument and must print one sentence.",
        )
    return answer


def _pairs(path: Path) -> list[tuple[str, tuple[str, ...]]]:
    text = read_text(path, "descriptions file", "Give a .json or text file, or command:PROGRAM.")
    if path.suffix.lower() != ".json":
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        broken = next(
            (line for line in lines if not all(part.strip() for part in line.partition(":"))), None
        )
        if broken is not None:
            raise EdgekdError(
                f'{path} has a line that describes nothing: "{printable(broken[:80])}".',
                "Write class: sentence.",
            )
        return [
            (name.strip(), (sentence.strip(),))
            for name, _, sentence in (line.partition(":") for line in lines)
        ]
    try:
        # As pairs, because a JSON object with a name twice would silently keep the last.
        loaded: Any = parse_json(text, pairs=True)
    except ValueError as error:
        raise EdgekdError(
            f"{path} is not valid JSON ({error}).", "Write class names mapped to sentences."
        ) from error
    entries = loaded if isinstance(loaded, list) else []
    pairs = [
        (e[0], (e[1],) if isinstance(e[1], str) else e[1]) for e in entries if isinstance(e, tuple)
    ]
    if not pairs or not all(
        isinstance(s, (list, tuple)) and all(isinstance(t, str) for t in s) for _, s in pairs
    ):
        raise EdgekdError(
            f"{path} does not map class names to sentences.",
            'Write {"dog": "A dog has four legs ...", ...}.',
        )
    return [(name, tuple(t.strip() for t in sentences if t.strip())) for name, sentences in pairs]
