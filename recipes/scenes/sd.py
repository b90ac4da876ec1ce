"""Train the Stable-Diffusion-shaped pipeline of scenes: UNet and CLIP text encoder together, on cached latents.

v-prediction on a scaled-linear table, captions dropped one time in ten for classifier-free guidance.
Matrices are stepped by Muon, everything else by AdamW; the network runs in bf16 over float32 master weights.

    python recipes/scenes/sd.py --latents ~/scenes-weights/latents.safetensors --vae ~/scenes-weights/vae/final \
        --out ~/scenes-weights/sd
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from fit import arguments, begin, fit
from text import build_tokenizer, text_config
from torch import Tensor, nn
from transformers import CLIPTextModel

WIDTH = 128  # of the text encoder


def scheduler() -> DDIMScheduler:
    """Stable Diffusion's table with a longer tail, walked from its last entry.

    At Stable Diffusion's own beta_end (0.012) the noisiest entry has SNR 0.0047: over 512 dimensions that shows the
    network how many objects there are, which pure noise then fakes when sampling. At 0.02 the SNR is 0.0002.
    """
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.02,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        timestep_spacing="trailing",
    )


def build_unet() -> UNet2DConditionModel:
    """One resolution (8x8) and wide transformer blocks: matrix products are what a CPU does well."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=8,
        out_channels=8,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        mid_block_type="UNetMidBlock2DCrossAttn",
        block_out_channels=(192,),
        layers_per_block=1,
        transformer_layers_per_block=2,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        use_linear_projection=True,
    )


class Network(nn.Module):
    """The two trained parts as one module."""

    def __init__(self, unet: nn.Module, text: nn.Module) -> None:
        super().__init__()
        self.unet, self.text = unet, text

    def forward(self, x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        hidden = self.text(ids).last_hidden_state
        return self.unet(x, t, hidden, return_dict=False)[0]


def v_loss(network: nn.Module, latents: Tensor, ids: Tensor, generator: torch.Generator, alphas: Tensor) -> Tensor:
    """Mean squared error of v = alpha eps - sigma x0 at uniform times."""
    count = latents.shape[0]
    t = torch.randint(0, len(alphas), (count,), generator=generator)
    eps = torch.randn(latents.shape, generator=generator)
    alpha = alphas[t].sqrt()[:, None, None, None]
    sigma = (1 - alphas[t]).sqrt()[:, None, None, None]
    noisy = (alpha * latents + sigma * eps).bfloat16().contiguous(memory_format=torch.channels_last)
    predicted = network(noisy, t, ids).float()
    return (predicted - (alpha * eps - sigma * latents)).square().mean()


def export(network: Network, vae_folder: Path, folder: Path) -> None:
    vae = AutoencoderTiny.from_pretrained(vae_folder)
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=network.text,
        tokenizer=build_tokenizer(),
        unet=network.unet,
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.to(dtype=torch.float16)
    for encoder in (pipe.text_encoder,):
        encoder.float()  # transformers loads what is stored, diffusers float32: a plain load must not mix them
    pipe.save_pretrained(folder, safe_serialization=True)


def prepare(network: Network) -> None:
    network.unet.set_attn_processor(AttnProcessor())  # the fused kernel's backward is slow on a CPU


def main() -> None:
    args = arguments(__doc__, steps=4800)
    torch.manual_seed(args.seed)
    network = Network(build_unet(), CLIPTextModel(text_config(build_tokenizer(), WIDTH, 3))).eval()
    stepper = begin(args, network)
    alphas = scheduler().alphas_cumprod
    if args.export:
        stepper.load(args.out)
    else:
        fit(args, stepper, prepare, lambda *batch: v_loss(*batch, alphas=alphas))
    stepper.average.copy_to(network)
    export(network, args.vae, args.out / "pipeline")


if __name__ == "__main__":
    main()
