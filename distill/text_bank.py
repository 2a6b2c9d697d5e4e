"""The text bank of a teacher: prompt templates, descriptions, and one unit vector per class."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from edgekd.core.console import warn
from edgekd.core.errors import EdgekdError, did_you_mean
from edgekd.core.readers import printable
from edgekd.core.tensors import read_tensors, write_tensors

TEMPLATE_SETS = ("photo", "imagenet7", "imagenet80", "domain")
INDISTINCT = 0.999
"""Cosine of two class vectors above which the classes cannot be distinguished."""


@dataclass(frozen=True)
class TextBank:
    """One unit vector per class in the teacher's space."""

    classes: tuple[str, ...]
    templates: tuple[str, ...]
    vectors: Tensor
    """float32 `[classes, D]`, rows of length 1."""
    teacher_id: str
    logit_scale: float
    """The teacher's factor on cosines (100 for OpenAI's CLIP); its prediction is `softmax(logit_scale · cos)`."""
    image_centre: Tensor | None = None
    """float32 `[D]`, mean of the teacher's unit embeddings of the training images; None without mean-centring."""
    text_centre: Tensor | None = None
    """float32 `[D]`, mean of `vectors` at training time, kept so that a class can be added later."""
    described: bool = False
    """Whether the prompts end in descriptions of the classes."""

    @property
    def head(self) -> Tensor:
        """Return the class vectors for the student's embedding, float32 `[classes, D]`, rows of length 1."""
        if self.text_centre is None:
            return self.vectors
        return normalize(self.vectors - self.text_centre, dim=-1)

    def image_target(self, embeddings: Tensor) -> Tensor:
        """Return the student's targets for the teacher's embeddings `[B, D]`, mean-centred if the bank is."""
        if self.image_centre is None:
            return embeddings
        centre = self.image_centre.to(embeddings.device)
        return normalize(normalize(embeddings, dim=-1) - centre, dim=-1)

    def zero_shot(self, embeddings: Tensor) -> Tensor:
        """Return the teacher's logits `logit_scale · cos(t, T)` for its embeddings `[B, D]`, float `[B, C]`."""
        vectors = self.vectors.to(embeddings.device)
        return self.logit_scale * normalize(embeddings, dim=-1) @ vectors.T

    def write(self, path: Path) -> None:
        """Save as safetensors, with text fields in the header."""
        names = ("classes", "templates", "teacher_id", "logit_scale", "described")
        tensors = {name: getattr(self, name) for name in ("vectors", "image_centre", "text_centre")}
        present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        write_tensors(path, present, {name: getattr(self, name) for name in names})


def read_text_bank(path: Path) -> TextBank:
    """Load a bank written by `TextBank.write`; a missing or damaged one is an `EdgekdError`."""
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
        raise EdgekdError(
            f"The text bank at {path} is damaged: its {rows} rows do not match.", hint
        )
    return bank


def readable(name: str) -> str:
    """Return a folder name as words: `dining_table` → `dining table`."""
    return name.replace("_", " ").strip()


def templates_for(choice: str, domains: Sequence[str] = ()) -> tuple[str, ...]:
    """Return prompt templates with one `{}` for the class name.

    Args:
        choice: `photo` ("a photo of a {}"), `imagenet7` and `imagenet80` (CLIP's published ensembles), `domain`
            ("a {domain} of a {}" over the *source* domains, as in VL2V's E2 and RISE), or a text file with one
            template per line.
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
                "The domain templates need images sorted by domain.",
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
    """Average prompts as in CLIP: normalise, mean, normalise. `[T, C, D]` → float32 `[C, D]`."""
    return normalize(normalize(vectors.float(), dim=-1).mean(dim=0), dim=-1)


def warn_of_indistinct_classes(bank: TextBank) -> None:
    """Warn of classes with (nearly) equal text vectors, of which one is never predicted."""
    cosines = (bank.vectors @ bank.vectors.T).triu(diagonal=1)  # [C, C]
    pairs = (cosines >= INDISTINCT).nonzero().tolist()
    if pairs:
        named = [f'"{bank.classes[a]}" and "{bank.classes[b]}"' for a, b in pairs]
        more = f", and {len(named) - 5} more pairs" if len(named) > 5 else ""
        warn(
            f"these classes have nearly equal text vectors (cosine of at least {INDISTINCT}), so one of each pair "
            f"is hardly ever predicted: {'; '.join(named[:5])}{more}. Merge them, or rename them in classes.txt."
        )


def warn_of_long_prompts(
    tokenizer: Any, classes: Sequence[str], prompts: Sequence[Sequence[str]]
) -> None:
    """Warn of prompts `prompts[i]` of class `classes[i]` that the tokenizer truncates."""
    context = getattr(tokenizer, "context_length", None)
    if not context:
        return
    counts = [max(_token_count(tokenizer, prompt, context) for prompt in own) for own in prompts]
    cut = [(name, n) for name, n in zip(classes, counts, strict=True) if n > context]
    if cut:
        warn(
            f'the prompts of {len(cut)} of {len(classes)} classes are truncated by the tokenizer: "{cut[0][0]}" has '
            f"{cut[0][1]} tokens, and the limit is {context}."
        )


def _token_count(tokenizer: Any, prompt: str, context: int) -> int:
    """Count the tokens of a prompt with begin and end, before truncation; 0 if it is short or cannot be counted."""
    if len(prompt.encode()) + 2 <= context:  # a token has at least one byte
        return 0
    if hasattr(tokenizer, "encode"):
        return len(tokenizer.encode(prompt)) + 2
    inner = getattr(tokenizer, "tokenizer", None)
    return len(inner(prompt)["input_ids"]) if callable(inner) else 0
