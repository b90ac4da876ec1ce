"""How often the verifier accepts the pictures of a scenes pipeline, by kind of caption, on held-out combinations.

python recipes/scenes/check.py --pipeline ~/scenes-weights/sd/pipeline --guidance 3 --count 500
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from pathlib import Path

import torch
from PIL import Image

from tropism.models.pipelines import load_pipeline
from tropism.policy import Policy
from tropism.samplers import DDIM, EulerODE
from tropism.schedules import RectifiedFlow
from tropism.worlds.scenes import captions, parse, verify_batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pipeline", type=Path, required=True)
    parser.add_argument("--guidance", type=float, nargs="+", default=[3.0])
    parser.add_argument("--inference-steps", type=int, default=20)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--split", default="held_out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--sheet", type=Path, help="write the first 64 pictures here")
    args = parser.parse_args()
    model = load_pipeline(args.pipeline, dtype=torch.bfloat16 if args.bf16 else torch.float32)
    kernel = EulerODE() if isinstance(model.denoiser.schedule, RectifiedFlow) else DDIM(0.0)
    texts = captions(args.count, args.seed, args.split)
    for guidance in args.guidance:
        policy = Policy(model, kernel, args.inference_steps, guidance)
        start = time.perf_counter()
        images = policy.images(texts, torch.Generator().manual_seed(args.seed))
        seconds = time.perf_counter() - start
        verdicts = verify_batch(images.numpy(), texts)
        by_kind, by_part = defaultdict(list), defaultdict(list)
        for text, verdict in zip(texts, verdicts, strict=True):
            by_kind[parse(text).kind].append(verdict.passed)
            for part, holds in verdict.parts.items():
                by_part[part].append(holds)
        kinds, parts = (
            {name: round(sum(held) / len(held), 3) for name, held in sorted(table.items())}
            for table in (by_kind, by_part)
        )
        passed = sum(v.passed for v in verdicts) / len(verdicts)
        print(
            f"guidance {guidance}: passed {passed:.3f} {kinds}, parts {parts}, {len(texts) / seconds:.1f} images/s",
            flush=True,
        )
    if args.sheet:
        grid = (images[:64].permute(0, 2, 3, 1) * 255).round().byte().numpy()
        side = images.shape[-1]
        sheet = grid.reshape(8, 8, side, side, 3).swapaxes(1, 2).reshape(8 * side, 8 * side, 3)
        Image.fromarray(sheet).resize((1024, 1024), Image.Resampling.NEAREST).save(args.sheet)


if __name__ == "__main__":
    main()
