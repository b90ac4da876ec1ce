"""Distil the flow pipeline to a consistency model of four moves, as a pipeline of its own.

python recipes/scenes/few.py --out ~/scenes-weights/lcm

What `tropism distill lcm --config recipes/lcm.yaml` learns is merged into the transformer, in half precision; all else
is the flow pipeline's. Goes on from the run's last checkpoint if there is one.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from tropism.catalog import check_model
from tropism.cli import main as tropism

CONFIG = Path(__file__).parents[1] / "lcm.yaml"
KEPT = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3", "vae")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="holds run/ and, in the end, pipeline/")
    parser.add_argument("--threads", default="2")
    args = parser.parse_args()
    run, pipeline, base = args.out / "run", args.out / "pipeline", Path(check_model("scenes-flow"))
    if not (run / "README.md").is_file():
        begun = any((run / "checkpoints").glob("step-*"))
        how = ["--resume", str(run)] if begun else ["--config", str(CONFIG), "--out", str(run)]
        assert tropism(["distill", "lcm", *how, "--threads", args.threads]) == 0
    words = ["export", str(run), "--merge", "--precision", "float16", "--out", str(pipeline)]
    assert tropism(words) == 0
    for part in KEPT:  # the encoders are kept as the base has them: transformers loads them as they are stored
        shutil.rmtree(pipeline / part)
        shutil.copytree(base / part, pipeline / part)
    for file in pipeline.glob("*.*"):
        if file.name not in ("model_index.json", "tropism.json"):
            file.unlink()


if __name__ == "__main__":
    main()
