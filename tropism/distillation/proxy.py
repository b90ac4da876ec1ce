"""A reward that is learnt on latents, so that its gradient can be followed where the reward itself has none.

RG-LCD's latent proxy (2403.11027) and LaSRO's surrogate (2411.15247) are one object: a small network p(x_0, prompt)
that orders a model's clean predictions as the expert reward orders them decoded. For two of one prompt, i and j, it
minimises

    KL( Bernoulli(sigmoid((r_i - r_j) / scale)) || Bernoulli(sigmoid(p_i - p_j)) )

and scale * p stands for r, with ``scale`` the population deviation of the first scores that were seen.

Departures: the network is a few layers made from nothing, where theirs start from a CLIP (RG-LCD) or from half a
diffusion U-Net (LaSRO); it learns from what the student itself says at each of its moves, where RG-LCD compares a
prediction with the target's and with a real picture, and LaSRO takes the best and the worst of a group only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from tropism.base import WORDS, Cond, Prompts, Reward, pick, take
from tropism.checkpoint import load_optimizer, optimizer_state, under
from tropism.policy import Policy, score_latents
from tropism.randomness import row_generators, row_seeds


class LatentNet(nn.Module):
    """x (B, D) or (B, C, h, w) and prompt tokens (P, L, token) -> (B,): features of the latent ask the prompt.

    B is P times n, and the first n rows are of the first prompt.
    """

    def __init__(self, shape: Sequence[int], token: int, width: int = 64) -> None:
        super().__init__()
        if len(shape) == 1:
            self.body: nn.Module = nn.Sequential(nn.Linear(shape[0], width), nn.SiLU(), nn.Linear(width, width))
        else:
            halves = [part for _ in range(2) for part in (nn.SiLU(), nn.Conv2d(width, width, 3, 2, 1))]
            self.body = nn.Sequential(nn.Conv2d(shape[0], width, 3, padding=1), *halves)
        self.query, self.keys = nn.Linear(width, width), nn.Linear(token, 2 * width)
        self.head = nn.Sequential(nn.Linear(2 * width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.last = nn.Linear(width, 1)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        """One number a row; tokens are normalised, as encoders differ in size."""
        features = self.body(x).flatten(2).mT if x.ndim > 2 else self.body(x)[:, None]
        key, value = self.keys(F.layer_norm(tokens, tokens.shape[-1:])).chunk(2, -1)
        query = self.query(features).unflatten(0, (len(tokens), -1)).flatten(1, 2)
        heard = F.scaled_dot_product_attention(query, key, value).reshape(features.shape)
        hidden = self.head(torch.cat([features, heard], -1))
        return self.last(hidden.mean(1))[:, 0]  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Table:
    """What a student says of clean samples, and how the expert likes it."""

    latents: Tensor  # (N, ...)
    cond: Cond  # N rows
    reward: Tensor  # (N,) NaN = no score
    group: Tensor  # (N,) only rows of one prompt are compared

    def prompts(self) -> Cond:
        """``cond`` once a prompt, where each has as many rows as the others; else as it is."""
        counts = self.group.unique_consecutive(return_counts=True)[1]
        each = int(counts[0]) if bool((counts == counts[0]).all()) else 1
        return {name: value[::each] for name, value in self.cond.items()}


class Proxy:
    """The network, its optimizer and its scale. Calling it gives rewards (B,) with a gradient to the latents alone.

    ``rounds`` tables are learnt from before the first is used, ``steps`` Adam steps on each.
    """

    def __init__(self, policy: Policy, steps: int, rounds: int, rate: float, generator: torch.Generator) -> None:
        tokens = policy.model.null().get(WORDS)
        if tokens is None:
            raise ValueError(f"this model's prompts have no {WORDS}, which the proxy reads; follow the reward itself")
        trained = [parameter.dtype for parameter in policy.model.parameters()]
        dtype = torch.promote_types(trained[0], torch.float32) if trained else torch.float32
        self.net = drawn(policy.model.latent_shape, tokens.shape[-1], generator).to(policy.device, dtype)
        self.adam = torch.optim.Adam(self.net.parameters(), lr=rate)
        self.steps, self.rounds, self.dtype = steps, rounds, dtype
        self.scale, self.accuracy, self.updates = 1.0, math.nan, 0

    def __call__(self, latents: Tensor, cond: Cond) -> Tensor:
        """latents (B, ...), cond (B rows) -> (B,) in the reward's units, up to a constant of the prompt."""
        frozen = {name: value.detach() for name, value in self.net.named_parameters()}
        return functional_call(self.net, frozen, self._seen(latents, cond)) * self.scale  # type: ignore[no-any-return]

    def _seen(self, latents: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        return latents.to(self.dtype), cond[WORDS].to(self.dtype)

    def learn(
        self, policy: Policy, reward: Reward, batch: Prompts, generator: torch.Generator, ends: bool = False
    ) -> Table:
        """Learns from fresh chains of ``policy``, or only from their ``ends``; the last table. ``accuracy`` is how well
        it was known before."""
        for _ in range(1 if self.updates else 1 + self.rounds):
            table = said_and_scored(policy, reward, batch, generator, ends)
            self.accuracy = self.agreement(table)
            self.fit(table)
        return table

    def fit(self, table: Table) -> None:
        """``steps`` Adam steps on the whole table; none where nothing can be compared."""
        i, j = pairs_of(table)
        if not len(i):
            return
        reward = table.reward.to(self.dtype)
        if not self.updates:
            self.scale = max(float(reward[~reward.isnan()].std(correction=0)), 1e-8)
        goal = ((reward[i] - reward[j]) / self.scale).sigmoid()
        seen = self._seen(table.latents, table.prompts())
        for _ in range(self.steps):
            p = self.net(*seen)
            loss = F.binary_cross_entropy_with_logits(p[i] - p[j], goal)
            self.adam.zero_grad()
            torch.autograd.backward(loss)
            self.adam.step()
            self.updates += 1

    @torch.no_grad()
    def agreement(self, table: Table) -> float:
        """Share of the pairs with unequal rewards that the proxy orders as the reward does; NaN without any."""
        i, j = pairs_of(table)
        p, apart = self.net(*self._seen(table.latents, table.prompts())), table.reward[i] - table.reward[j]
        return float(((p[i] - p[j]) * apart > 0)[apart != 0].double().mean())

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors only: ``updates``, ``scale``, ``net/<name>`` and ``optimizer/<parameter>/<name>``."""
        weights = {f"net/{name}": value.clone() for name, value in self.net.state_dict().items()}
        moments = {name: value.clone() for name, value in optimizer_state(self.adam)[0].items()}
        scale = torch.tensor(self.scale, dtype=torch.float64)
        return {"updates": torch.tensor(self.updates), "scale": scale, **weights, **moments}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continues from ``state_dict()``. Raises ValueError for a network of another shape."""
        try:
            self.net.load_state_dict(under("net", state))
        except RuntimeError as error:
            raise ValueError("the proxy has other weights; wanted those of the same model") from error
        load_optimizer(self.adam, state, self.adam.state_dict()["param_groups"])
        self.updates, self.scale = int(state["updates"]), float(state["scale"])


def drawn(shape: Sequence[int], token: int, generator: torch.Generator) -> LatentNet:
    """A network with weights from this generator; the global one is not touched."""
    with torch.device("meta"):
        net = LatentNet(shape, token)
    net.to_empty(device="cpu")
    for part in net.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            bound = part.weight[0].numel() ** -0.5
            for value in part.parameters():
                nn.init.uniform_(value, -bound, bound, generator=generator)
    return net


@torch.no_grad()
def said_and_scored(
    policy: Policy, reward: Reward, batch: Prompts, generator: torch.Generator, ends: bool = False
) -> Table:
    """The clean samples that ``policy`` believes in at each of its K moves, a chain a prompt: B * K rows. Those of the
    last move, which are what is drawn, with ``ends``: B rows."""
    generators, cond = row_generators(row_seeds(len(batch.text), generator)), policy.model.encode(batch.text)
    x, parts, mine = (
        policy.noise(len(batch.text), generators),
        [],
        policy.processes.share(torch.arange(len(batch.text))),
    )
    for rows in mine.split(policy.microbatch):
        moves = policy.chain(x[rows], take(cond, rows), [generators[row] for row in rows])
        said = [move.prediction.x0 for move in moves]
        parts.append(torch.stack(said[-1:] if ends else said, dim=1))
    latents = policy.processes.joined(torch.cat(parts), mine, len(batch.text)).flatten(0, 1)
    rows = torch.arange(len(batch.text)).repeat_interleave(1 if ends else policy.steps)
    scores = score_latents(policy, reward, latents, pick(batch, rows))
    return Table(latents, take(cond, rows), scores.detach(), batch.group[rows])


def pairs_of(table: Table) -> tuple[Tensor, Tensor]:
    """(P,) and (P,): every two rows of one group that both have a score."""
    group, present = table.group.to(table.reward.device), ~table.reward.isnan()
    comparable = (group[:, None] == group) & present[:, None] & present
    i, j = comparable.triu(1).nonzero(as_tuple=True)
    return i, j


@dataclass(frozen=True)
class ProxySettings:
    """Flags and YAML keys of a method with a proxy."""

    proxy_steps: int = 20
    """Steps of the proxy before each batch."""
    proxy_rounds: int = 10
    """Further batches of samples that the proxy learns before the first."""
    proxy_learning_rate: float = 1e-3

    def check_proxy(self, answers: int) -> None:
        """Raises ValueError for impossible values; ``answers`` to one prompt are compared with each other."""
        if self.proxy_steps < 1 or self.proxy_rounds < 0 or not 0 < self.proxy_learning_rate < 1:
            raise ValueError(
                f"proxy_steps is {self.proxy_steps}, proxy_rounds {self.proxy_rounds} and proxy_learning_rate "
                f"{self.proxy_learning_rate}; wanted at least 1, at least 0, and between 0 and 1"
            )
        if answers < 2:
            raise ValueError("images_per_prompt is 1; wanted at least 2: the proxy compares samples of a prompt")

    def proxy(self, policy: Policy, generator: torch.Generator) -> Proxy:
        """The proxy that these settings describe. Raises ValueError for a model whose prompts it cannot read."""
        return Proxy(policy, self.proxy_steps, self.proxy_rounds, self.proxy_learning_rate, generator)
