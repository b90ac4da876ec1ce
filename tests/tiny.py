"""Tiny diffusers pipelines with random weights and a tokenizer of their own: nothing is downloaded, a build takes well
under a second, a saved folder weighs a few hundred KB, and the same seed gives the same weights.

``sd_pipeline`` and ``sd3_pipeline`` return real ``StableDiffusionPipeline`` and ``StableDiffusion3Pipeline`` objects
whose images are 16 x 16; ``sd_folder`` and ``sd3_folder`` save one and return the folder. The random weights make no
pictures: these pipelines are for checking equalities, shapes and gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    MotionAdapter,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

TOKENS = 16  # length of every encoded prompt
LATENT_SHAPE = (4, 8, 8)
IMAGE_SIZE = 16  # height and width in pixels
PROMPTS = ["a red fox", "two blue cubes"]

SD_SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "prediction_type": "epsilon",
}


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, torch draws from ``seed``; afterwards the global generator is where it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def noise(batch: int, seed: int = 0) -> torch.Tensor:
    """(batch, 4, 8, 8) standard normal latents."""
    return torch.randn((batch, *LATENT_SHAPE), generator=torch.Generator().manual_seed(seed))


def clip_tokenizer() -> CLIPTokenizer:
    """Spells words letter by letter: every byte, every byte at the end of a word, begin and end."""
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[], model_max_length=TOKENS)


def t5_tokenizer() -> T5Tokenizer:
    """A unigram model of printable ASCII letters."""
    words = ["<pad>", "</s>", "<unk>", "▁", *(chr(code) for code in range(33, 127))]
    return T5Tokenizer(vocab=[(word, -2.0) for word in words], extra_ids=0, model_max_length=512)


def _clip_config(width: int, tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_factor=5.0,  # so that two prompts differ
    )


def _vae(scaling_factor: float, shift_factor: float | None) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=LATENT_SHAPE[0],
        sample_size=IMAGE_SIZE,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
    )


def _unet(**config: Any) -> UNet2DConditionModel:
    usual = dict(
        sample_size=LATENT_SHAPE[1],
        in_channels=LATENT_SHAPE[0],
        out_channels=LATENT_SHAPE[0],
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=4,
    )
    return UNet2DConditionModel(**{**usual, **config})


def sd_pipeline(seed: int = 0, **scheduler: Any) -> Any:
    """An SD-shaped pipeline with a DDIM scheduler; ``scheduler`` replaces entries of ``SD_SCHEDULER``."""
    tokenizer = clip_tokenizer()
    with seeded(seed):
        pipe = StableDiffusionPipeline(
            vae=_vae(0.18215, None),
            text_encoder=CLIPTextModel(_clip_config(16, tokenizer)),
            tokenizer=tokenizer,
            unet=_unet(),
            scheduler=DDIMScheduler(**{**SD_SCHEDULER, **scheduler}),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    return _quiet(pipe)


FRAMES = 3


def animatediff_pipeline(seed: int = 0, **scheduler: Any) -> Any:
    """``sd_pipeline`` with motion modules, for clips of three frames."""
    pipe = sd_pipeline(seed, **scheduler)
    with seeded(seed + 1):
        adapter = MotionAdapter(
            block_out_channels=(8, 16),
            motion_layers_per_block=1,
            motion_num_attention_heads=2,
            motion_norm_num_groups=4,
            motion_max_seq_length=FRAMES,
        )
    parts = {name: getattr(pipe, name) for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}
    return _quiet(AnimateDiffPipeline(**parts, motion_adapter=adapter))


def _transformer(width: int) -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=LATENT_SHAPE[1],
        patch_size=2,
        in_channels=LATENT_SHAPE[0],
        out_channels=LATENT_SHAPE[0],
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=width,
        caption_projection_dim=16,
        pooled_projection_dim=16 + 8,
        pos_embed_max_size=LATENT_SHAPE[1],
    )


def sd3_pipeline(seed: int = 0, t5: bool = False, **scheduler: Any) -> Any:
    """An SD3-shaped pipeline (two projecting CLIPs, shift 3); without ``t5`` its third text encoder is None."""
    tokenizer, t5_tokens = clip_tokenizer(), t5_tokenizer() if t5 else None
    with seeded(seed):
        pipe = StableDiffusion3Pipeline(
            transformer=_transformer(32),
            scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **scheduler}),
            vae=_vae(1.5305, 0.0609),
            text_encoder=CLIPTextModelWithProjection(_clip_config(16, tokenizer)),
            tokenizer=tokenizer,
            text_encoder_2=CLIPTextModelWithProjection(_clip_config(8, tokenizer)),
            tokenizer_2=clip_tokenizer(),
            text_encoder_3=None if t5_tokens is None else _t5(t5_tokens),
            tokenizer_3=t5_tokens,
        )
    return _quiet(pipe)


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    return pipe


def lcm_pipeline(seed: int = 0, **scheduler: Any) -> Any:
    """``sd_pipeline`` as a latent consistency model: LCM's scheduler, and a UNet that takes guidance as an input."""
    tokenizer = clip_tokenizer()
    with seeded(seed):
        pipe = LatentConsistencyModelPipeline(
            vae=_vae(0.18215, None),
            text_encoder=CLIPTextModel(_clip_config(16, tokenizer)),
            tokenizer=tokenizer,
            unet=_unet(time_cond_proj_dim=8),
            scheduler=LCMScheduler(**scheduler),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    return _quiet(pipe)


def sdxl_pipeline(seed: int = 0, zeros: bool = True, unet: dict[str, Any] | None = None, **scheduler: Any) -> Any:
    """An SDXL-shaped pipeline with a DDIM scheduler; ``zeros``: its empty prompt is zeros."""
    tokenizer = clip_tokenizer()
    told = dict(
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 8,
        cross_attention_dim=16 + 8,
    )
    with seeded(seed):
        pipe = StableDiffusionXLPipeline(
            vae=_vae(0.13025, None),
            text_encoder=CLIPTextModel(_clip_config(16, tokenizer)),
            text_encoder_2=CLIPTextModelWithProjection(_clip_config(8, tokenizer)),
            tokenizer=tokenizer,
            tokenizer_2=clip_tokenizer(),
            unet=_unet(**{**told, **(unet or {})}),
            scheduler=DDIMScheduler(**{**SD_SCHEDULER, **scheduler}),
            force_zeros_for_empty_prompt=zeros,
            add_watermarker=False,
        )
    return _quiet(pipe)


def _t5(tokenizer: T5Tokenizer, width: int = 32) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    )


def flux_pipeline(seed: int = 0, guidance: bool = True, **scheduler: Any) -> Any:
    """A FLUX.1-shaped pipeline: as dev, or without ``guidance`` as schnell. Its default image is 16 x 16."""
    tokenizer, t5_tokens = clip_tokenizer(), t5_tokenizer()
    usual = {"shift": 3.0, "use_dynamic_shifting": True} if guidance else {"shift": 1.0}
    with seeded(seed):
        pipe = FluxPipeline(
            transformer=FluxTransformer2DModel(
                in_channels=4 * LATENT_SHAPE[0],
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=32,
                pooled_projection_dim=16,
                guidance_embeds=guidance,
                axes_dims_rope=(4, 4, 8),
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(**{**usual, **scheduler}),
            vae=_vae(0.3611, 0.1159),
            text_encoder=CLIPTextModel(_clip_config(16, tokenizer)),
            tokenizer=tokenizer,
            text_encoder_2=_t5(t5_tokens),
            tokenizer_2=t5_tokens,
        )
    pipe.default_sample_size = LATENT_SHAPE[1]
    return _quiet(pipe)


def pixart_pipeline(seed: int = 0, sigma: bool = False, **scheduler: Any) -> Any:
    """A PixArt-shaped pipeline with a DDIM scheduler: alpha, which is told sizes, or ``sigma``, which is not.

    The transformer of alpha is built for 256 x 256, as one that is told sizes has to be; ask for 16 x 16.
    """
    tokenizer = t5_tokenizer()
    kind = PixArtSigmaPipeline if sigma else PixArtAlphaPipeline
    with seeded(seed):
        pipe = kind(
            tokenizer=tokenizer,
            text_encoder=_t5(tokenizer),
            vae=_vae(0.18215, None),
            transformer=PixArtTransformer2DModel(
                sample_size=LATENT_SHAPE[1] if sigma else 128,
                num_attention_heads=2,
                attention_head_dim=12,
                in_channels=LATENT_SHAPE[0],
                out_channels=2 * LATENT_SHAPE[0],
                num_layers=2,
                cross_attention_dim=24,
                norm_num_groups=4,
                caption_channels=32,
            ),
            scheduler=DDIMScheduler(**{**SD_SCHEDULER, "beta_schedule": "linear", "beta_start": 1e-4, **scheduler}),
        )
    return _quiet(pipe)


def sd_folder(folder: str | Path, seed: int = 0, **scheduler: Any) -> Path:
    """``sd_pipeline`` saved in ``folder``."""
    sd_pipeline(seed, **scheduler).save_pretrained(folder, safe_serialization=True)
    return Path(folder)


def sd3_folder(folder: str | Path, seed: int = 0, t5: bool = False, **scheduler: Any) -> Path:
    """``sd3_pipeline`` saved in ``folder``."""
    sd3_pipeline(seed, t5, **scheduler).save_pretrained(folder, safe_serialization=True)
    return Path(folder)
