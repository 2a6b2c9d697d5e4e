"""From class names to a text bank (prompts, templates, descriptions), and the text files that a run may be given."""

from __future__ import annotations

import csv
import math
import shlex
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from edgekd.core.console import warn
from edgekd.core.errors import EdgekdError, did_you_mean
from edgekd.core.files import write_json
from edgekd.core.readers import parse_json, printable, read_text
from edgekd.core.tensors import read_tensors, write_tensors

TEMPLATE_SETS = ("photo", "imagenet7", "imagenet80", "domain")
INDISTINCT = 0.999
"""Cosine of two class vectors from which on the classes cannot be distinguished."""
QUESTION = "Use a single sentence to describe the appearance and shape of {}. Only describe the shape and appearance."
"""The prompt to the paper's language model (Li et al., ICCV 2023); a `command:` gets it with the class name."""
DESCRIPTIONS_FILE = "descriptions.json"
"""In a run's folder."""
COMMAND_SECONDS = 120

Descriptions = Mapping[str, tuple[str, ...]]
"""Class name → its sentences, each appended to the class's prompts (label enrichment; Li et al., ICCV 2023)."""


@dataclass(frozen=True)
class TextBank:
    """One unit vector per class in the teacher's space."""

    classes: tuple[str, ...]
    templates: tuple[str, ...]
    vectors: Tensor
    """float32 `[classes, D]`, rows of length 1."""
    teacher_id: str
    logit_scale: float
    """The teacher's factor on cosines (100 for OpenAI's CLIP): `softmax(logit_scale · cos)` is its prediction."""
    image_centre: Tensor | None = None
    """float32 `[D]`, mean of the teacher's unit embeddings of the training images; None: not mean-centred."""
    text_centre: Tensor | None = None
    """float32 `[D]`, mean of `vectors` at training time, kept so that a class can be added later."""
    described: bool = False
    """Whether the prompts end in descriptions of the classes."""

    @property
    def head(self) -> Tensor:
        """Vectors that the student's embedding is compared with, float32 `[classes, D]`, rows of length 1."""
        if self.text_centre is None:
            return self.vectors
        return normalize(self.vectors - self.text_centre, dim=-1)

    def image_target(self, embeddings: Tensor) -> Tensor:
        """Return the teacher's embeddings `[B, D]` as the student is to match them: mean-centred, if the bank is."""
        if self.image_centre is None:
            return embeddings
        centre = self.image_centre.to(embeddings.device)
        return normalize(normalize(embeddings, dim=-1) - centre, dim=-1)

    def zero_shot(self, embeddings: Tensor) -> Tensor:
        """Return the teacher's own logits `logit_scale · cos(t, T)` for its embeddings `[B, D]`, float `[B, C]`."""
        vectors = self.vectors.to(embeddings.device)
        return self.logit_scale * normalize(embeddings, dim=-1) @ vectors.T

    def write(self, path: Path) -> None:
        """Save as safetensors; text fields are in the header."""
        names = ("classes", "templates", "teacher_id", "logit_scale", "described")
        tensors = {name: getattr(self, name) for name in ("vectors", "image_centre", "text_centre")}
        present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        write_tensors(path, present, {name: getattr(self, name) for name in names})


def read_text_bank(path: Path) -> TextBank:
    """Load a bank written by `TextBank.write`.

    Raises:
        EdgekdError: missing, damaged, or arrays that do not fit together.
    """
    hint = "Train the run again with --overwrite."
    tensors, facts = read_tensors(path, "text bank", hint)

    def texts(value: str | list[str]) -> tuple[str, ...]:  # lines in files of edgekd 0.1
        return tuple(map(printable, value.split("\n") if isinstance(value, str) else value))

    try:
        bank = TextBank(
            classes=texts(facts["classes"]),
            templates=texts(facts["templates"]),
            vectors=tensors.pop("vectors"),
            teacher_id=printable(facts["teacher_id"]),
            logit_scale=float(facts["logit_scale"]),
            described=facts.get("described") in (True, "1"),
            **tensors,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise EdgekdError(f"The text bank at {path} is damaged.", hint) from error
    rows, dim = (*bank.vectors.shape, 0, 0)[:2]
    centres = [centre for centre in (bank.image_centre, bank.text_centre) if centre is not None]
    templates = [template for template in bank.templates if template != "precomputed"]
    if (
        not math.isfinite(bank.logit_scale)
        or bank.vectors.shape != (len(bank.classes), dim)
        or any(centre.shape != (dim,) for centre in centres)
        or any(t.dtype != torch.float32 or not t.isfinite().all() for t in (bank.vectors, *centres))
        or any(template.count("{}") != 1 for template in templates)
    ):
        raise EdgekdError(f"The text bank at {path} is damaged: its {rows} rows do not fit.", hint)
    return bank


def readable(name: str) -> str:
    """Return a folder name as words: `dining_table` → `dining table`."""
    return name.replace("_", " ").strip()


def templates_for(choice: str, domains: Sequence[str] = ()) -> tuple[str, ...]:
    """Return prompt templates with one `{}` for the class name.

    Args:
        choice: `photo` ("a photo of a {}"), `imagenet7` and `imagenet80` (CLIP's published ensembles), `domain`
            ("a {domain} of a {}" over the *source* domains, as VL2V's E2 and RISE), or a text file with a template
            per line.
        domains: names of the source domains; the unseen domain must not be among them.
    """
    if choice == "photo":
        return ("a photo of a {}",)
    if choice in ("imagenet7", "imagenet80"):
        from open_clip import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES

        few = choice == "imagenet7"
        published = SIMPLE_IMAGENET_TEMPLATES if few else OPENAI_IMAGENET_TEMPLATES
        return tuple(template("{}") for template in published)
    if choice == "domain":
        if not domains or tuple(domains) == ("all",):
            raise EdgekdError(
                "The domain templates need images sorted by domain, and these are not.",
                "Use --prompts photo, or a domain/class/image folder.",
            )
        return tuple(f"a {readable(domain)} of a {{}}" for domain in domains)
    path = Path(choice)
    if not path.is_file():
        raise EdgekdError(
            f'There is no template set or file "{choice}".', did_you_mean(choice, TEMPLATE_SETS)
        )
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    templates = tuple(line.strip() for line in lines if line.strip())
    if not templates or any(template.count("{}") != 1 for template in templates):
        raise EdgekdError(
            f"{path} is not a list of templates.",
            "Write one per line, each with one {} for the class.",
        )
    return templates


def prompts_of(name: str, templates: Sequence[str], descriptions: Sequence[str] = ()) -> list[str]:
    """Return all prompts of a class: every template, with every description appended ("a photo of X . …")."""
    plain = [template.replace("{}", readable(name)) for template in templates]
    if not descriptions:
        return plain
    return [f"{prompt} . {sentence}" for prompt in plain for sentence in descriptions]


def ensemble(vectors: Tensor) -> Tensor:
    """Average prompts as CLIP does: normalise each, mean, normalise again. `[T, C, D]` → float32 `[C, D]`."""
    return normalize(normalize(vectors.float(), dim=-1).mean(dim=0), dim=-1)


def warn_of_indistinct_classes(bank: TextBank) -> None:
    """Warn in one line of classes whose text vectors are (nearly) equal: one of each pair is never predicted."""
    cosines = (bank.vectors @ bank.vectors.T).triu(diagonal=1)  # [C, C]
    pairs = (cosines >= INDISTINCT).nonzero().tolist()
    if pairs:
        named = [f'"{bank.classes[a]}" and "{bank.classes[b]}"' for a, b in pairs]
        more = f", and {len(named) - 5} more pairs" if len(named) > 5 else ""
        warn(
            f"the teacher reads these classes alike (text cosine from {INDISTINCT} on), so one of each pair can hardly "
            f"win: {'; '.join(named[:5])}{more}. Bring them together, or name them apart in classes.txt."
        )


def warn_of_long_prompts(
    tokenizer: Any, classes: Sequence[str], prompts: Sequence[Sequence[str]]
) -> None:
    """Warn in one line of prompts `prompts[i]` of class `classes[i]` that the tokenizer truncates."""
    context = getattr(tokenizer, "context_length", None)
    if not context:
        return
    counts = [max(_token_count(tokenizer, prompt, context) for prompt in own) for own in prompts]
    cut = [(name, n) for name, n in zip(classes, counts, strict=True) if n > context]
    if cut:
        warn(
            f'the prompts of {len(cut)} of {len(classes)} classes are longer than the teacher reads: "{cut[0][0]}" has '
            f"{cut[0][1]} tokens, {context} fit; the rest is cut off."
        )


def _token_count(tokenizer: Any, prompt: str, context: int) -> int:
    """Tokens of a prompt with begin and end, before truncation; 0 if it is short or cannot be counted."""
    if len(prompt.encode()) + 2 <= context:  # a token is a byte at least
        return 0
    if hasattr(tokenizer, "encode"):
        return len(tokenizer.encode(prompt)) + 2
    inner = getattr(tokenizer, "tokenizer", None)
    return len(inner(prompt)["input_ids"]) if callable(inner) else 0


def descriptions_for(spec: str, classes: Sequence[str]) -> Descriptions:
    """Return sentences for every class.

    Args:
        spec: a `.json` file (class → sentence, or a list of them), a text file (`class: sentence` per line), or
            `command:PROGRAM ARGUMENTS`, run once per class with `QUESTION` as its last argument; its output counts.
        classes: the classes that need them; others in the file are ignored.
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
            f"{hint} Every class needs one.",
        )
    return {name: known[readable(name)] for name in classes}


def stored_descriptions(
    path: Path | None, spec: str, classes: Sequence[str], *, may_run: bool
) -> Descriptions:
    """Return sentences for every class: those written down before, and for the others those of `spec`.

    A language model answers differently every time, so training and prediction agree only if its output is read back.

    Args:
        path: the file of a run or a study, which need not exist.
        spec: as `descriptions_for`.
        may_run: `spec` was given by the caller of this very process. A command that was read from a file never runs.
    """
    stored = {}
    if path is not None and path.exists():
        stored = {readable(name): sentences for name, sentences in _read_descriptions(path)}
    missing = [name for name in classes if not stored.get(readable(name))]
    if missing and spec.startswith("command:") and not may_run:
        raise EdgekdError(
            f'There is no stored description of "{missing[0]}", and the command that a run has stored is not run.',
            f"Restore the run's {DESCRIPTIONS_FILE}, or give descriptions on the command line.",
        )
    new = descriptions_for(spec, missing) if missing else {}
    return {name: new[name] if name in new else stored[readable(name)] for name in classes}


def write_descriptions(
    path: Path, classes: Iterable[str], describe: Callable[[str], str | Sequence[str]]
) -> None:
    """Call any function for every class's sentences and write them as a file that `descriptions` reads."""
    answers = {name: describe(name) for name in classes}
    write_json(path, {n: a if isinstance(a, str) else list(a) for n, a in answers.items()})


def _run_command(command: str, name: str) -> str:
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
    """Entries of a JSON object, a name that comes twice among them twice; none of anything else."""
    try:
        loaded = parse_json(text, pairs=True)
    except ValueError as error:
        raise EdgekdError(f"{path} is not valid JSON ({error}).", f"Write {what}.") from error
    return [e for e in loaded if isinstance(e, tuple)] if isinstance(loaded, list) else []


def read_vocabulary(path: Path) -> tuple[str, ...]:
    """Read names to distil for, one per line; empty lines and lines that begin with # are left out.

    Raises:
        EdgekdError: unreadable, fewer than two names, a name twice (after `_` → space, without case).
    """
    text = read_text(path, "vocabulary", "Check --vocabulary.")
    lines = [printable(line.strip()) for line in text.splitlines()]
    names = tuple(line for line in lines if line and not line.startswith("#"))
    counts = Counter(readable(name).lower() for name in names)
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        raise EdgekdError(
            f"The vocabulary {path} has the same name more than once: {', '.join(twice[:8])}.",
            "Two equal rows would share their images; keep one.",
        )
    if len(names) < 2:
        raise EdgekdError(f"The vocabulary {path} has fewer than two names.", "Write one per line.")
    return names


def read_captions(path: Path, ids: Sequence[str]) -> list[str]:
    """Return the caption of each image of `ids`, from a JSON object (id → caption) or a CSV (image, caption).

    Raises:
        EdgekdError: unreadable, an image without a caption or with two.
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
                    f"{path} lacks a column image or caption.",
                    "Its first line must be: image,caption.",
                )
            pairs = [(row["image"], row["caption"]) for row in rows]
        except csv.Error as error:
            raise EdgekdError(
                f"{path} is not readable CSV ({error}).", "Write lines of image,caption."
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
