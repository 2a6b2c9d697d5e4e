"""CLIP's byte-pair tokens, shared by student and teacher so that they match one to one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgekd.core.console import warn

VOCABULARY = 49408
BEGIN, END = 49406, 49407
_STOP_WORDS = frozenset(
    re.findall(
        "[a-z]+",
        "a an the is are was were be been of in on at to for from with by and or not no does do did there this that "
        "these those it its what which who how one can has have here any",
    )
)
"""Words that name nothing visible. Ours: the paper's rule could not be read."""


@cache
def tokenizer() -> Any:
    """open_clip's tokenizer; its words and merges lie in open_clip itself."""
    from open_clip import SimpleTokenizer

    return SimpleTokenizer()


def length_of(texts: Sequence[str], limit: int) -> int:
    """Return the tokens of the longest text with begin and end, at most `limit`; warns once where a text is longer."""
    counts = [len(tokenizer().encode(text)) + 2 for text in texts]
    cut = [text for text, count in zip(texts, counts, strict=True) if count > limit]
    if cut:
        warn(
            f'{len(cut)} of {len(texts)} texts are longer than the {limit} tokens that are read: "{cut[0]}"; '
            "the rest is cut off."
        )
    return min(max(counts), limit)


def tokenize(texts: Sequence[str], length: int) -> Tensor:
    """Texts → int64 `[N, length]`: begin, words, end, zeros; longer texts are cut before the end."""
    ids: Tensor = tokenizer()(list(texts), context_length=length)
    return ids


def content_tokens(ids: Tensor) -> Tensor:
    """Return which tokens can carry meaning: not begin, end, padding, punctuation or a stop word. bool `[…, L]`."""
    after_end = (ids == END).int().cumsum(dim=-1) > 0
    plain = torch.tensor(
        [_is_content(i) for i in ids.flatten().tolist()], dtype=torch.bool
    ).reshape(ids.shape)
    return plain & ~after_end


def word(token: int) -> str:
    """A token as text: `dog</w>` → `dog`."""
    return str(tokenizer().decoder[token]).replace("</w>", "")


@cache
def _is_content(token: int) -> bool:
    return (
        token < BEGIN
        and word(token) not in _STOP_WORDS
        and re.search(r"\w", word(token)) is not None
    )


def token_rows(ids: Tensor) -> NDArray[np.int64]:
    """Give every token of the training texts a row of the student's table; all others share row 0. int64 `[V]`."""
    rows = np.zeros(VOCABULARY, dtype=np.int64)
    seen = np.unique(ids.numpy())
    rows[seen] = 1 + np.arange(len(seen))
    return rows
