"""What a CLIP teacher says about single tokens: a vector in the shared space per word piece and per picture patch.

`e_j = proj(ln_final(H_j))` and `v_q = proj(ln_post(P_q))` (METHODS §5.3). CLIP was trained on pooled vectors
only, so these are what its last layers make of a position, not something it was taught to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, normalize

from edgekd.core.errors import EdgekdError
from edgekd.data.image_set import ImageSet
from edgekd.distill.teacher import ClipTeacher, Teacher
from edgekd.distill.vl import tokens

_CHUNK = 64
_MAX_BYTES = 4 * 2**30


@dataclass(frozen=True)
class TokenTeacher:
    """A teacher whose tokens can be read."""

    teacher: ClipTeacher

    @property
    def context(self) -> int:
        """Tokens that its text tower reads."""
        return int(self.teacher.tokenizer.context_length)

    @torch.inference_mode()
    def texts(self, texts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
        """Texts → unit vectors: per token float32 `[N, length, D]`, pooled `[N, D]`."""
        model: Any = self.teacher.model
        tower = getattr(model, "text", model)
        held: list[Tensor] = []
        hook = tower.ln_final.register_forward_hook(lambda _module, _args, out: held.append(out))
        pooled = []
        try:
            for start in range(0, len(texts), _CHUNK):
                pooled.append(
                    model.encode_text(
                        tokens.tokenize(texts[start : start + _CHUNK], self.context)
                    ).float()
                )
        finally:
            hook.remove()
        hidden = torch.cat(held)[:, :length].float()  # [N, length, w]
        return normalize(_projected(hidden, tower.text_projection), dim=-1), normalize(
            torch.cat(pooled), dim=-1
        )

    def words(self, ids: Sequence[int]) -> Tensor:
        """Unit vectors of "a photo of WORD" for tokens, float32 `[N, D]`: what a causal tower's states do not give."""
        return normalize(
            self.teacher.embed_texts([f"a photo of {tokens.word(i)}" for i in ids]), dim=-1
        )

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
                "Train on a --fraction of them, or with --select none, which reads no patches.",
            )
        preprocess = self.teacher.preprocess
        mean, std = (
            torch.tensor(value)[:, None, None] for value in (preprocess.mean, preprocess.std)
        )
        patches, pooled = [], []
        for start in range(0, len(indices), _CHUNK):
            pixels = np.stack(
                [preprocess.pixels(images.read(int(i))) for i in indices[start : start + _CHUNK]]
            )
            views = (
                torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - mean
            ) / std  # [b, 3, S, S]
            found, whole = patch_map(self.teacher, views)
            cells = (
                adaptive_avg_pool2d(normalize(found, dim=1), grid).flatten(2).transpose(1, 2)
            )  # [b, h · w, D]
            patches.append(normalize(cells, dim=-1).half())
            pooled.append(normalize(whole, dim=-1))
        return torch.cat(patches), torch.cat(pooled)


def read_tokens(teacher: Teacher) -> TokenTeacher:
    """The teacher with its tokens.

    Raises:
        EdgekdError: a black box, another tokenizer than CLIP's, or a tower without token vectors in the shared space.
    """
    if not isinstance(teacher, ClipTeacher):
        raise EdgekdError(
            f"{teacher.spec} holds whole-picture embeddings, and clip-td needs a vector per token.",
            "Name a teacher that is a model.",
        )
    from open_clip import SimpleTokenizer

    model: Any = teacher.model
    if (
        not isinstance(teacher.tokenizer, SimpleTokenizer)
        or teacher.tokenizer.vocab_size != tokens.VOCABULARY
    ):
        raise EdgekdError(
            f"The teacher {teacher.spec} does not use CLIP's tokenizer, so its tokens match no student token.",
            "Choose one that does: OpenAI's and LAION's ViT models do.",
        )
    tower = getattr(model, "text", model)
    if not hasattr(tower, "ln_final") or getattr(tower, "cls_emb", None) is not None:
        raise EdgekdError(
            f"The text tower of {teacher.spec} gives no token vectors.",
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
        held: list[Tensor] = []
        hook = visual.ln_post.register_forward_hook(lambda _module, _args, out: held.append(out))
        try:
            pooled = visual(views)
        finally:
            hook.remove()
        height, width = visual.grid_size
        rows = _projected(held[0][:, -height * width :].float(), visual.proj)  # [B, h · w, D]
        return rows.transpose(1, 2).reshape(len(rows), -1, height, width), pooled.float()
    raise EdgekdError(
        f"The image tower of {teacher.spec} gives no patch vectors in the shared space.",
        "Choose a CLIP ViT, or a timm convolution tower that ends in an average and a linear layer.",
    )


def _ends_in_average(visual: Any) -> bool:
    linear = all(isinstance(layer, (nn.Dropout, nn.Linear)) for layer in visual.head)
    return linear and getattr(visual.trunk, "global_pool", None) is not None


def _projected(hidden: Tensor, projection: Any) -> Tensor:
    if projection is None:
        return hidden
    out: Tensor = (
        projection(hidden) if isinstance(projection, nn.Module) else hidden @ projection.float()
    )
    return out
