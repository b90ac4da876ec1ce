"""Make scenes-dmd, of one and two moves: match the law of the flow pipeline, beginning with the weights of scenes-lcm,
then climb CLIP through the one move.

python recipes/scenes/one.py --out ~/scenes-weights/one

The runs are those of recipes/dmd2.yaml and recipes/dmd2_longer.yaml, with all weights of the transformer, and of
recipes/dmd2_clip.yaml; then a whole pipeline is written.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from few import merged, trained

from tropism.catalog import WEIGHTS, check_model


def begun(out: Path, pipeline: Path) -> Path:
    """What --start-from takes: the network of a pipeline alone, as it is learnt further."""
    if not out.is_dir():
        shutil.copytree(pipeline / "transformer", out / "transformer")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="holds the runs and, in the end, pipeline/")
    parser.add_argument("--threads", default="2")
    args = parser.parse_args()
    place, threads = Path(check_model("scenes-lcm")), ["--threads", args.threads]
    for name, recipe in {"matched": "dmd2.yaml", "longer": "dmd2_longer.yaml"}.items():
        start = begun(args.out / f"before-{name}", place)
        trained(args.out / name, ["distill", "dmd2"], recipe, "--start-from", str(start), *threads)
        place = args.out / f"{name}-pipeline"
        merged(args.out / name, place)
    given = ["--model", str(place), "--reward", f"clip:{WEIGHTS / 'clip'}", *threads]
    trained(args.out / "rewarded", ["train", "draft"], "dmd2_clip.yaml", *given)
    merged(args.out / "rewarded", args.out / "pipeline", "--model", str(place))


if __name__ == "__main__":
    main()
