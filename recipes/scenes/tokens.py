"""Train the image-token model of scenes: a tokenizer over the shipped autoencoder's latents, then a small causal
transformer over its tokens.

    python recipes/scenes/latents.py --vae FLOW/vae --kind single --count 50000 --out singles.safetensors
    python recipes/scenes/tokens.py tokenizer --latents singles.safetensors --out ~/scenes-tokens --kind single
    python recipes/scenes/tokens.py network --latents singles.safetensors --out ~/scenes-tokens --kind single
    python recipes/scenes/tokens.py check --latents singles.safetensors --out ~/scenes-tokens --kind single
    python recipes/scenes/tokens.py nats --latents singles.safetensors --out ~/scenes-tokens --kind single

FLOW is the folder of scenes-flow (``tropism.catalog.WEIGHTS / "flow"``). The model is in the folder ``final`` of --out.
Both trainings go on from what was saved; check says what the tokenizer loses: PSNR, and the share of held-out captions
that the verifier passes on pictures that went through it. nats sets the network's cross-entropy on held-out pictures
beside entropies of the tokens.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from common import KINDS, Average, Log, cosine, draw, load_state, minibatches, save_state, to_tensor
from diffusers import AutoencoderTiny
from fit import Master, Stepper
from safetensors.torch import load_file
from text import build_tokenizer
from torch import Tensor, nn
from torch.distributions import Categorical

from tropism.catalog import WEIGHTS
from tropism.models.token_gpt import Pictures, TokenGPT, Words, load_tokens
from tropism.models.tokenizer import Tokenizer, psnr
from tropism.worlds.scenes import parse, verify_batch, words

SAVE_EVERY = 250
DEFAULTS = {"tokenizer": (2000, 64), "network": (4500, 32)}  # steps and batch


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["tokenizer", "network", "check", "nats"])
    parser.add_argument("--latents", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, help="none: 2,000 of the tokenizer, 4,500 of the network")
    parser.add_argument("--batch", type=int, help="none: 64 for the tokenizer, 32 for the network")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--levels", type=int, nargs="+", default=[7, 5, 5, 5, 5])
    parser.add_argument("--width", type=int, default=128, help="of the network")
    parser.add_argument("--layers", type=int, default=4, help="of the network")
    parser.add_argument("--average", type=float, default=0.99, help="decay of the network's average")
    parser.add_argument("--kind", choices=KINDS, help="of the captions that check and nats draw; a mixture without it")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    steps, batch = DEFAULTS.get(args.part, (0, 0))
    args.steps, args.batch = args.steps or steps, args.batch or batch
    args.final = args.out / "final"
    return args


def tokenizer_loss(tokenizer: Tokenizer, latents: Tensor) -> Tensor:
    """Mean squared error of latents whose deviation is about 1."""
    codes = tokenizer.encode(latents)
    return (tokenizer.decode(codes).float() - latents).square().mean()


def train_tokenizer(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    tokenizer = Tokenizer(levels=args.levels)
    optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    average, folder = Average(tokenizer, 0.995), args.out / "training-tokenizer"
    state = ({"tokenizer": tokenizer}, {"tokenizer": average}, {"adam": optimizer})
    first, log = load_state(folder, *state), Log(folder)
    latents = load_file(args.latents)["latents"]
    order = minibatches(len(latents), args.batch, np.random.default_rng(args.seed))
    running = 1.0
    for step in range(first, args.steps):
        for group in optimizer.param_groups:
            group["lr"] = args.lr * cosine(step, args.steps, 100)
        with torch.autocast("cpu", torch.bfloat16):
            loss = tokenizer_loss(tokenizer, latents[torch.from_numpy(next(order))].float())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tokenizer.parameters(), 1.0)
        optimizer.step()
        average.update(tokenizer, step)
        running += 0.02 * (loss.item() - running)
        if (step + 1) % 100 == 0:
            log(step=step + 1, error=round(running, 5))
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == args.steps:
            save_state(folder, step + 1, *state)
    average.copy_to(tokenizer)
    tokenizer.save(args.final / "tokenizer")


@torch.no_grad()
def indices(tokenizer: Tokenizer, latents: Tensor) -> Tensor:
    """(N, L) int16 codes of latents (N, C, h, w)."""
    found = []
    for part in latents.split(1000):
        codes = tokenizer.encode(part.float())
        found.append(torch.cdist(codes, tokenizer.codes).argmin(-1).short())
    return torch.cat(found)


def network_loss(network: TokenGPT, tokens: Tensor, told: Tensor) -> Tensor:
    """Nats a token."""
    logits = network.logits(network.codes[tokens].to(torch.bfloat16), {"words": told}).float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def train_network(args: argparse.Namespace) -> None:
    """bf16 network over float32 weights, as the other pipelines of scenes; a tenth of the captions is dropped."""
    torch.manual_seed(args.seed)
    tokenizer, data, known = Tokenizer.load(args.final / "tokenizer"), load_file(args.latents), words()
    tokens = indices(tokenizer, data["latents"])
    texts = build_tokenizer().batch_decode(data["ids"].long(), skip_special_tokens=True)
    network = TokenGPT(len(known) + 1, levels=tokenizer.levels, width=args.width, layers=args.layers)
    told = Words(known, network.prefix)(texts)["words"]
    folder, stepper = args.out / "training-network", Stepper(network, args.lr, args.steps, args.average)
    first, master, log = stepper.load(folder), Master(network), Log(folder)
    order, running = minibatches(len(tokens), args.batch, np.random.default_rng(args.seed)), 6.0
    for step in range(first, args.steps):
        rows = torch.from_numpy(next(order))
        dropped = torch.rand(len(rows), generator=torch.Generator().manual_seed(step)) < 0.1
        own = told[rows].masked_fill(dropped[:, None], 0)
        loss = network_loss(master.network, tokens[rows].long(), own)
        loss.backward()
        stepper.step(master, step)
        running += 0.02 * (loss.item() - running)
        if (step + 1) % 100 == 0:
            log(step=step + 1, nats=round(running, 4))
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == args.steps:
            stepper.save(folder, step + 1)
    stepper.average.copy_to(network)
    network.save(args.final / "network")
    AutoencoderTiny.from_pretrained(WEIGHTS / "flow" / "vae").save_pretrained(args.final / "vae")
    facts = {"words": list(known), "vae": "vae", "guidance_scale": 2.0}
    (args.final / "tokens.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")


@torch.no_grad()
def check(args: argparse.Namespace) -> None:
    """What is left of 300 held-out pictures after the autoencoder, and after the tokenizer as well."""
    vae = AutoencoderTiny.from_pretrained(WEIGHTS / "flow" / "vae")
    shown, texts = draw(np.random.default_rng(7), 300, "held_out", args.kind)
    images = to_tensor(shown) / 2 + 0.5
    both = Pictures(Tokenizer.load(args.final / "tokenizer"), vae)
    plain = vae.decode(vae.encode(images * 2 - 1).latents).sample / 2 + 0.5
    tokens = both.latents(images)
    for name, found in {"as drawn": images, "autoencoder": plain, "tokens": both.decode(tokens)}.items():
        found = found.clamp(0, 1)
        passed = [verdict.passed for verdict in verify_batch(found.numpy(), texts)]
        kinds = {k: [p for p, text in zip(passed, texts, strict=True) if parse(text).kind == k] for k in KINDS}
        rates = {kind: round(sum(held) / len(held), 3) for kind, held in kinds.items() if held}
        decibels = psnr(found, images) if name != "as drawn" else float("inf")
        print(f"{name}: {decibels:.2f} dB, passed {sum(passed) / len(passed):.3f} {rates}")
    used = torch.cdist(tokens, both.tokenizer.codes).argmin(-1).unique()
    print(f"{len(used)} of {len(both.tokenizer.codes)} codes are used")


def entropies(tokens: Tensor, count: int) -> tuple[float, float, float]:
    """Nats a token of (N, L) tokens: over all positions alike, position by position, and after the one before."""
    table = torch.zeros(count, count)
    before, after = tokens[:, :-1].flatten().long(), tokens[:, 1:].flatten().long()
    table.index_put_((before, after), torch.ones(len(before)), accumulate=True)
    places = torch.stack([torch.bincount(column.long(), minlength=count) for column in tokens.T]).float()
    alike, place = (Categorical(probs=p).entropy().mean() for p in (places.sum(0), places))
    rows = table.sum(1)
    later = Categorical(probs=table + 1e-9).entropy() @ (rows / rows.sum())
    return float(alike), float(place), float(later)


@torch.no_grad()
def nats(args: argparse.Namespace) -> None:
    """Nats a token of 512 held-out pictures by the network, with captions and without, and entropies of the tokens."""
    model = load_tokens(args.final)
    shown, texts = draw(np.random.default_rng(8), 512, "held_out", args.kind)
    images = to_tensor(shown) / 2 + 0.5
    codes = torch.cat([model.latents(part) for part in images.split(128)])
    tokens = torch.cdist(codes, model.codes).argmin(-1)
    for name, prompts in {"captions": texts, "no captions": [""] * len(texts)}.items():
        logits = model.logits(codes, model.encode(prompts))
        print(f"{name}: {float(nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())):.4f} nats a token")
    trained = indices(Tokenizer.load(args.final / "tokenizer"), load_file(args.latents)["latents"])
    found = entropies(trained, len(model.codes))
    print(
        "entropies of all training tokens: alike {:.3f}, by position {:.3f}, after the one before {:.3f}".format(*found)
    )


def main() -> None:
    args = arguments()
    parts = {"tokenizer": train_tokenizer, "network": train_network, "check": check, "nats": nats}
    parts[args.part](args)


if __name__ == "__main__":
    main()
