"""From class names to a text bank: names → prompts → teacher's text embeddings → one unit vector per class."""

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
from edgekd.core.files import write_tensors
from edgekd.core.readers import printable, read_tensors

TEMPLATE_SETS = ("photo", "imagenet7", "imagenet80", "domain")


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
    """float32 `[D]`, mean of the teacher's unit embeddings of the training images; None: the student is not centred."""
    text_centre: Tensor | None = None
    """float32 `[D]`, mean of `vectors` at training time, kept so that a class can be added later."""
    described: bool = False
    """Whether the prompts end in descriptions of the classes."""

    @property
    def head(self) -> Tensor:
        """What the student's embedding is compared with, float32 `[classes, D]`, rows of length 1."""
        return (
            self.vectors
            if self.text_centre is None
            else normalize(self.vectors - self.text_centre, dim=-1)
        )

    def image_target(self, embeddings: Tensor) -> Tensor:
        """The teacher's embeddings `[B, D]` as the student is to match them: less their common part, if centred."""
        if self.image_centre is None:
            return embeddings
        return normalize(
            normalize(embeddings, dim=-1) - self.image_centre.to(embeddings.device), dim=-1
        )

    def zero_shot(self, embeddings: Tensor) -> Tensor:
        """The teacher's own logits `logit_scale · cos(t, T)` for its embeddings `[B, D]`, float `[B, classes]`."""
        return (
            self.logit_scale * normalize(embeddings, dim=-1) @ self.vectors.to(embeddings.device).T
        )

    def write(self, path: Path) -> None:
        """Save as safetensors; text fields travel in the header."""
        facts = {
            "classes": self.classes,
            "templates": self.templates,
            "teacher_id": self.teacher_id,
            "logit_scale": self.logit_scale,
            "described": self.described,
        }
        tensors = {
            "vectors": self.vectors,
            "image_centre": self.image_centre,
            "text_centre": self.text_centre,
        }
        present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        write_tensors(path, present, facts)


def read_text_bank(path: Path) -> TextBank:
    """Load a bank written by `TextBank.write`.

    Raises:
        EdgekdError: missing, damaged, or arrays that do not fit together.
    """
    hint = "Train the run again with --overwrite."
    tensors, facts = read_tensors(path, "text bank", hint)
    try:
        bank = TextBank(
            classes=_texts(facts["classes"]),
            templates=_texts(facts["templates"]),
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
    if (
        not math.isfinite(bank.logit_scale)
        or bank.vectors.shape != (len(bank.classes), dim)
        or any(centre.shape != (dim,) for centre in centres)
        or not all(
            t.dtype == torch.float32 and t.isfinite().all() for t in (bank.vectors, *centres)
        )
        or any(
            template.count("{}") != 1 for template in bank.templates if template != "precomputed"
        )
    ):
        raise EdgekdError(f"The text bank at {path} is damaged: its {rows} rows do not fit.", hint)
    return bank


def _texts(value: str | list[str]) -> tuple[str, ...]:
    """A list of texts; files of edgekd 0.1 hold them as lines."""
    texts = value.split("\n") if isinstance(value, str) else value
    return tuple(printable(text) for text in texts)


def readable(name: str) -> str:
    """A folder name as words: `dining_table` → `dining table`."""
    return name.replace("_", " ").strip()


def templates_for(choice: str, domains: Sequence[str] = ()) -> tuple[str, ...]:
    """Prompt templates with one `{}` for the class name.

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

        published = (
            SIMPLE_IMAGENET_TEMPLATES if choice == "imagenet7" else OPENAI_IMAGENET_TEMPLATES
        )
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
    """All prompts of a class: every template, with every description behind it (Li et al.: "a photo of X . …")."""
    plain = [template.replace("{}", readable(name)) for template in templates]
    return (
        [f"{prompt} . {sentence}" for prompt in plain for sentence in descriptions]
        if descriptions
        else plain
    )


ALIKE = 0.999
"""Cosine of two class vectors from which on the classes cannot be told apart."""


def warn_of_like_classes(bank: TextBank) -> None:
    """One line that names the classes whose text vectors are the same, or nearly so: one of each pair never wins."""
    cosines = (bank.vectors @ bank.vectors.T).triu(diagonal=1)  # [C, C]
    pairs = (cosines >= ALIKE).nonzero().tolist()
    if pairs:
        named = [f'"{bank.classes[a]}" and "{bank.classes[b]}"' for a, b in pairs]
        more = f", and {len(named) - 5} more pairs" if len(named) > 5 else ""
        warn(
            f"the teacher reads these classes alike (text cosine from {ALIKE} on), so one of each pair can hardly win: "
            f"{'; '.join(named[:5])}{more}. Bring them together, or name them apart in classes.txt."
        )


def warn_of_long_prompts(
    tokenizer: Any, classes: Sequence[str], prompts: Sequence[Sequence[str]]
) -> None:
    """One line when prompts `prompts[i]` of class `classes[i]` do not fit into what the tokenizer's model reads."""
    context = getattr(tokenizer, "context_length", None)
    if not context:
        return
    longest = {
        name: max(_token_count(tokenizer, prompt, context) for prompt in own)
        for name, own in zip(classes, prompts, strict=True)
    }
    cut = [name for name, count in longest.items() if count > context]
    if cut:
        warn(
            f'the prompts of {len(cut)} of {len(classes)} classes are longer than the teacher reads: "{cut[0]}" has '
            f"{longest[cut[0]]} tokens, {context} fit; what lies behind is cut off."
        )


def _token_count(tokenizer: Any, prompt: str, context: int) -> int:
    """Tokens of a prompt with begin and end, before anything is cut; 0 if it is short or the tokenizer is silent."""
    if len(prompt.encode()) + 2 <= context:  # a token is a byte at least
        return 0
    if hasattr(tokenizer, "encode"):
        return len(tokenizer.encode(prompt)) + 2
    inner = getattr(tokenizer, "tokenizer", None)
    return len(inner(prompt)["input_ids"]) if callable(inner) else 0


def ensemble(vectors: Tensor) -> Tensor:
    """Average prompts as CLIP does: normalise each, mean, normalise again. `[T, C, D]` → float32 `[C, D]`."""
    return normalize(normalize(vectors.float(), dim=-1).mean(dim=0), dim=-1)
