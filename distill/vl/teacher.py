"""The teacher's vectors per word piece and picture patch, in the shared space of images and texts.

`e_j = proj(ln_final(H_j))` and `v_q = proj(ln_post(P_q))` (METHODS §5.3). CLIP was trained on pooled vectors only, so
these outputs had no training objective of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, normalize

from edgekd.core.errors import EdgekdError
from edgekd.data.image_set import ImageSet
from edgekd.distill.inputs.batches import pixel_batches
from edgekd.distill.inputs.cache import cached_tensors
from edgekd.distill.inputs.views import plain
from edgekd.distill.models.teachers import ClipTeacher, Teacher
from edgekd.distill.vl import tokens
from edgekd.distill.vl.data import Reader, VlData
from edgekd.distill.vl.token_td import TeacherTokens

_CHUNK = 64
_MAX_BYTES = 4 * 2**30


@dataclass(frozen=True)
class TokenTeacher:
    """A teacher with a vector per token."""

    teacher: ClipTeacher

    @property
    def context(self) -> int:
        """Return the context length of the text encoder."""
        return int(self.teacher.tokenizer.context_length)

    @torch.inference_mode()
    def texts(self, texts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
        """Texts → unit vectors: per token float32 `[N, length, D]`, pooled `[N, D]`."""
        model: Any = self.teacher.model
        encoder = getattr(model, "text", model)
        chunks = [texts[start : start + _CHUNK] for start in range(0, len(texts), _CHUNK)]

        def embed() -> Tensor:
            ids = (tokens.tokenize(chunk, self.context) for chunk in chunks)
            return torch.cat([model.encode_text(chunk).float() for chunk in ids])

        states, pooled = _with_output_of(encoder.ln_final, embed)
        hidden = torch.cat(states)[:, :length].float()  # [N, length, w]
        per_token = _projected(hidden, encoder.text_projection)
        return normalize(per_token, dim=-1), normalize(pooled, dim=-1)

    def words(self, ids: Sequence[int]) -> Tensor:
        """Return unit vectors of "a photo of WORD" for tokens, float32 `[N, D]`."""
        prompts = [f"a photo of {tokens.word(i)}" for i in ids]
        return normalize(self.teacher.embed_texts(prompts), dim=-1)

    @torch.inference_mode()
    def images(
        self, images: ImageSet, indices: NDArray[np.int64], grid: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Pictures → unit vectors: per cell of the student's grid float16 `[n, h · w, D]`, pooled float32 `[n, D]`.

        The teacher's own grid is averaged onto the student's (our choice).
        """
        n_bytes = 2 * len(indices) * grid[0] * grid[1] * self.teacher.dim
        if n_bytes > _MAX_BYTES:
            raise EdgekdError(
                f"The teacher's patch vectors of {len(indices):,} pictures would take {n_bytes / 2**30:.0f} GiB.",
                "Train on a --fraction of them, or with --select none, which uses no patches.",
            )
        preprocess = self.teacher.preprocess
        mean, std = (torch.tensor(v)[:, None, None] for v in (preprocess.mean, preprocess.std))
        patches, pooled = [], []
        for pixels in pixel_batches(images, indices, preprocess, _CHUNK):
            views = (plain(torch.from_numpy(pixels)) - mean) / std  # [b, 3, S, S]
            found, whole = patch_map(self.teacher, views)
            cells = adaptive_avg_pool2d(normalize(found, dim=1), grid)
            rows = cells.flatten(2).transpose(1, 2)  # [b, h · w, D]
            patches.append(normalize(rows, dim=-1).half())
            pooled.append(normalize(whole, dim=-1))
        return torch.cat(patches), torch.cat(pooled)


def read_tokens(teacher: Teacher) -> TokenTeacher:
    """Return the teacher with a vector per token.

    Precomputed embeddings, another tokenizer than CLIP's, and an encoder without token vectors are an `EdgekdError`.
    """
    if not isinstance(teacher, ClipTeacher):
        raise EdgekdError(
            f"{teacher.spec} has embeddings of whole pictures, but clip-td needs a vector per token.",
            "Use a teacher model.",
        )
    from open_clip import SimpleTokenizer

    tokenizer, model = teacher.tokenizer, cast(Any, teacher.model)
    if not isinstance(tokenizer, SimpleTokenizer) or tokenizer.vocab_size != tokens.VOCABULARY:
        raise EdgekdError(
            f"The teacher {teacher.spec} does not use CLIP's tokenizer, so its tokens do not match the student's.",
            "Choose a teacher with CLIP's tokenizer, such as OpenAI's and LAION's ViT models.",
        )
    encoder = getattr(model, "text", model)
    if not hasattr(encoder, "ln_final") or getattr(encoder, "cls_emb", None) is not None:
        raise EdgekdError(
            f"The text encoder of {teacher.spec} gives no token vectors.",
            "Choose a plain CLIP teacher.",
        )
    patch_map(teacher, torch.zeros(1, 3, *teacher.preprocess.shape))
    return TokenTeacher(teacher)


@torch.inference_mode()
def patch_map(teacher: ClipTeacher, views: Tensor) -> tuple[Tensor, Tensor]:
    """Normalised pixels `[B, 3, S, S]` → float32 patch vectors `[B, D, h, w]` and the pooled embedding `[B, D]`."""
    visual = cast(Any, teacher.model).visual
    trunk = getattr(visual, "trunk", None)
    if trunk is not None and _ends_in_average(visual):
        found = trunk.forward_features(views)
        if found.ndim == 4:
            rows = visual.head(found.permute(0, 2, 3, 1))  # [B, h, w, D]
            pooled = visual.head(trunk.forward_head(found, pre_logits=True))
            return rows.permute(0, 3, 1, 2).float(), pooled.float()
    elif (
        trunk is None
        and hasattr(visual, "ln_post")
        and visual.attn_pool is None
        and not visual.final_ln_after_pool
    ):
        (states,), pooled = _with_output_of(visual.ln_post, lambda: visual(views))
        height, width = visual.grid_size
        rows = _projected(states[:, -height * width :].float(), visual.proj)  # [B, h · w, D]
        return rows.transpose(1, 2).reshape(len(rows), -1, height, width), pooled.float()
    raise EdgekdError(
        f"The image encoder of {teacher.spec} gives no patch vectors in the shared space.",
        "Choose a CLIP ViT, or a timm convolutional network that ends in an average and a linear layer.",
    )


def _with_output_of(layer: nn.Module, run: Callable[[], Tensor]) -> tuple[list[Tensor], Tensor]:
    """Return the outputs of a layer during `run()`, and the result of `run()`."""
    held: list[Tensor] = []
    hook = layer.register_forward_hook(lambda _module, _args, out: held.append(out))
    try:
        return held, run()
    finally:
        hook.remove()


def _ends_in_average(visual: Any) -> bool:
    linear = all(isinstance(layer, (nn.Dropout, nn.Linear)) for layer in visual.head)
    return linear and getattr(visual.trunk, "global_pool", None) is not None


def _projected(hidden: Tensor, projection: Any) -> Tensor:
    if projection is None:
        return hidden
    module = isinstance(projection, nn.Module)
    out: Tensor = projection(hidden) if module else hidden @ projection.float()
    return out


@dataclass(frozen=True, eq=False)
class TokenTargets:
    """The teacher's vectors of texts `[texts, …]` and of training pictures `[n, …]`, computed before the first step."""

    data: VlData
    tokens: Tensor
    content: Tensor
    text: Tensor
    pooled_text: Tensor
    patches: Tensor
    pooled_image: Tensor
    word_of: Tensor
    """int64 `[vocabulary]`, row of a token in `words`; 0 for tokens that are never matched."""
    words: Tensor
    statements: tuple[Tensor, ...]
    """Unit vectors of each group of statements."""
    place: NDArray[np.int64]
    """Row of a picture; −1 for pictures that do not train."""
    logit_scale: float

    def of(self, indices: NDArray[np.int64]) -> TeacherTokens:
        """Return the teacher's vectors of a batch; for `choice`, those of the correct candidate's text."""
        text = torch.from_numpy(self.data.text_of[indices])  # [B] or [B, K]
        if text.ndim == 2:
            labels = torch.from_numpy(self.data.labels[indices])
            text = text.gather(1, labels[:, None]).squeeze(1)
        rows = torch.from_numpy(self.place[self.data.image_of[indices]])
        image = self.pooled_image[rows]  # [B, D]
        words = self.words[self.word_of[self.tokens[text]]]  # [B, L, D]
        return TeacherTokens(
            text=self.text[text].float(),
            content=self.content[text],
            relevance=torch.einsum("bld,bd->bl", words, image),
            patches=self.patches[rows].float(),
            pooled_text=self.pooled_text[text],
            pooled_image=image,
            logits=self.logits(indices),
            truth=torch.from_numpy(self.data.truth[indices]),
        )

    def logits(self, indices: NDArray[np.int64]) -> Tensor:
        """Return `logit_scale · cos(v, statement)` over each example's statements, float `[B, M]`, padded with −∞."""
        rows = torch.from_numpy(self.place[self.data.image_of[indices]])
        groups = self.data.statements_of[indices]
        most = max(len(self.statements[g]) for g in groups)
        out = torch.full((len(indices), most), -torch.inf)
        for group in np.unique(groups):
            own = torch.from_numpy(np.flatnonzero(groups == group))
            vectors = self.statements[group]
            out[own, : len(vectors)] = self.logit_scale * self.pooled_image[rows[own]] @ vectors.T
        return out


def token_targets(
    teacher: TokenTeacher, reader: Reader, train: NDArray[np.int64], grid: tuple[int, int] | None
) -> TokenTargets:
    """Compute the teacher's vectors for the examples `train`; those of pictures and statements are cached.

    Args:
        grid: the student's patches as (height, width); None if no patches are matched.
    """
    data, own = reader.data, teacher.teacher
    pictures = np.unique(data.image_of[train])
    place = np.full(len(data.images), -1, dtype=np.int64)
    place[pictures] = np.arange(len(pictures))
    cells, keys = grid or (1, 1), [data.images.keys[int(i)] for i in pictures]
    seen = cached_tensors(
        "seen-1",
        (own.id, f"{cells[0]}x{cells[1]}", *keys),
        lambda: dict(
            zip(("patches", "pooled"), teacher.images(data.images, pictures, cells), strict=True)
        ),
    )
    texts = [text for group in data.statements for text in group]
    statements = cached_tensors(
        "statements-1",
        (own.id, *texts),
        lambda: {"text": normalize(own.embed_texts(texts), dim=-1)},
    )
    text, pooled_text = teacher.texts(data.texts, reader.tokens.shape[1])
    content = tokens.content_tokens(reader.tokens)
    known = torch.unique(reader.tokens[content])
    word_of = torch.zeros(int(reader.tokens.max()) + 1, dtype=torch.int64)
    word_of[known] = 1 + torch.arange(len(known))
    none = torch.zeros(1, own.dim)
    return TokenTargets(
        data=data,
        tokens=reader.tokens,
        content=content,
        text=text.half(),
        pooled_text=pooled_text,
        patches=seen["patches"] if grid else seen["patches"][:, :0],
        pooled_image=seen["pooled"],
        word_of=word_of,
        words=torch.cat([none, teacher.words(known.tolist())]) if len(known) else none,
        statements=torch.split(statements["text"], [len(group) for group in data.statements]),
        place=place,
        logit_scale=own.logit_scale,
    )
