"""A small causal transformer over image tokens, the caption before them: LlamaGen (2406.06525) on a small scale.

Transformers' Llama blocks (RMS norm, SwiGLU, rotary positions) between an embedding of points, as codes and noise are,
and two heads: logits of the next code, and what is believed of a noisy token (2510.21003, section 3.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaModel

from tropism.base import Cond
from tropism.models.image_tokens import Choose, ImageTokens, waves
from tropism.models.tokenizer import Tokenizer, fsq_codes, load_module, save_module
from tropism.randomness import Randomness
from tropism.transitions import Categorical


class TokenGPT(nn.Module):
    """``image_tokens.TokenNet`` of ``length`` tokens after ``prefix`` words; cond["words"] (B, prefix) int64."""

    def __init__(
        self,
        words: int,
        prefix: int = 16,
        length: int = 64,
        levels: Sequence[int] = (5, 5, 5, 5),
        width: int = 192,
        layers: int = 5,
    ) -> None:
        super().__init__()
        self.config = dict(words=words, prefix=prefix, length=length, levels=list(levels), width=width, layers=layers)
        self.length, self.prefix, dimension = length, prefix, len(levels)
        self.register_buffer("codes", fsq_codes(levels), persistent=False)
        count = len(fsq_codes(levels))
        self.words = nn.Embedding(words, width)
        self.enter = nn.Sequential(nn.Linear(dimension, width), nn.SiLU(), nn.Linear(width, width))
        self.noisy = nn.Parameter(torch.zeros(width))  # added where a token before is noise
        self.places = nn.Parameter(torch.randn(length, width) * 0.02)
        llama = LlamaConfig(
            vocab_size=1,
            hidden_size=width,
            intermediate_size=width * 5 // 2,
            num_hidden_layers=layers,
            num_attention_heads=width // 32,
            max_position_embeddings=prefix + length,
            use_cache=False,
            bos_token_id=None,
            eos_token_id=None,
        )
        self.body = LlamaModel(llama)
        self.body.set_attn_implementation("eager")  # torch's fused attention is slow backwards in bfloat16 on a CPU
        del self.body.embed_tokens
        self.head = nn.Linear(width, count)
        self.told = nn.Linear(16, width)
        self.mix = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, 2 * width), nn.SiLU())
        self.say = nn.Linear(2 * width, dimension + count)

    def _embedded(self, x: Tensor, first: int = 0) -> Tensor:
        """Points (B, n, d) of the positions from ``first`` on."""
        return self.enter(x) + self.places[first : first + x.shape[1]]  # type: ignore[no-any-return]

    def _hidden(self, before: Tensor, cond: Cond) -> Tensor:
        """Embeddings (B, L, W) -> (B, L, W): of each position, after those before it."""
        inputs = torch.cat([self.words(cond["words"]), before[:, :-1]], dim=1)
        return self.body(inputs_embeds=inputs, use_cache=False).last_hidden_state[:, self.prefix - 1 :]  # type: ignore[no-any-return]

    def logits(self, x: Tensor, cond: Cond) -> Tensor:
        """Codes (B, L, d) -> (B, L, V)."""
        return self.head(self._hidden(self._embedded(x), cond))  # type: ignore[no-any-return]

    def flow(self, before: Tensor, drawn: Tensor, x: Tensor, t: Tensor, cond: Cond, alone: bool = False) -> Tensor:
        """(B, L, d + V), or (B, L, d) ``alone``."""
        seen = self._embedded(before) + drawn[..., None].to(before) * self.noisy
        own = self._embedded(x) + self.told(waves(t.float()).to(x))
        mixed, asked = self.mix(self._hidden(seen, cond) + own), x.shape[-1] if alone else None
        return nn.functional.linear(mixed, self.say.weight[:asked], self.say.bias[:asked])

    @torch.no_grad()
    def draw(
        self,
        cond: Cond,
        null: Cond | None,
        scale: float,
        generator: Randomness = None,
        choose: Choose | None = None,
    ) -> Tensor:
        """(B, L, d) codes drawn one by one with a cache of keys and values; guided away from ``null`` (B rows).

        The same law as the chain of ``samplers.NextToken``, which asks the whole network for every token. ``choose``
        takes the place of drawing.
        """
        both = cond if null is None else {"words": torch.cat([cond["words"], null["words"]])}
        codes: Any = self.codes
        cache, inputs, found = DynamicCache(), self.words(both["words"]), list[Tensor]()
        for place in range(self.length):
            said = self.body(inputs_embeds=inputs, past_key_values=cache, use_cache=True).last_hidden_state[:, -1]
            logits = self.head(said).float()
            if null is not None:
                own, other = logits.chunk(2)
                logits = other + scale * (own - other)
            found.append(codes[Categorical(logits).sample(generator) if choose is None else choose(place, logits)])
            inputs = self._embedded(found[-1].to(said)[:, None], place)
            inputs = inputs if null is None else torch.cat([inputs, inputs])
        return torch.stack(found, dim=1)

    def save(self, folder: Path) -> None:
        """Half precision, safetensors and JSON."""
        save_module(self, self.config, folder)

    @classmethod
    def load(cls, folder: Path) -> TokenGPT:
        """What ``save`` wrote, in float32."""
        return load_module(cls, folder)  # type: ignore[no-any-return]


class Words:
    """Captions as numbers of their words, 0 for none; unknown words are left out."""

    def __init__(self, known: Sequence[str], prefix: int) -> None:
        self.known, self.prefix = {word: place + 1 for place, word in enumerate(known)}, prefix

    def __call__(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """{"words": (B, prefix)}; the last of them stays 0, so that the empty prompt begins as any other."""
        table = torch.zeros(len(prompts), self.prefix, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            found = [self.known[word] for word in prompt.lower().replace(",", " ").split() if word in self.known]
            for place, word in enumerate(found[: self.prefix - 1]):
                table[row, place] = word
        return {"words": table}


class Pictures:
    """Tokens as pictures: a tokenizer before an autoencoder."""

    def __init__(self, tokenizer: Tokenizer, vae: nn.Module) -> None:
        self.tokenizer, self.vae = tokenizer.eval().requires_grad_(False), vae.eval().requires_grad_(False)

    def decode(self, tokens: Tensor) -> Tensor:
        """(B, L, d) -> (B, 3, H, W) in [0, 1], before clamping."""
        first = next(self.vae.parameters())
        latents = self.tokenizer.decode(tokens.float().to(first.device))
        shown: Tensor = self.vae.decode(latents.to(first.dtype), return_dict=False)[0]  # type: ignore[operator]
        return shown.float() * 0.5 + 0.5

    def latents(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> codes (B, L, d)."""
        first = next(self.vae.parameters())
        found = self.vae.encode((images * 2 - 1).to(first), return_dict=False)[0]  # type: ignore[operator]
        return self.tokenizer.encode(found.float())


def load_tokens(folder: Path, dtype: torch.dtype = torch.float32) -> ImageTokens:
    """The model in a folder: ``network``, ``tokenizer``, ``vae`` and ``tokens.json`` (words, guidance_scale).

    Raises ValueError where a part is missing.
    """
    import json

    from diffusers import AutoencoderTiny

    file = folder / "tokens.json"
    if not file.is_file():
        raise ValueError(f"there is no tokens.json in {folder}; wanted the folder of a model of image tokens")
    told = json.loads(file.read_text(encoding="utf-8"))
    network = TokenGPT.load(folder / "network").to(dtype)
    kind: Any = AutoencoderTiny
    vae = kind.from_pretrained(folder / told["vae"], use_safetensors=True)
    shown = Pictures(Tokenizer.load(folder / "tokenizer"), vae)
    return ImageTokens(
        network,
        Words(told["words"], network.prefix),
        shown.decode,
        guidance_scale=told["guidance_scale"],
        latents=shown.latents,
    )
