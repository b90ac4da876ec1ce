"""Make the shipped scenes weights again, from nothing: autoencoder, pipelines, CLIP, IP-Adapter, tokens. Resumable.

    python recipes/scenes/make.py --work ~/scenes-weights

Each stage is a recipe of its own beside this file and goes on from what it saved. ``--install`` copies what is finished
into the package.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
PACKAGE = HERE.parents[1] / "tropism" / "worlds" / "scenes" / "weights"
LONGER = ["--steps", "5000", "--lr", "1.2e-3", "--seed", "1"]  # the flow's second warm-up and decay: see docs/scenes.md
MORE, SHAPES = (  # of the CLIP that sees references of image prompts
    ["--steps", "1600", "--seed", "5"],
    ["--steps", "900", "--seed", "6", "--shapes", "0.3"],
)
ANEW = ["--steps", "1400", "--seed", "1"]  # the adapter's second warm-up and decay
GUIDED = {"guidance_scale": 3.0, "steps": 20}
DEFAULTS = {"sd": GUIDED, "flow": GUIDED, "clips": {**GUIDED, "base": "../sd"}}


def stages(work: Path) -> list[tuple[Path, list[str]]]:
    """(what a stage makes, its command), in order."""
    vae, latents, first = work / "vae" / "final", work / "latents.safetensors", work / "flow-first"
    data = ["--latents", str(latents), "--vae", str(vae)]
    singles = work / "singles.safetensors"
    grid = ["--latents", str(singles), "--out", str(work / "tokens"), "--kind", "single"]
    clip, longer, shapes = (work / name for name in ("clip", "clip-longer", "clip-shapes"))
    seen, adapter = ["--clip", str(shapes / "final")], work / "ip-first/final/ip_adapter.safetensors"
    return [
        (vae / "config.json", ["vae.py", "--out", str(work / "vae"), "--steps", "3000"]),
        (latents, ["latents.py", "--vae", str(vae), "--out", str(latents)]),
        (
            work / "sd/pipeline/model_index.json",
            ["sd.py", "--out", str(work / "sd"), "--steps", "4800", "--compile", *data],
        ),
        (first / "pipeline/model_index.json", ["flow.py", "--out", str(first), "--steps", "3500", *data]),
        (
            work / "flow/pipeline/model_index.json",
            ["flow.py", "--out", str(work / "flow"), "--start", str(first), *LONGER, *data],
        ),
        (work / "lcm/pipeline/model_index.json", ["few.py", "--out", str(work / "lcm")]),
        (work / "dmd/pipeline/model_index.json", ["one.py", "--out", str(work / "dmd")]),
        (work / "motion/pipeline/model_index.json", ["motion.py", "--out", str(work / "motion")]),
        (clip / "final/config.json", ["clip.py", "--out", str(clip), "--steps", "1400"]),
        (longer / "final/config.json", ["clip.py", "--start", str(clip / "final"), "--out", str(longer), *MORE]),
        (shapes / "final/config.json", ["clip.py", "--start", str(longer / "final"), "--out", str(shapes), *SHAPES]),
        (adapter, ["ip_adapter.py", *seen, "--out", str(work / "ip-first")]),
        (
            work / "ip/final/ip_adapter.safetensors",
            ["ip_adapter.py", *seen, "--start", str(adapter), *ANEW, "--out", str(work / "ip")],
        ),
        (singles, ["latents.py", "--vae", str(vae), "--kind", "single", "--count", "50000", "--out", str(singles)]),
        (work / "tokens/final/tokenizer/config.json", ["tokens.py", "tokenizer", *grid]),
        (work / "tokens/final/tokens.json", ["tokens.py", "network", *grid]),
    ]


def install(work: Path) -> None:
    """Copies finished pipelines, with their default guidance and steps, the CLIP and the IP-Adapter."""
    made = {
        "sd": "sd/pipeline",
        "flow": "flow/pipeline",
        "lcm": "lcm/pipeline",
        "dmd": "dmd/pipeline",
        "clips": "motion/pipeline",
        "clip": "clip/final",
        "ip": "ip/final",
        "tokens": "tokens/final",
    }
    for name, source in made.items():
        if not (work / source).is_dir():
            continue
        shutil.rmtree(PACKAGE / name, ignore_errors=True)
        shutil.copytree(work / source, PACKAGE / name)
        for file in (PACKAGE / name).rglob("*"):
            file.chmod(0o755 if file.is_dir() else 0o644)
            if file.name == "config.json":  # diffusers notes where a part was loaded from
                facts = {key: value for key, value in json.loads(file.read_text()).items() if key != "_name_or_path"}
                file.write_text(json.dumps(facts, indent=2) + "\n")
        if name == "tokens":
            shutil.rmtree(PACKAGE / name / "vae")  # it is the flow's
            told = json.loads((PACKAGE / name / "tokens.json").read_text())
            (PACKAGE / name / "tokens.json").write_text(json.dumps({**told, "vae": "../flow/vae"}, indent=1))
        if name in DEFAULTS:
            (PACKAGE / name / "tropism.json").write_text(json.dumps(DEFAULTS[name]) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--install", action="store_true", help="only copy what is finished into the package")
    args = parser.parse_args()
    environment = os.environ | {"PYTHONPATH": str(HERE.parents[1])}
    for made, command in [] if args.install else stages(args.work):
        if not made.exists():
            print("running", *command, flush=True)
            subprocess.run([sys.executable, str(HERE / command[0]), *command[1:]], check=True, env=environment)
    install(args.work)


if __name__ == "__main__":
    main()
