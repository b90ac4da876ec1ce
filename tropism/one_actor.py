"""OneActor: a small projector is tuned until one word of a prompt means one of the pictures that were drawn of it.

Wang et al.: OneActor: Consistent Character Generation via Cluster-Conditioned Guidance, 2024 (2404.10267), section 4.2.
The model stays as it is. Of one prompt a target and auxiliary pictures are drawn; of each the projector makes, from
what the UNet's middle sees at the end of its chain, an offset to the embedding of the word. Its loss is, in denoising
errors,

    target + auxiliary_weight (mean of auxiliary ones) + average_weight (the target under their mean offset).

What is kept are two offsets, the target's and the mean of the others, which ``--steer one-actor`` adds.

Departures from JoHnneyWang/OneActor: features less their mean over what was drawn, over their deviation, and group
normalisation in the projector, in the place of batch normalisation, which has five rows; latents are those that the
chain ended in, without a way through pictures; captions, of what is drawn and of the tuning, are the caller's.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tropism.base import WORDS, take
from tropism.denoisers import denoising_error
from tropism.guidance.cluster import moved
from tropism.policy import Policy
from tropism.randomness import each_row, normal

GROUPS = 4


@dataclass(frozen=True)
class Actor:
    """What ``word`` means from now on."""

    word: str
    target: Tensor  # (D,) added to its embedding
    others: Tensor  # (D,) the mean of what was not meant

    def save(self, file: str | Path) -> Path:
        """Writes a safetensors file, atomically."""
        place = Path(file)
        place.parent.mkdir(parents=True, exist_ok=True)
        part = place.with_name(f".saving-{place.name}")
        tensors = {"target": self.target.float().contiguous(), "others": self.others.float().contiguous()}
        save_file(tensors, str(part), {"one_actor_word": self.word})
        os.replace(part, place)
        return place

    @classmethod
    def load(cls, file: str | Path) -> Actor:
        """Raises ValueError, in one sentence, for what is no such file."""
        place = Path(file).expanduser()
        try:
            with safe_open(str(place), "pt") as opened:
                word = (opened.metadata() or {})["one_actor_word"]
                return cls(word, opened.get_tensor("target"), opened.get_tensor("others"))
        except (OSError, SafetensorError, KeyError) as error:
            raise ValueError(f"{file} is no actor ({error}); wanted a file of tropism.one_actor.tune") from error


class Projector(nn.Module):
    """Features (B, C, h, w) of the UNet's middle -> offsets (B, D)."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        sizes = [max(GROUPS, channels // 2**halving // GROUPS * GROUPS) for halving in range(1, 5)]
        self.first = nn.Conv2d(channels, sizes[0], 7, stride=2, padding=3)
        self.stages = nn.Sequential(*(Stage(low, high) for low, high in itertools.pairwise(sizes)))
        self.last, self.norm = nn.Linear(sizes[-1], width), nn.LayerNorm(width)

    def forward(self, features: Tensor) -> Tensor:
        """As the class says; an offset has the length sqrt(D) at first."""
        pooled = self.stages(self.first(features)).flatten(2).mean(2)
        answer: Tensor = self.norm(self.last(pooled))
        return answer


class Stage(nn.Module):
    """A residual block that changes the width."""

    def __init__(self, low: int, high: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(GROUPS, low), nn.SiLU(), nn.Conv2d(low, high, 3, padding=1),
            nn.GroupNorm(GROUPS, high), nn.SiLU(), nn.Conv2d(high, high, 3, padding=1),
        )  # fmt: skip
        self.beside = nn.Conv2d(low, high, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, low, h, w) -> (B, high, h, w)."""
        answer: Tensor = self.beside(x) + self.body(x)
        return answer


@dataclass(frozen=True)
class Cast:
    """What was drawn: latents (N, ...), and the features (N, C, h, w) at the end of their chains."""

    latents: Tensor
    features: Tensor


@torch.no_grad()
def cast(policy: Policy, prompts: Sequence[str], seed: int = 0) -> Cast:
    """Draws a sample a prompt (N), to choose a target from; usually all are one prompt, N times.

    Raises ValueError for a model without a UNet's middle.
    """
    features = getattr(policy.model, "features", None)
    if features is None:
        raise ValueError("one-actor reads the middle of a UNet, which this model has not; take one of Stable Diffusion")
    count, cond = len(prompts), policy.model.encode(prompts)
    generators = each_row(torch.Generator().manual_seed(seed), count)
    x = normal((count, *policy.model.latent_shape), generators, policy.device)
    ends, seen = [], []
    for rows in torch.arange(count).split(policy.microbatch):
        own = take(cond, rows)
        *_, last = policy.chain(x[rows], own, [generators[row] for row in rows.tolist()])
        ends.append(last.x_next)
        seen.append(features(last.x, last.t, own))
    return Cast(torch.cat(ends), torch.cat(seen))


def standardised(features: Tensor) -> Tensor:
    """(N, ...) less their mean, over their standard deviation: what N share would drown what parts them."""
    centred = features - features.mean(0, keepdim=True)
    return centred / centred.square().mean(0, keepdim=True).sqrt().clamp(min=1e-6)


def tune(
    model: Any,
    drawn: Cast,
    word: str,
    prompts: Sequence[str],
    *,
    target: int = 0,
    steps: int = 200,
    learning_rate: float = 1e-4,
    rows: int = 3,
    auxiliary_weight: float = 0.5,
    average_weight: float = 0.2,
    seed: int = 0,
) -> Actor:
    """An actor of row ``target`` of what was ``drawn``; its other rows are the auxiliary ones.

    ``prompts`` all have the ``word``, a single token; each row of a step takes one of them by chance. A step has the
    target, ``rows`` auxiliary ones and the target again. Raises ValueError for a target that is not there, too few
    auxiliary rows, and a prompt without the word.
    """
    count = len(drawn.latents)
    if not 0 <= target < count or not 1 <= rows < count or steps < 1:
        raise ValueError(
            f"target is {target}, rows {rows} and steps {steps} with {count} samples drawn; wanted one of them, fewer "
            "rows than samples, and at least 1 step"
        )
    generator, cond = torch.Generator().manual_seed(seed), model.encode(prompts)
    places, features = model.word_places(prompts, word), standardised(drawn.features)
    others = torch.tensor([row for row in range(count) if row != target])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projector = Projector(features.shape[1], cond[WORDS].shape[2]).to(features.device)
    adam = torch.optim.AdamW(projector.parameters(), lr=learning_rate, weight_decay=0.01)
    for _ in range(steps):
        picked = others[torch.randperm(len(others), generator=generator)[:rows]]
        shown = torch.cat([torch.tensor([target]), picked, torch.tensor([target])])
        offsets = projector(features[shown[:-1]])
        offsets = torch.cat([offsets, offsets[1:].mean(0, keepdim=True)])
        text = torch.randint(len(prompts), (len(shown),), generator=generator)
        noise = torch.randn((len(shown), *drawn.latents.shape[1:]), generator=generator)
        t = 1 - torch.rand(len(shown), generator=generator)
        text[-1], noise[-1], t[-1] = text[0], noise[0], t[0]  # the average is the target but for its offset
        own = take(cond, text.to(features.device))
        told = {**own, WORDS: moved(own[WORDS].float(), places[text].to(features.device), offsets)}
        clean, noise, t = (each.to(features.device) for each in (drawn.latents[shown], noise, t))
        error = denoising_error(model.denoiser, clean, noise, t, told)
        loss = error[0] + auxiliary_weight * error[1:-1].mean() + average_weight * error[-1]
        adam.zero_grad()
        loss.backward()
        adam.step()
    with torch.no_grad():
        offsets = projector(features)
    return Actor(word, offsets[target].cpu(), offsets[others].mean(0).cpu())
