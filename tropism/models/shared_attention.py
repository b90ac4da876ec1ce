"""Attention control of InfEdit: what is drawn under a second caption attends as the picture does under its own.

Xu et al.: Inversion-Free Image Editing with Natural Language, 2023 (2312.04965), section 4, unified attention control,
after Hertz et al.: Prompt-to-Prompt, 2022 (2208.01626) and Cao et al.: MasaCtrl, 2023 (2304.08465). A pass has B rows
of the picture and below them the B rows of its edit, and perhaps both again without a caption. In the edit's rows

- cross-attention to a word that both captions have is the picture's own map of it (refinement), and a new word's its
  own;
- self-attention takes the picture's queries and keys, so that places belong together as they did, with its own values;
- with ``blend`` nothing moves where neither the words that came nor those that went are attended to: of their maps,
  means over heads and layers divided by their largest value, both are below ``blend``.

Departures from sled-group/InfEdit: two branches and not three, that is no layout branch whose appearance is the
picture's and whose layout is the edit's; the threshold of the blend is one number; words are aligned by the longest
equal runs of tokens; without the caption maps of cross-attention are each row's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import Any

import torch
from torch import Tensor, nn

Mask = Callable[[Tensor], Tensor | None]
"""Of moves (B, C, h, w) those that are made, (B, 1, h, w) of ones and zeros; None for all (``samplers.ddcm``)."""


def aligned(before: Sequence[Sequence[int]], after: Sequence[Sequence[int]]) -> Tensor:
    """Token ids of B captions and of B others, L each -> (B, L) int64: which token of the first each of the second is,
    -1 for one that is new."""
    found = torch.full((len(after), len(after[0])), -1)
    for row, (old, new) in enumerate(zip(before, after, strict=True)):
        for block in SequenceMatcher(None, list(old), list(new), autojunk=False).get_matching_blocks():
            found[row, block.b : block.b + block.size] = torch.arange(block.a, block.a + block.size)
    return found


@dataclass(eq=False)
class Sharing:
    """An attention processor of diffusers, for one pass: ``place`` (B, L) as ``aligned`` says for its rows.

    ``cross`` and ``own`` say whether maps of words and places are shared. ``maps`` collects, of every layer, how much
    each place attends to words that went (of the picture) and that came (of its edit): (2, B, T).
    """

    place: Tensor
    cross: bool
    own: bool
    blend: float | None = None
    maps: list[Tensor] = field(default_factory=list)

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Hidden states (R, T, C) and the words' (R, L, D), if any -> (R, T, C). Raises ValueError for other rows, and
        for attention that is masked or over something else than a sequence."""
        rows, plain = 2 * len(self.place), hidden_states.ndim == 3 and attn.group_norm is None
        if not plain or len(hidden_states) % rows or attention_mask is not None:
            raise ValueError(
                f"attention over {tuple(hidden_states.shape)} cannot be shared by {rows} rows; wanted a UNet's own, of "
                "a whole number of times as many; set cross_share and self_share to 0 and leave blend out"
            )
        words = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = attn.to_q(hidden_states), attn.to_k(words), attn.to_v(words)
        if encoder_hidden_states is None and self.own:
            query, key = self._doubled(query), self._doubled(key)
        query, key, value = (attn.head_to_batch_dim(each) for each in (query, key, value))
        maps: Tensor = attn.get_attention_scores(query, key)
        if encoder_hidden_states is not None:
            maps = self._refined(maps.unflatten(0, (len(words), -1))).flatten(0, 1)
        answer = attn.batch_to_head_dim(torch.bmm(maps, value))
        for layer in attn.to_out:
            answer = layer(answer)
        whole = answer + hidden_states if attn.residual_connection else answer
        scaled: Tensor = whole / attn.rescale_output_factor
        return scaled

    def _doubled(self, states: Tensor) -> Tensor:
        """(R, ...) whose edits' rows are their pictures'."""
        parts: Tensor = states.unflatten(0, (-1, 2, len(self.place)))
        doubled: Tensor = parts[:, :1].expand_as(parts).flatten(0, 2)
        return doubled

    def _refined(self, maps: Tensor) -> Tensor:
        """Maps (R, heads, T, L), those with the caption first."""
        count, place = len(self.place), self.place.to(maps.device)
        before, after = maps[:count], maps[count : 2 * count]
        known = (place >= 0)[:, None, None].expand_as(after)
        if self.cross:
            copied = before.gather(3, place.clamp(min=0)[:, None, None].expand_as(after))
            after = copied.where(known, after)
            maps = torch.cat([before, after, maps[2 * count :]])
        if self.blend is not None:
            stays = torch.zeros(count, before.shape[3] + 1, device=maps.device)
            stays = stays.scatter(1, place.where(place >= 0, before.shape[3]), 1.0)[:, :-1]
            came, went = (place < 0).float(), 1 - stays
            self.maps.append(torch.stack([self._seen(before, went), self._seen(after, came)]))
        return maps

    @staticmethod
    def _seen(maps: Tensor, words: Tensor) -> Tensor:
        """(B, T): what is attended to of ``words`` (B, L), mean over heads."""
        return (maps.float().mean(1) * words[:, None]).sum(2)

    def mask(self, like: Tensor) -> Tensor | None:
        """As ``samplers.ddcm.Mask``. Layers of other resolutions are scaled to that of ``like``."""
        if self.blend is None:
            return None
        size = like.shape[2:]
        seen = torch.stack([self._scaled(each, size) for each in self.maps]).mean(0)
        seen = seen / seen.flatten(2).amax(2)[..., None, None].clamp(min=1e-12)
        return (seen > self.blend).any(0)[:, None].to(like.dtype)

    @staticmethod
    def _scaled(maps: Tensor, size: torch.Size) -> Tensor:
        """(2, B, T) -> (2, B, h, w)."""
        factor = (size.numel() / maps.shape[2]) ** 0.5
        height, width = (round(length / factor) for length in size)
        return torch.nn.functional.interpolate(maps.unflatten(2, (height, width)), size=tuple(size), mode="bilinear")


@dataclass(frozen=True)
class SharedAttention:
    """A ``samplers.ddcm.Attending``: maps are shared while less than a share of the moves is made.

    ``network()`` says what will be called; its processors are as they were after every pass.
    """

    network: Callable[[], nn.Module]
    place: Tensor  # (P, L)
    cross_share: float
    self_share: float
    blend: float | None

    @contextmanager
    def __call__(self, rows: Tensor, done: float) -> Iterator[Mask]:
        """Inside, the network attends so."""
        sharing = Sharing(self.place[rows.cpu()], done < self.cross_share, done < self.self_share, self.blend)
        with attending(self.network(), sharing):
            yield sharing.mask


@contextmanager
def attending(net: nn.Module, processor: Any) -> Iterator[None]:
    """Inside, every attention of the UNet ``net`` is ``processor``'s; afterwards each is its own again."""
    network: Any = net
    before: Mapping[str, Any] = network.attn_processors
    network.set_attn_processor(processor)
    try:
        yield
    finally:
        network.set_attn_processor(dict(before))
