"""Make a consistency model of four moves of the flow pipeline, as a pipeline of its own: distil, then climb CLIP.

python recipes/scenes/few.py --out ~/scenes-weights/lcm

The two runs are those of recipes/lcm.yaml and recipes/lcm_clip.yaml. What each learns is merged into the transformer,
in half precision; all else is the flow pipeline's. Goes on from a run's last checkpoint if there is one.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from tropism.catalog import WEIGHTS, check_model
from tropism.cli import main as tropism

RECIPES = Path(__file__).parents[1]
KEPT = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3", "vae")


def trained(run: Path, command: list[str], recipe: str, *more: str) -> None:
    """A run that is finished."""
    if not (run / "README.md").is_file():
        begun = any((run / "checkpoints").glob("step-*"))
        how = ["--resume", str(run)] if begun else ["--config", str(RECIPES / recipe), "--out", str(run), *more]
        assert tropism([*command, *how]) == 0


def merged(weights: Path, out: Path, *more: str) -> None:
    """A whole pipeline; its encoders are kept as the base has them: transformers loads them as they are stored."""
    if out.is_dir():
        return
    assert tropism(["export", str(weights), "--merge", "--precision", "float16", "--out", str(out), *more]) == 0
    for part in KEPT:
        shutil.rmtree(out / part)
        shutil.copytree(Path(check_model("scenes-flow")) / part, out / part)
    for file in out.glob("*.*"):
        if file.name not in ("model_index.json", "tropism.json"):
            file.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="holds both runs and, in the end, pipeline/")
    parser.add_argument("--threads", default="2")
    args = parser.parse_args()
    first, second, between = args.out / "distilled", args.out / "rewarded", args.out / "between"
    trained(first, ["distill", "lcm"], "lcm.yaml", "--threads", args.threads)
    merged(first, between)
    given = ["--model", str(between), "--reward", f"clip:{WEIGHTS / 'clip'}", "--threads", args.threads]
    trained(second, ["train", "draft"], "lcm_clip.yaml", *given)
    merged(second / "checkpoints" / "best", args.out / "pipeline", "--model", str(between))


if __name__ == "__main__":
    main()
