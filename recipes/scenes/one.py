"""Make scenes-dmd, of one and two moves: match the law of the flow pipeline, beginning with the weights of scenes-lcm.

python recipes/scenes/one.py --out ~/scenes-weights/one

The run is that of recipes/dmd2.yaml, with all weights of the transformer; then a whole pipeline is written.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from few import merged, trained

from tropism.catalog import check_model


def begun(out: Path) -> Path:
    """What --start-from takes: the network of scenes-lcm alone, as it is learnt further."""
    if not out.is_dir():
        shutil.copytree(Path(check_model("scenes-lcm")) / "transformer", out / "transformer")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="holds the run and, in the end, pipeline/")
    parser.add_argument("--threads", default="2")
    args = parser.parse_args()
    start, run = begun(args.out / "start"), args.out / "matched"
    trained(run, ["distill", "dmd2"], "dmd2.yaml", "--start-from", str(start), "--threads", args.threads)
    merged(run, args.out / "pipeline")


if __name__ == "__main__":
    main()
