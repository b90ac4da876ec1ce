"""Train motion modules for scenes-sd on drawn clips of moving scenes; the image model inside stays as it is.

AnimateDiff (2307.04725): a temporal transformer after every block of the UNet, its output zero at first. Learnt besides
are the text encoder's rows for the words that only clips have. v-prediction with noise of its own in every frame, more
often at high noise, where it is decided what moves where. bf16 over float32 weights, Muon for matrices.

    python recipes/scenes/motion.py --out ~/scenes-weights/motion --steps 400
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from common import Average, Log, cosine, load_state, minibatches, save_state, to_tensor
from diffusers import AutoencoderTiny, MotionAdapter, UNet2DConditionModel, UNetMotionModel
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file, save_file
from sd import scheduler
from text import tokenize
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AddedToken, CLIPTextModel, CLIPTokenizer

from tropism.catalog import WEIGHTS
from tropism.worlds.moving import FRAMES, caption, render_batch, sample_clip, words

BASE = WEIGHTS / "sd"
TABLE = "embeddings.token_embedding.weight"


def tokenizer() -> CLIPTokenizer:
    """That of scenes-sd, with the words of the motions at the end of its table."""
    made = CLIPTokenizer.from_pretrained(BASE / "tokenizer")
    made.add_tokens([AddedToken(word, single_word=True) for word in words() if word != ","])
    return made


def adapter() -> MotionAdapter:
    """2.4 million weights: a temporal transformer after each of the three blocks with layers of their own."""
    made = MotionAdapter(
        block_out_channels=(192,),
        motion_layers_per_block=1,
        motion_num_attention_heads=4,
        motion_norm_num_groups=32,
        motion_max_seq_length=FRAMES,
        use_motion_mid_block=False,
    )
    for name, weight in made.named_parameters():
        if ".proj_out." in name:  # of a module; diffusers leaves that to whoever trains
            nn.init.zeros_(weight)
    return made


class Learnt(nn.Module):
    """The float32 weights that are stepped: the motion modules, and rows (8, width) of the text encoder's table."""

    def __init__(self, width: int, spread: float) -> None:
        super().__init__()
        self.motion = adapter()
        self.rows = nn.Parameter(torch.randn(len(words()), width) * spread)


class Clips:
    """The whole model: what is learnt, inside frozen bf16 copies of the image model and its text encoder."""

    def __init__(self) -> None:
        self.tokenizer = tokenizer()
        self.text = CLIPTextModel.from_pretrained(BASE / "text_encoder", dtype=torch.float32).eval()
        table = self.text.get_input_embeddings().weight.detach()
        self.text.resize_token_embeddings(len(self.tokenizer), mean_resizing=False)
        self.text.requires_grad_(False)
        self.places = torch.tensor(self.tokenizer.convert_tokens_to_ids([",</w>", *words()[1:]]))
        self.learnt = Learnt(table.shape[1], float(table.std()))
        spatial = UNet2DConditionModel.from_pretrained(BASE / "unet", torch_dtype=torch.float32)
        self.net = UNetMotionModel.from_unet2d(spatial, self.learnt.motion).bfloat16().eval()
        self.net.freeze_unet2d_params()
        self.net.set_attn_processor(AttnProcessor())  # the fused kernel's backward is slow on a CPU
        copies = dict(self.net.named_parameters())
        self.pairs = [(weight, copies[name]) for name, weight in self.learnt.motion.named_parameters()]

    def hidden(self, ids: Tensor) -> Tensor:
        """(B, L) -> (B, L, width), with a gradient to the rows."""
        return functional_call(self.text, {TABLE: self.table()}, (ids,)).last_hidden_state

    def table(self) -> Tensor:
        """All rows of the text encoder's table."""
        return self.text.get_input_embeddings().weight.detach().index_copy(0, self.places, self.learnt.rows)

    def __call__(self, x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        """x (B, C, F, h, w), t (B,), ids (B, L) -> v as x."""
        hidden = self.hidden(ids).bfloat16().repeat_interleave(x.shape[2], 0)
        return self.net(x.bfloat16(), t, hidden, return_dict=False)[0].float()

    @torch.no_grad()
    def push(self) -> None:
        """The stepped weights, into the copies that run."""
        for weight, copy in self.pairs:
            copy.copy_(weight)

    @torch.no_grad()
    def pull(self) -> None:
        """The gradients of the copies, to the weights that are stepped."""
        for weight, copy in self.pairs:
            weight.grad, copy.grad = None if copy.grad is None else copy.grad.float(), None


def loss_of(clips: Clips, latents: Tensor, ids: Tensor, generator: torch.Generator, alphas: Tensor) -> Tensor:
    """Mean squared error of v at times whose density rises linearly with the noise; latents (B, C, F, h, w)."""
    t = (len(alphas) * torch.rand(len(latents), generator=generator).sqrt()).long().clamp(max=len(alphas) - 1)
    eps = torch.randn(latents.shape, generator=generator)
    alpha, sigma = (each[t].sqrt()[:, None, None, None, None] for each in (alphas, 1 - alphas))
    said = clips(alpha * latents + sigma * eps, t, ids)
    return (said - (alpha * eps - sigma * latents)).square().mean()


@torch.no_grad()
def cache(file: Path, count: int, seed: int, tokens: CLIPTokenizer) -> dict[str, Tensor]:
    """``count`` drawn clips: latents (N, C, F, h, w) in fp16 and token ids (N, L); made once and kept."""
    if not file.exists():
        vae = AutoencoderTiny.from_pretrained(BASE / "vae", torch_dtype=torch.bfloat16).eval()
        rng, latents, texts = np.random.default_rng(seed), [], []
        for _ in range(0, count, 50):
            drawn = [sample_clip(rng) for _ in range(50)]
            frames = to_tensor(render_batch(drawn, rng.integers(0, 2**31, 50)).reshape(-1, 64, 64, 3))
            encoded = vae.encoder(frames.bfloat16().contiguous(memory_format=torch.channels_last)).half()
            latents.append(encoded.unflatten(0, (50, FRAMES)).transpose(1, 2))
            texts += [caption(clip) for clip in drawn]
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"latents": torch.cat(latents).contiguous(), "ids": tokenize(tokens, texts)}, file)
    return load_file(file)


def fit(args: argparse.Namespace, clips: Clips) -> Average:
    """Trains, going on from what was saved; the averaged weights."""
    matrices = [p for name, p in clips.learnt.named_parameters() if p.ndim == 2 and name != "rows"]
    others = [p for name, p in clips.learnt.named_parameters() if p.ndim != 2]
    muon = torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW([*others, clips.learnt.rows], lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0)
    average = Average(clips.learnt, 0.98)
    state = ({"learnt": clips.learnt}, {"learnt": average}, {"muon": muon, "adam": adam})
    first, log = load_state(args.out, *state), Log(args.out)
    data = cache(args.out / "clips.safetensors", args.clips, args.seed, clips.tokenizer)
    empty, alphas = tokenize(clips.tokenizer, [""])[0], scheduler().alphas_cumprod
    order = minibatches(len(data["latents"]), args.batch, np.random.default_rng(args.seed))
    chosen = [next(order) for _ in range(args.steps)]
    clips.push()
    for step in range(first, args.steps):
        generator = torch.Generator().manual_seed(args.seed * 10**7 + step)
        rows = torch.from_numpy(chosen[step])
        ids = data["ids"][rows].clone()
        ids[torch.rand(len(rows), generator=generator) < 0.1] = empty  # for classifier-free guidance
        value = loss_of(clips, data["latents"][rows].float(), ids, generator, alphas)
        value.backward()
        clips.pull()
        norm = nn.utils.clip_grad_norm_(clips.learnt.parameters(), 1.0)
        for optimizer in (muon, adam):
            for group in optimizer.param_groups:
                group["lr"] = args.lr * cosine(step, args.steps, 10)
            optimizer.step()
            optimizer.zero_grad()
        clips.push()
        average.update(clips.learnt, step)
        log(step=step + 1, loss=round(value.item(), 5), norm=round(float(norm), 3))
        if (step + 1) % 20 == 0 or step + 1 == args.steps:
            save_state(args.out, step + 1, *state)
    return average


def export(clips: Clips, folder: Path) -> None:
    """A pipeline of its own parts alone: motion modules in fp16, text encoder and tokenizer with new words; the rest is
    scenes-sd's."""
    clips.learnt.motion.half().save_pretrained(folder / "motion_adapter", safe_serialization=True)
    clips.text.get_input_embeddings().weight.copy_(clips.table())
    clips.text.save_pretrained(folder / "text_encoder", safe_serialization=True)
    clips.tokenizer.save_pretrained(folder / "tokenizer")
    shutil.copytree(BASE / "scheduler", folder / "scheduler", dirs_exist_ok=True)
    index = json.loads((BASE / "model_index.json").read_text())
    for name in ("safety_checker", "requires_safety_checker"):
        index.pop(name)
    index |= {"_class_name": "AnimateDiffPipeline", "motion_adapter": ["diffusers", "MotionAdapter"]}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    told = {"guidance_scale": 3.0, "steps": 20, "base": os.path.relpath(BASE, folder)}
    (folder / "tropism.json").write_text(json.dumps(told) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=8, help="clips of a step")
    parser.add_argument("--clips", type=int, default=3000, help="different clips that are drawn")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--export", action="store_true", help="only write the pipeline of the saved state")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    clips = Clips()
    average = Average(clips.learnt, 0.98)
    if args.export:
        optimizers: dict[str, torch.optim.Optimizer] = {}
        load_state(args.out, {"learnt": clips.learnt}, {"learnt": average}, optimizers)
    else:
        average = fit(args, clips)
    average.copy_to(clips.learnt)
    with torch.no_grad():
        export(clips, args.out / "pipeline")


if __name__ == "__main__":
    main()
