"""Train motion modules for scenes-sd on drawn clips of moving scenes; the image model inside stays as it is.

AnimateDiff (2307.04725): a temporal transformer after every block of the UNet, its output zero at first. v-prediction
with noise of its own in every frame, more often at high noise, where it is decided what moves where. bf16 over float32
weights, Muon for matrices.

A departure: the text encoder is learnt too, at first alone and in the end beside the modules. Behind frozen layers,
captions that differ in the motion alone differ by 1 % in what the first motion module sees, little more than what bf16
rounds away. So at first the encoder learns to make motions tell there, without changing the picture that the frozen
layers draw.

    python recipes/scenes/motion.py --out ~/scenes-weights/motion
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Average, Log, cosine, load_state, minibatches, save_state, to_tensor
from diffusers import AutoencoderTiny, MotionAdapter, UNet2DConditionModel, UNetMotionModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.resnet import ResnetBlock2D
from safetensors.torch import load_file, save_file
from sd import scheduler
from text import tokenize
from torch import Tensor, nn
from transformers import AddedToken, CLIPTextModel, CLIPTokenizer

from tropism.catalog import WEIGHTS
from tropism.worlds.moving import FRAMES, MOTIONS, Clip, caption, render_batch, sample_clip, words
from tropism.worlds.scenes import parse as parse_scene

BASE = WEIGHTS / "sd"
APART = 0.2  # standard deviations of a feature, between any two motions, that stage 1 asks for


def tokenizer() -> CLIPTokenizer:
    """That of scenes-sd, with the words of the motions at the end of its table."""
    made = CLIPTokenizer.from_pretrained(BASE / "tokenizer")
    made.add_tokens([AddedToken(word, single_word=True) for word in words() if word != ","])
    return made


def adapter() -> MotionAdapter:
    """3.3 million weights: a temporal transformer after each of the four blocks."""
    made = MotionAdapter(
        block_out_channels=(192,),
        motion_layers_per_block=1,
        motion_num_attention_heads=4,
        motion_norm_num_groups=32,
        motion_max_seq_length=FRAMES,
        use_motion_mid_block=True,
    )
    for name, weight in made.named_parameters():
        if ".proj_out." in name:  # of a module; diffusers leaves that to whoever trains
            nn.init.zeros_(weight)
    return made


class Learnt(nn.Module):
    """The float32 weights that are stepped: the motion modules and the text encoder."""

    def __init__(self, text: CLIPTextModel) -> None:
        super().__init__()
        self.motion, self.text = adapter(), text


class Clips:
    """The whole model: what is learnt, with a frozen bf16 copy of the image model."""

    def __init__(self) -> None:
        self.tokenizer = tokenizer()
        text = CLIPTextModel.from_pretrained(BASE / "text_encoder", dtype=torch.float32).eval()
        self.before = copy.deepcopy(text).requires_grad_(False)
        rows, spread = len(text.get_input_embeddings().weight), text.get_input_embeddings().weight.std()
        text.resize_token_embeddings(len(self.tokenizer), mean_resizing=False)
        with torch.no_grad():
            table = text.get_input_embeddings().weight
            table[rows:] = torch.randn(table[rows:].shape) * spread
        self.learnt = Learnt(text)
        spatial = UNet2DConditionModel.from_pretrained(BASE / "unet", torch_dtype=torch.float32)
        self.net = UNetMotionModel.from_unet2d(spatial, self.learnt.motion).bfloat16().eval()
        self.net.freeze_unet2d_params()
        self.net.set_attn_processor(AttnProcessor())  # the fused kernel's backward is slow on a CPU
        self._times: list[Tensor] = []
        for block in self.net.modules():
            if isinstance(block, ResnetBlock2D):
                block.register_forward_pre_hook(self._told, with_kwargs=True)
        copies = dict(self.net.named_parameters())
        self.pairs = [(weight, copies[name]) for name, weight in self.learnt.motion.named_parameters()]

    def _told(self, block: nn.Module, args: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Every frame's own time, where they differ: the UNet takes one a clip, and its blocks one a frame."""
        if not self._times:
            return args, named
        numbers = self.net.time_proj(self._times[-1].flatten()).bfloat16()
        return args, {**named, "temb": self.net.time_embedding(numbers)}

    def __call__(self, x: Tensor, t: Tensor, ids: Tensor, text: CLIPTextModel | None = None) -> Tensor:
        """x (B, C, F, h, w), t (B,) or (B, F), ids (B, L) -> v as x."""
        text = self.learnt.text if text is None else text
        hidden = text(ids).last_hidden_state
        told = hidden.bfloat16().repeat_interleave(x.shape[2], 0)
        self._times = [t] if t.ndim == 2 else []
        return self.net(x.bfloat16(), t if t.ndim == 1 else t[:, 0], told, return_dict=False)[0].float()

    @torch.no_grad()
    def push(self) -> None:
        """The stepped weights, into the copies that run."""
        for weight, copied in self.pairs:
            copied.copy_(weight)

    @torch.no_grad()
    def pull(self) -> None:
        """The gradients of the copies, to the weights that are stepped."""
        for weight, copied in self.pairs:
            weight.grad, copied.grad = None if copied.grad is None else copied.grad.float(), None


def times(count: int, generator: torch.Generator) -> Tensor:
    """(count,) numbers of the table, whose density rises linearly with the noise."""
    return (1000 * torch.rand(count, generator=generator).sqrt()).long().clamp(max=999)


def noised(latents: Tensor, t: Tensor, generator: torch.Generator, alphas: Tensor) -> tuple[Tensor, Tensor]:
    """(x, v) of latents (B, C, F, h, w) at t (B,) or (B, F), every frame with noise of its own."""
    eps = torch.randn(latents.shape, generator=generator)
    t = t if t.ndim == 2 else t[:, None]
    alpha, sigma = (each[t].sqrt()[:, None, :, None, None] for each in (alphas, 1 - alphas))
    return alpha * latents + sigma * eps, alpha * eps - sigma * latents


def words_loss(
    clips: Clips, latents: Tensor, scenes: list[str], generator: torch.Generator, alphas: Tensor
) -> tuple[Tensor, dict[str, float]]:
    """Stage 1, of single frames (B, C, 1, h, w): motions tell apart where the first motion module reads, and the
    picture stays that of the caption without a motion, and of no caption at all."""
    seen: list[Tensor] = []
    hook = clips.net.down_blocks[0].register_forward_hook(lambda *call: seen.append(call[2][0].float()))
    t = times(len(latents), generator)
    x, _ = noised(latents, t, generator, alphas)
    told = [[caption_of(scene, motion) for scene in scenes] for motion in MOTIONS]
    count = len(told) + 1
    ids = tokenize(clips.tokenizer, [*itertools.chain(*told), *([""] * len(scenes))])
    said = clips(x.repeat(count, 1, 1, 1, 1), t.repeat(count), ids).unflatten(0, (count, -1))
    with torch.no_grad():
        plain = tokenize(clips.tokenizer, [*scenes, *([""] * len(scenes))])
        wanted = clips(x.repeat(2, 1, 1, 1, 1), t.repeat(2), plain, clips.before).unflatten(0, (2, -1))
    hook.remove()
    kept = (said[:-1] - wanted[0]).square().mean() + (said[-1] - wanted[1]).square().mean()
    features = seen[0].unflatten(0, (count, -1))[:-1]
    mean = features.mean((-1, -2)) / features.std((0, 1, 3, 4)).detach()
    apart = torch.stack(
        [(a - b).square().mean(-1).add(1e-8).sqrt() for a, b in itertools.combinations(mean, 2)]
    )  # (10, B)
    loss = (APART - apart).clamp(min=0).square().mean() + 2 * kept
    return loss, {"apart": apart.mean().item(), "least": apart.min().item(), "kept": kept.item()}


def caption_of(scene: str, motion: str) -> str:
    """The caption of a clip of a scene's caption."""
    return caption(Clip(parse_scene(scene), motion))


def motion_loss(
    clips: Clips, latents: Tensor, ids: Tensor, generator: torch.Generator, alphas: Tensor, mixed: int
) -> Tensor:
    """Stage 2: mean squared error of v; latents (B, C, F, h, w). In the first ``mixed`` clips every frame has a time of
    its own, so that clear frames say what others will be (diffusion forcing, Chen et al. 2024, 2407.01392)."""
    count, frames = len(latents), latents.shape[2]
    t = times(count * frames, generator).unflatten(0, (count, frames))
    t = t.where((torch.arange(count) < mixed)[:, None], t[:, :1])
    x, v = noised(latents, t, generator, alphas)
    return (clips(x, t, ids) - v).square().mean()


@torch.no_grad()
def cache(file: Path, count: int, seed: int) -> tuple[Tensor, list[str]]:
    """``count`` drawn clips: latents (N, C, F, h, w) in fp16 and captions; made once and kept."""
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
        save_file({"latents": torch.cat(latents).contiguous()}, file)
        file.with_suffix(".json").write_text(json.dumps(texts))
    return load_file(file)["latents"], json.loads(file.with_suffix(".json").read_text())


def fit(args: argparse.Namespace, clips: Clips) -> Average:
    """Trains both stages, going on from what was saved; the averaged weights."""
    learnt = clips.learnt
    matrices = [p for p in learnt.motion.parameters() if p.ndim == 2]
    others = [p for p in learnt.motion.parameters() if p.ndim != 2]
    muon = torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0)
    words = torch.optim.AdamW(learnt.text.parameters(), lr=args.text_lr, betas=(0.9, 0.98), weight_decay=0.0)
    average = Average(learnt, 0.98)
    state = ({"learnt": learnt}, {"learnt": average}, {"muon": muon, "adam": adam, "words": words})
    first, log = load_state(args.out, *state), Log(args.out)
    latents, captions = cache(args.out / "clips.safetensors", args.clips, args.seed)
    scenes, ids = [text.partition(",")[0] for text in captions], tokenize(clips.tokenizer, captions)
    empty, alphas = tokenize(clips.tokenizer, [""])[0], scheduler().alphas_cumprod
    order = minibatches(len(latents), args.batch, np.random.default_rng(args.seed))
    chosen = [next(order) for _ in range(args.words + args.steps)]
    clips.push()
    for step in range(first, args.words + args.steps):
        learnt.text.requires_grad_(step < args.words or step - args.words >= args.mixed)
        generator = torch.Generator().manual_seed(args.seed * 10**7 + step)
        rows = torch.from_numpy(chosen[step])
        told: dict[str, float] = {}
        slow = 1.0 if step < args.words else args.slow
        if step < args.words:
            used, share = [words], cosine(step, args.words, 5)
            frame = int(torch.randint(FRAMES, (), generator=generator))
            stills = latents[rows[:4], :, frame : frame + 1].float()
            value, told = words_loss(clips, stills, [scenes[row] for row in rows[:4]], generator, alphas)
        else:
            used, share = [muon, adam, words], cosine(step - args.words, args.steps, 20)
            given = ids[rows].clone()
            given[torch.rand(len(rows), generator=generator) < 0.1] = empty  # for classifier-free guidance
            mixed = len(rows) if step - args.words < args.mixed else len(rows) // 2
            value = motion_loss(clips, latents[rows].float(), given, generator, alphas, mixed)
        value.backward()
        clips.pull()
        norm = nn.utils.clip_grad_norm_(learnt.parameters(), 1.0)
        for optimizer in used:
            for group in optimizer.param_groups:
                group["lr"] = (slow * args.text_lr if optimizer is words else args.lr) * share
            optimizer.step()
        learnt.zero_grad()
        clips.push()
        average.update(learnt, max(0, step - args.words))
        log(step=step + 1, loss=round(value.item(), 5), norm=round(float(norm), 3), **told)
        if (step + 1) % 20 == 0 or step + 1 == len(chosen):
            save_state(args.out, step + 1, *state)
    return average


def export(clips: Clips, folder: Path) -> None:
    """A pipeline of its own parts alone: motion modules in fp16, text encoder and tokenizer with new words; the rest is
    scenes-sd's."""
    clips.learnt.motion.half().save_pretrained(folder / "motion_adapter", safe_serialization=True)
    clips.learnt.text.save_pretrained(folder / "text_encoder", safe_serialization=True)
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
    parser.add_argument("--words", type=int, default=40, help="steps of stage 1")
    parser.add_argument("--steps", type=int, default=5600, help="of stage 2")
    parser.add_argument(
        "--mixed",
        type=int,
        default=1400,
        help="of those, the first: all clips have a time a frame (later half of them), and words stay",
    )
    parser.add_argument("--batch", type=int, default=8, help="clips of a step")
    parser.add_argument("--clips", type=int, default=8000, help="different clips that are drawn")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--text-lr", type=float, default=1e-3, help="of the text encoder")
    parser.add_argument("--slow", type=float, default=1.0, help="what that rate is multiplied by after stage 1")
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
