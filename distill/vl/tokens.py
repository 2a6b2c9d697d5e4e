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
"""Stop words, which name nothing visible. Ours, since the paper's rule was not available."""


@cache
def tokenizer() -> Any:
    """Return open_clip's tokenizer, whose vocabulary is part of open_clip."""
    from open_clip import SimpleTokenizer

    return SimpleTokenizer()


def length_of(texts: Sequence[str], limit: int) -> int:
    """Return the tokens of the longest text with begin and end, at most `limit`; warn of longer texts."""
    counts = [len(tokenizer().encode(text)) + 2 for text in texts]
    cut = [text for text, count in zip(texts, counts, strict=True) if count > limit]
    if cut:
        warn(
            f'{len(cut)} of {len(texts)} texts are truncated to {limit} tokens, for example "{cut[0]}".'
        )
    return min(max(counts), limit)


def tokenize(texts: Sequence[str], length: int) -> Tensor:
    """Texts → int64 `[N, length]`: begin, words, end, zeros; longer texts are truncated before the end."""
    ids: Tensor = tokenizer()(list(texts), context_length=length)
    return ids


def content_tokens(ids: Tensor) -> Tensor:
    """Return a mask of tokens other than begin, end, padding, punctuation and stop words, bool `[…, L]`."""
    after_end = (ids == END).int().cumsum(dim=-1) > 0
    plain = torch.tensor(
        [_is_content(i) for i in ids.flatten().tolist()], dtype=torch.bool
    ).reshape(ids.shape)
    return plain & ~after_end


def word(token: int) -> str:
    """Return a token as text: `dog</w>` → `dog`."""
    return str(tokenizer().decoder[token]).replace("</w>", "")


@cache
def _is_content(token: int) -> bool:
    return (
        token < BEGIN
        and word(token) not in _STOP_WORDS
        and re.search(r"\w", word(token)) is not None
    )


def token_rows(ids: Tensor) -> NDArray[np.int64]:
    """Return the row of each token in the student's table; tokens outside the training texts share row 0. int64
    `[V]`."""
    rows = np.zeros(VOCABULARY, dtype=np.int64)
    seen = np.unique(ids.numpy())
    rows[seen] = 1 + np.arange(len(seen))
    return rows
