"""Pictures as prompts of a UNet: IP-Adapters in diffusers' format, on a copy of the network that shares its weights.

Ye et al. 2023, IP-Adapter (2308.06721). Layers, projection and their mathematics are diffusers' own; what is added is
where the scales apply (InstantStyle, 2404.02733) and how several references are weighed (MIP-Adapter, 2409.17920).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

from tropism.base import WORDS, Cond, Denoiser
from tropism.image_prompts import relevance, weights, without_content

IMAGES = "image_embeds"  # an entry of cond
Weigh = Callable[[Tensor, Tensor, Tensor], Tensor]
"""weigh(query, key, real) -> (B, M, P), as ``weights(relevance(...))``."""


class Clip:
    """Embeds pictures and texts as the adapter was trained on them: projected, and not of length 1."""

    def __init__(self, folder: str | Path) -> None:
        self.model: Any = CLIPModel.from_pretrained(str(folder), dtype=torch.float32)
        self.processor = CLIPImageProcessor.from_pretrained(str(folder))
        self.tokenizer = AutoTokenizer.from_pretrained(str(folder))

    @torch.no_grad()
    def images(self, images: Sequence[Any]) -> Tensor:
        """PIL pictures -> (N, D)."""
        pixels = self.processor(list(images), return_tensors="pt").pixel_values
        found: Tensor = self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output)
        return found

    @torch.no_grad()
    def text(self, text: str) -> Tensor:
        """(D,)"""
        ids = self.tokenizer([text], padding="max_length", truncation=True, return_tensors="pt").input_ids
        found: Tensor = self.model.text_projection(self.model.text_model(input_ids=ids).pooler_output)
        return found[0]


class Relevant(nn.Module):
    """diffusers' IP-Adapter processor, with weights for its references in place of the masks that it takes.

    The tokens of the entities come behind those of the prompt; rows of zeros are no words.
    """

    def __init__(self, inner: nn.Module, tokens: int, weigh: Weigh) -> None:
        super().__init__()
        self.inner, self.tokens, self.weigh = inner, tokens, weigh

    def forward(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        """As the inner one's, text (B, tokens + M L, C) and references (B, M, n, C) -> (B, P, C)."""
        text, (images,) = encoder_hidden_states
        entities = text[:, self.tokens :].unflatten(1, (images.shape[1], -1))  # (B, M, L, C)
        query = attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        key = attn.to_k(entities).unflatten(-1, (attn.heads, -1)).transpose(2, 3)
        shares = self.weigh(query, key, entities.abs().amax(-1) > 0).to(hidden_states.dtype)
        told = (text[:, : self.tokens], [images])
        # A mask of one row: diffusers takes masks of the picture and scales them to the positions of a layer.
        return self.inner(attn, hidden_states, told, *args, ip_adapter_masks=[shares[:, :, None]], **kwargs)


def by_relevance(query: Tensor, key: Tensor, real: Tensor) -> Tensor:
    """MIP-Adapter's weights, without a gate."""
    return weights(relevance(query, key, real))


class ImagePrompted:
    """A ``base.TextToImage`` that is shown pictures besides every prompt; all else is ``model``'s, as ``adapted`` makes
    it.

    ``images`` (M, D) are embeddings of the references, or those of each prompt by its text. The prompt that guidance
    leads away from has zeros, as diffusers' pipelines. With ``entities``, as many names (or those of each prompt),
    references are weighed by where these are looked for; without, the layers attend to all references at once.
    """

    def __init__(
        self,
        model: Any,
        images: Tensor | Mapping[str, Tensor],
        entities: Sequence[str] | Mapping[str, Sequence[str]] = (),
        weigh: Weigh = by_relevance,
    ) -> None:
        self.model, self.images, self.entities = model, images, entities
        self.zeros = torch.zeros_like(next(iter(images.values())) if isinstance(images, Mapping) else images)
        if entities:
            network, tokens = model.network, model.null()[WORDS].shape[1]
            found = {name: _weighed(each, tokens, weigh) for name, each in network.attn_processors.items()}
            network.set_attn_processor(found)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    @property
    def denoiser(self) -> Denoiser:
        """Of the network with the adapter."""
        return self.model.denoiser  # type: ignore[no-any-return]

    def encode(self, prompts: Sequence[str]) -> Cond:
        """As the model's, with the references."""
        rows = [self.images[prompt] if isinstance(self.images, Mapping) else self.images for prompt in prompts]
        return self._shown(self.model.encode(prompts), torch.stack(rows), [self._named(each) for each in prompts])

    def null(self) -> Cond:
        """As the model's, with zeros in place of the references."""
        return self._shown(self.model.null(), self.zeros[None], [self._named(None)])

    def _named(self, prompt: str | None) -> Sequence[str]:
        """Without a prompt any names do: zeros are the same reference whatever they are weighed by."""
        if not isinstance(self.entities, Mapping):
            return self.entities
        return self.entities[prompt] if prompt is not None else next(iter(self.entities.values()))

    def _shown(self, cond: Cond, images: Tensor, names: Sequence[Sequence[str]]) -> Cond:
        told = {**cond, IMAGES: images.to(self.model.device)}
        if self.entities:
            words = {each: self._entities(each) for each in set(map(tuple, names))}
            told[WORDS] = torch.cat([cond[WORDS], torch.stack([words[tuple(each)] for each in names])], dim=1)
        return told

    def _entities(self, names: Sequence[str]) -> Tensor:
        """(M L, C): what the text encoder says at the words of each name alone; zeros elsewhere."""
        states: Tensor = self.model.encode(list(names))[WORDS].clone()
        for row, name in zip(states, names, strict=True):
            words = len(self.model.pipe.tokenizer(name, add_special_tokens=False).input_ids)
            row[0], row[1 + words :] = 0.0, 0.0  # the start mark, the end mark and padding
        return states.flatten(0, 1)


def _weighed(processor: Any, tokens: int, weigh: Weigh) -> Any:
    return Relevant(processor, tokens, weigh) if hasattr(processor, "to_k_ip") else processor


def adapted(model: Any, file: str | Path, scale: Any = 1.0, blocks: Mapping[str, float] | None = None) -> Any:
    """A view of ``model`` (of Stable Diffusion's family) whose network has the IP-Adapter in ``file``; the model's own
    network, whose weights it shares, is as it was.

    ``scale`` is what ``set_ip_adapter_scale`` takes. ``blocks`` are names in the network with a scale of their own,
    times ``scale`` then a number; all other blocks have 0. Raises ValueError for a file that is no adapter of this
    network and for an unknown block.
    """
    state = read_adapter(file)[0]
    view = copy.copy(model)
    view.pipe, view._net, view._trained, view._twins = copy.copy(model.pipe), _sharing(model.network), None, {}
    setattr(view.pipe, model.part, view._net)
    try:
        view._net._load_ip_adapter_weights(state)
    except (KeyError, RuntimeError, ValueError) as error:
        raise ValueError(f"{file} is no IP-Adapter of this network ({error}); take one that was made for it") from error
    view.pipe.set_ip_adapter_scale(scale if not blocks else 0.0)
    for name, own in (blocks or {}).items():
        _set_scale(view._net, name, own * scale)
    view.denoiser = view._build_denoiser()
    return view


def _set_scale(network: Any, block: str, scale: float) -> None:
    """As ``set_ip_adapter_scale`` does for an entry of its dictionaries."""
    known = {name: each for name, each in network.attn_processors.items() if hasattr(each, "to_k_ip")}
    found = [each for name, each in known.items() if name.startswith(f"{block}.")]
    for each in found:
        each.scale = [scale] * len(each.scale)
    if not found:
        some = ", ".join(sorted({name.split(".transformer_blocks")[0] for name in known}))
        raise ValueError(f"there is no block {block!r} with an image prompt; wanted some of {some}")


def _sharing(network: nn.Module) -> nn.Module:
    """A copy of the modules that shares every tensor of the network's own type."""
    dtype = next(network.parameters()).dtype
    own = chain(network.parameters(), network.buffers())
    return copy.deepcopy(network, {id(each): each for each in own if each.dtype == dtype})


def read_adapter(file: str | Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, str]]:
    """Weights as diffusers wants them, and the file's metadata. Raises ValueError for any other file."""
    state: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    try:
        with safe_open(str(file), "pt") as opened:
            for name in opened.keys():  # noqa: SIM118, which is no mapping
                part, _, rest = name.partition(".")
                state.setdefault(part, {})[rest] = opened.get_tensor(name)
            metadata = opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is not a safetensors file that can be read ({error})") from error
    if set(state) != {"image_proj", "ip_adapter"} or not all(state.values()):
        raise ValueError(f"{file} has the parts {', '.join(sorted(state))}; wanted image_proj and ip_adapter, filled")
    if "proj.weight" not in state["image_proj"]:
        raise ValueError(f"{file} is a Plus, Full or FaceID adapter; wanted a plain one, which takes CLIP's projection")
    return state, metadata


def encoder_folder(file: Path, metadata: Mapping[str, str]) -> Path:
    """The CLIP of an adapter: what it names from where it is, or ``image_encoder`` beside it. Raises ValueError."""
    folder = file.parent / metadata.get("image_encoder", "image_encoder")
    if not (folder / "config.json").is_file():
        raise ValueError(f"there is no CLIP in {folder}; give image_encoder, the folder of the one of this adapter")
    return folder


def image_prompted(
    model: Any,
    images: Sequence[Any],
    file: str | Path | None = None,
    scale: float = 1.0,
    *,
    image_encoder: str | Path | None = None,
    blocks: Mapping[str, float] | None = None,
    content: str = "",
    subtract: float = 1.0,
    entities: Sequence[str] = (),
) -> ImagePrompted:
    """``model`` that is shown PIL pictures; see ``adapted`` and ``ImagePrompted``. ``file``: None for
    ``ip/ip_adapter.safetensors`` beside the pipeline's own folder. ``blocks`` may name "style" and "layout", where the
    file's metadata say which block that is. ``content`` is taken out of the pictures, ``subtract`` times. Raises
    ValueError."""
    path = Path(model.pipe.name_or_path).parent / "ip" / "ip_adapter.safetensors" if file is None else Path(file)
    if not path.is_file():
        raise ValueError(f"there is no file {path}; wanted an IP-Adapter in diffusers' format (ip_adapter)")
    metadata = read_adapter(path)[1]
    named = {metadata.get(name, name): own for name, own in (blocks or {}).items()}
    clip = Clip(encoder_folder(path, metadata) if image_encoder is None else image_encoder)
    embedded = clip.images(images)
    if content:
        embedded = without_content(embedded, clip.text(content), subtract)
    return ImagePrompted(adapted(model, path, scale, named), embedded, entities)
