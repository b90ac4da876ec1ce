"""The half of ``base.TextToImage`` that all latent diffusers pipelines share; a family adds its schedule and calls."""

from __future__ import annotations

import copy
import sys
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from tropism.base import WORDS, Denoiser, Hops
from tropism.models.adapters import Trained
from tropism.models.few_step import scheduler_lines
from tropism.models.onednn import twin, twin_pays
from tropism.models.phrases import token_phrases, word_places
from tropism.models.trainable import Trainable, clamped


class About(NamedTuple):
    """A line of ``tropism models``: what a family is, in a few words each."""

    title: str  # the published models that are of this family
    says: str  # what the network predicts, on which path
    guidance: str
    steps: str  # how many moves it is made for
    methods: str
    adapter: str = "diffusers"  # whose format a LoRA is saved in


CONSISTENCY = ("LCMScheduler", "FlowMatchLCMScheduler")
FEW_STEPS = 4  # of a consistency model, as diffusers' LCM pipeline
ALL, NO_FLOW = "all but lasro, rlcm", "all but flow-grpo, lasro, rlcm, scm"


def is_consistency(pipe: Any) -> bool:
    """Whether the network answers with the clean sample at once, as LCM's."""
    return type(pipe.scheduler).__name__ in CONSISTENCY


class LatentPipeline(Trainable):
    """A diffusers pipeline, in the words of ``base.TextToImage``.

    ``pipe`` is the pipeline itself: nothing in it is replaced (``drop_text_encoders`` takes those out, when asked), its
    networks are put in evaluation mode (no dropout, ever) and frozen; ``add_lora`` or ``train_full`` then says what is
    trained. ``guidance_scale`` and ``steps`` are the defaults of the pipeline unless given. ``image_size`` is height
    and width in pixels, its own unless given, in multiples of what one latent cell (or patch) covers. Device and dtype
    are chosen before, on the pipeline.

    On a CPU with AVX-512 the denoiser is a twin of the network (see ``models.onednn``) unless ``onednn`` is False: same
    tensors, results equal up to rounding, first-order gradients only. It is made at the first call, and attention
    processors that the network gets later are not in it.
    """

    about: ClassVar[About]
    default_guidance: ClassVar[float]
    default_steps: ClassVar[int]
    attention_targets: ClassVar[tuple[str, ...]]  # of the class here
    borrows = False  # whether its folder lacks parts, which came from another

    def __init__(
        self,
        pipe: Any,
        *,
        guidance_scale: float | None = None,
        steps: int | None = None,
        negative_prompt: str = "",
        image_size: tuple[int, int] | None = None,
        onednn: bool = True,
    ) -> None:
        self.check(pipe)
        super().__init__(pipe)
        self.onednn = onednn
        usual_guidance, usual_steps = self.defaults(pipe)
        self.steps = usual_steps if steps is None else steps
        self.negative_prompt = negative_prompt
        self._guidance_scale = usual_guidance if guidance_scale is None else guidance_scale
        self._twins: dict[nn.Module, nn.Module] = {}
        for module in pipe.components.values():
            if isinstance(module, nn.Module):
                module.eval().requires_grad_(False)
        self.image_size, self.latent_shape = image_size, self._latent_shape(image_size)
        self.denoiser = self._build_denoiser()

    # What a family adds.

    @classmethod
    @abstractmethod
    def check(cls, pipe: Any) -> None:
        """Raises ValueError, in one sentence, for a pipeline of this class that works differently."""

    @abstractmethod
    def _build_denoiser(self) -> Denoiser: ...

    @classmethod
    @abstractmethod
    def few_step_scheduler(cls, scheduler: Any, hops: Hops, steps: int) -> Any:
        """The scheduler with which plain diffusers draws in these moves, from that of the teacher."""

    @classmethod
    def takes_guidance(cls, pipe: Any) -> bool:
        """Whether the network is told the guidance, instead of being asked twice."""
        return False

    @classmethod
    def defaults(cls, pipe: Any) -> tuple[float, int]:
        """Guidance and steps of the pipeline when it is not told any.

        Of a consistency model few steps, guided only if it takes guidance.
        """
        if not is_consistency(pipe):
            return cls.default_guidance, cls.default_steps
        return (cls.default_guidance if cls.takes_guidance(pipe) else 1.0), FEW_STEPS

    def _decode_input(self, latents: Tensor) -> Tensor:
        """What the vae decodes."""
        return latents / float(self.pipe.vae.config.scaling_factor)

    def _latent_shape(self, image_size: tuple[int, int] | None) -> tuple[int, ...]:
        config: Any = self._net.config
        size = config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return config.in_channels, *self._cells(image_size, (height, width), int(config.get("patch_size", 1) or 1))

    def _cells(self, image_size: tuple[int, int] | None, usual: tuple[int, int], patch: int) -> tuple[int, int]:
        """Height and width in latent cells. Raises ValueError for pixels that are not whole patches."""
        if image_size is None:
            return usual
        factor = int(self.pipe.vae_scale_factor)
        cell = factor * patch
        if any(length < cell or length % cell for length in image_size):
            raise ValueError(f"image_size {image_size} must be two positive multiples of {cell} pixels")
        return image_size[0] // factor, image_size[1] // factor

    # base.TextToImage

    @property
    def guidance_scale(self) -> float:
        """The default; 1 is no guidance."""
        return self._guidance_scale

    def _network(self) -> nn.Module:
        """What is called: the network with its adapter, or the twin of that."""
        net = super()._network()
        if not self.onednn:
            return net
        if net not in self._twins:
            self._twins[net] = twin(net) if twin_pays(net) else net
        return self._twins[net]

    def bare_network(self) -> nn.Module:
        """The network with its adapter; from now on it is called itself, and no twin."""
        self.onednn = False
        return self._network()

    def phrases(self, prompts: Sequence[str]) -> Tensor:
        """(B, L) int64: the phrase of each token of cond["prompt_embeds"], -1 for none (start, end, padding, T5's)."""
        return self._by_token(prompts, lambda tokens: token_phrases(self.pipe.tokenizer, prompts, tokens), -1)

    def word_places(self, prompts: Sequence[str], word: str) -> Tensor:
        """(B, L) bool: where ``word`` is first among the tokens of each prompt. Raises ValueError for a word of several
        tokens, and for a prompt without it."""
        return self._by_token(prompts, lambda tokens: word_places(self.pipe.tokenizer, prompts, word, tokens), False)

    def _by_token(self, prompts: Sequence[str], find: Callable[[int], Tensor], nothing: int) -> Tensor:
        """(B, L) of cond["prompt_embeds"]: what ``find`` says of the tokenizer's tokens, ``nothing`` of all others."""
        length = self.encode(prompts)[WORDS].shape[1]
        tokens = min(length, int(self.pipe.tokenizer.model_max_length))
        return torch.nn.functional.pad(find(tokens), (0, length - tokens), value=nothing)

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) -> images (B, 3, H, W) in [0, 1], float32; keeps the graph.

        Values are clamped as the pipeline clamps them, but the gradient passes as if they were not: under the clamp's
        own gradient a saturated pixel could never come back.
        """
        scaled = self._decode_input(latents).to(self.pipe.vae.dtype)
        image = self.pipe.vae.decode(scaled, return_dict=False)[0]
        return clamped(image.float() * 0.5 + 0.5)

    @torch.no_grad()
    def latents(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, C, h, w), the mode of the encoder's law. Raises ValueError for another size."""
        found = self._vae_latents(images)
        if tuple(found.shape[1:]) != self.latent_shape:
            raise ValueError(
                f"pictures of {tuple(images.shape[2:])} pixels give latents {tuple(found.shape[1:])}; wanted "
                f"{self.latent_shape}: scale them, or give image_size"
            )
        return self._encoded(found)

    def _vae_latents(self, images: Tensor) -> Tensor:
        """What the encoder itself says of images (B, 3, H, W), float32."""
        vae = self.pipe.vae
        encoded = vae.encode((images.to(self.device) * 2 - 1).to(vae.dtype))
        found: Tensor = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
        return found.float()

    def _encoded(self, latents: Tensor) -> Tensor:
        """What ``_decode_input`` undoes."""
        config = self.pipe.vae.config
        return (latents - float(config.get("shift_factor") or 0.0)) * float(config.scaling_factor)

    def be_told(self) -> None:
        """As of any model; nothing is left to do for a network that takes guidance as it is."""
        if not self.takes_guidance(self.pipe):
            super().be_told()

    def _few_step_view(self, hops: Hops, steps: int) -> Self:
        view = copy.copy(self)
        view.pipe = copy.copy(self.pipe)
        view.pipe.scheduler = self.few_step_scheduler(self.pipe.scheduler, hops, steps)
        view.check(view.pipe)
        view._guidance_scale = self.guidance_scale if self.takes_guidance(self.pipe) else 1.0
        view.denoiser = view._build_denoiser()
        return view

    # Memory.

    def _train(self, trained: Trained) -> None:
        super()._train(trained)
        self._twins = {}

    def enable_gradient_checkpointing(self) -> None:
        """Trades time for memory in the denoising network and the image decoder wherever a graph is kept."""
        self.pipe.components[self.part].enable_gradient_checkpointing()
        self._twins = {}
        self.pipe.vae.enable_gradient_checkpointing()

    def enable_vae_slicing(self) -> None:
        """Decodes one image at a time. A graph through the decoder stays as large as it is."""
        self.pipe.vae.enable_slicing()

    def _forget_encoders(self) -> None:
        for name in self.pipe.components:
            if name.startswith("text_encoder"):
                setattr(self.pipe, name, None)

    def to(self, device: torch.device, dtype: torch.dtype) -> LatentPipeline:
        """The whole pipeline there."""
        self.pipe.to(device, dtype)
        self._dtype, self._twins = dtype, {}
        return self

    def output(self, images: Any) -> Any:
        """As ``pipe`` returns them: the one kind of output that the pipeline's own module knows."""
        known = vars(sys.modules[type(self.pipe).__module__])
        kinds = [kind for name, kind in known.items() if name.endswith("PipelineOutput")]
        assert len(kinds) == 1, f"{type(self.pipe).__name__} has {len(kinds)} kinds of output"
        first, *others = (field.name for field in fields(kinds[0]))
        return kinds[0](**{first: images} | dict.fromkeys(others))

    def use(self, base: str, adapter: str, full: bool, prompt: str) -> list[str]:
        """Lines of Python that draw ``prompt`` in plain diffusers (and PEFT); here, where it borrows parts."""
        kind = type(self.pipe.components[self.part]).__name__
        lines = ["from diffusers import DiffusionPipeline", "", f"pipe = DiffusionPipeline.from_pretrained({base})"]
        if self.borrows:
            lines[2] = f"pipe = load_pipeline({base}).pipe"
            lines.insert(1, "from tropism.models.pipelines import load_pipeline")
        if full:
            lines[0] = f"from diffusers import DiffusionPipeline, {kind}"
            lines.append(f'pipe.{self.part} = {kind}.from_pretrained("{adapter}/{self.part}")')
        elif hasattr(self.pipe, "load_lora_weights"):
            lines.append(f'pipe.load_lora_weights("{adapter}")  # the folder beside this file')
        else:
            lines.insert(1, "from peft import PeftModel")
            lines.append(f'pipe.{self.part} = PeftModel.from_pretrained(pipe.{self.part}, "{adapter}")')
        if self.hops is not None:
            lines[0:0], lines[len(lines) :] = scheduler_lines(self.pipe.scheduler)
        call = f"{prompt!r}, num_inference_steps={self.steps}, guidance_scale={self.guidance_scale:g}"
        if self.image_size is not None:
            call += f", height={self.image_size[0]}, width={self.image_size[1]}"
        return [*lines, f'pipe({call}).images[0].save("image.png")']
