"""The command ``tropism``: which command, which settings, and one sentence for whatever is wrong.

Nothing heavy is imported before the settings have been read: the help of the command and of ``train`` need no torch.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from tropism import __version__
from tropism.config import BadInput, RunFailed

if TYPE_CHECKING:
    from tropism.flags import Setting

HEAD = """\
usage: tropism COMMAND [--SETTING VALUE ...]

Align a generative model with a reward.

commands:
"""
TAIL = """
options:
  --help, -h      this help, or that of a command
  --version       the version

Settings are given as flags, or in a file of YAML by --config FILE. With TROPISM_TRACEBACK=1 in the environment an
error shows where it came from.
"""


class Command(NamedTuple):
    """A command without a method. Modules are named, not imported: a help must not wait for torch."""

    settings: str  # MODULE:CLASS below tropism
    run: str  # MODULE:FUNCTION below tropism, called with the settings
    line: str  # in the list of commands
    about: str  # in its own help
    leading: str = ""  # the setting that words before the first flag belong to
    steers: bool = False  # it also takes the settings of the steerers that it is told, and is called with their values


COMMANDS: Mapping[str, Command] = {
    "sample": Command(
        "config:SampleSettings",
        "commands:run_sample",
        "draw pictures, with or without what was trained",
        "Draw pictures, one PNG each and all in a grid; with --steer, steered by a reward.",
        steers=True,
    ),
    "eval": Command(
        "config:EvalSettings",
        "commands:run_eval",
        "score a model, and compare it with its base at equal seeds",
        "Score a model; with --adapter, compare it with its base.",
    ),
    "few-steps": Command(
        "few_step_settings:FewStepsSettings",
        "few_step_command:run_few_steps",
        "quality against moves, network calls and seconds, of a teacher and its students",
        "Draw with a teacher and its students in 1, 2, 4, ... moves: reward, network calls and seconds of each.",
    ),
    "compare-steering": Command(
        "steering_settings:CompareSteeringSettings",
        "steering_command:run_compare_steering",
        "several ways to steer, and fine-tuned adapters: rewards, network calls and seconds of each",
        "Draw the same prompts from the same noise, steered in several ways: what each is worth, and what it costs.",
        "steer",
        steers=True,
    ),
    "steerers": Command(
        "steering_settings:SteerersSettings",
        "steering_command:run_steerers",
        "list the ways to steer and their settings",
        "The ways to steer (all, unless named) with their settings and defaults.",
        "steer",
    ),
    "reward test": Command(
        "reward_settings:RewardTestSettings",
        "reward_commands:run_test",
        "try a reward on sample pictures before anything depends on it",
        "Show a reward sample pictures, and say what could be wrong with it. Exit code 1 when something is.",
        leading="reward",
    ),
    "reward serve": Command(
        "reward_settings:RewardServeSettings",
        "reward_commands:run_serve",
        "compute a reward for others, over HTTP",
        "Compute a reward for others, over HTTP; on their side it is called remote:http://HOST:PORT.",
        leading="reward",
    ),
    "report": Command(
        "pages.settings:ReportSettings",
        "pages.run_page:run_report",
        "write the page of a run again",
        "Write the report of a run: verdict, curves, pictures, settings; one HTML file that needs nothing else.",
        "run",
    ),
    "compare": Command(
        "pages.settings:CompareSettings",
        "pages.compare_page:run_compare",
        "put several runs side by side",
        "Compare runs: a table here, and one HTML file with curves, pictures and the settings that differ.",
        "runs",
    ),
    "models": Command(
        "config:ModelsSettings",
        "families:run_models",
        "list the model families, or say what a model is",
        "The families of models and what each can; with MODEL (a name, a folder, MODULE:FUNCTION) what that one is.",
        "model",
    ),
    "export": Command(
        "config:ExportSettings",
        "export:run_export",
        "write what was trained for diffusers, PEFT, kohya or ComfyUI",
        "Write what a run has trained in the format of another program, with a model card.",
        "run",
    ),
}
SHARED, OWN = "settings of every run", "settings of {}"
PRESET = "demo.yaml"
SAMPLES = "distill-samples"  # the method that has a command of its own


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command. Returns 0; 2 when nothing was begun, 1 when a run failed, 130 when it was interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(words)
    except BadInput as error:
        return _fail(error, 2)
    except RunFailed as error:
        return _fail(error, 130 if type(error).__name__ == "Interrupted" else 1)
    except BrokenPipeError:  # whoever read the output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("tropism: stopped by the keyboard before anything had begun", file=sys.stderr)
        return 130


def _fail(error: Exception, code: int) -> int:
    if os.environ.get("TROPISM_TRACEBACK"):
        raise error
    print("tropism: " + " ".join(str(error).split()), file=sys.stderr)
    return code


def _dispatch(words: list[str]) -> int:
    special: Mapping[str, Callable[[list[str]], None]] = {
        "demo": _demo,
        "train": _train,
        "distill": _distill,
        "distill-samples": lambda words: _train([SAMPLES, *words]),
        "doctor": _doctor,
        "methods": _methods,
    }
    name = next((name for name in COMMANDS if words[: len(name.split())] == name.split()), "")
    if not words or words[0] in ("--help", "-h", "help"):
        print(_help(), end="")
    elif words[0] == "--version":
        print(f"tropism {__version__}")
    elif name:
        _run(name, words[len(name.split()) :])
    elif words[0] in special:
        special[words[0]](words[1:])
    else:
        from tropism.config import suggest

        typed = " ".join(words[:2]) if any(each.startswith(f"{words[0]} ") for each in COMMANDS) else words[0]
        raise BadInput(f"there is no command {typed!r}; {suggest(typed, [*special, *COMMANDS])}")
    return 0


def _help() -> str:
    lines = {
        "demo": "train a small model that comes with the package, in minutes",
        "train METHOD": "train a model (tropism train METHOD --help lists the settings)",
        "distill METHOD": "make a model that draws in one to eight moves (tropism distill --help lists the methods)",
        SAMPLES: "train a model on its own steered samples, so that it draws so by itself",
        "doctor METHOD": "look for what is wrong with a run before it is started; settings as for train",
        **{" ".join([name, each.leading.upper()]).strip(): each.line for name, each in COMMANDS.items()},
        "methods": "list the methods and their settings",
    }
    width = max(map(len, lines))
    return HEAD + "".join(f"  {name:<{width}}  {line}\n" for name, line in lines.items()) + TAIL


def _run(name: str, words: list[str]) -> None:
    """A command of the table."""
    command = COMMANDS[name]
    if name in ("sample", "eval"):  # moves of a chain; only in training are there other steps
        words = ["--inference-steps" + word[7:] if word.split("=")[0] == "--steps" else word for word in words]
    if command.leading and words and not words[0].startswith("-"):
        words = [f"--{command.leading.replace('_', '-')}", *words]
    found = _read(_named(command.settings), words, name, command.about, command.steers)
    if found is not None:
        _named(command.run)(*found)


def _named(text: str) -> Any:
    module, _, name = text.partition(":")
    return getattr(importlib.import_module(f"tropism.{module}"), name)


def _asks_help(words: Sequence[str]) -> bool:
    return "--help" in words or "-h" in words


def _read(kind: type[Any], words: Sequence[str], command: str, description: str, steers: bool = False) -> Any:
    """The settings of a command without a method, and where it steers what was said of its steerers' own, of which all
    else is as each has it; None when its help was printed instead."""
    from tropism import flags

    own = flags.settings_of(kind, "settings")
    settings = [*own]
    if steers:
        from tropism.steering_settings import named_steerers, steerer_flags

        ways = named_steerers([word for word in words if word not in ("--help", "-h")])
        settings += steerer_flags(ways, [setting.name for setting in own])
    parser = flags.build_parser(f"tropism {command}", description, settings)
    if _asks_help(words):
        print(parser.format_help())
        return None
    said = flags.said(parser, settings, words)
    made = kind(**_of(own, said))
    return (made, _of(settings[len(own) :], said)) if steers else (made,)


def _distill(words: list[str]) -> None:
    from tropism import catalog

    if words and not words[0].startswith("-") and not getattr(catalog.method_settings(words[0]), "distils", False):
        raise BadInput(f"{words[0]} makes no model for few steps; wanted tropism train {words[0]}")
    _train(words, "distill")


def _train(words: list[str], command: str = "train") -> None:
    if _listed(words, command):
        return
    from tropism.resume import with_its_config

    own = words[1:] if _asks_help(words) else with_its_config(words[1:], words[0].replace("_", "-"))
    found = _train_settings(words[0], own, command)
    if found is not None:
        from tropism.commands import run_train

        run_train(*found)


def _doctor(words: list[str]) -> None:
    if _listed(words, "doctor"):
        return
    found = _train_settings(words[0], words[1:], "doctor")
    if found is not None:
        from tropism.doctor import run_doctor

        run_doctor(*found)


def _listed(words: list[str], command: str) -> bool:
    """Whether the shared settings were listed, because no method was named. Raises BadInput when nobody asked."""
    from tropism import catalog

    if words and not words[0].startswith("-"):
        return False
    methods = ", ".join(catalog.distilling() if command == "distill" else catalog.method_names())
    if not _asks_help(words):
        raise BadInput(f"{command} wants a method first; wanted one of {methods}")
    from tropism import flags
    from tropism.config import TrainSettings

    shared = flags.settings_of(TrainSettings, SHARED)
    print(flags.build_parser(f"tropism {command} METHOD", f"METHOD is one of {methods}.", shared).format_help())
    return True


def _train_settings(method: str, words: Sequence[str], command: str) -> tuple[str, Any, Any] | None:
    """(method as it is typed, shared settings, its own settings); None when help was printed instead."""
    from tropism import catalog, flags
    from tropism.config import TrainSettings

    own = catalog.method_settings(method)
    method = method.replace("_", "-")
    both = (flags.settings_of(TrainSettings, SHARED), flags.settings_of(own, OWN.format(method)))
    settings = [*both[1], *both[0]]
    doc = f"{catalog.method_names()[method]} {(own.__doc__ or '').strip()}"
    parser = flags.build_parser(f"tropism {command} {method}", doc, settings)
    if _asks_help(words):
        print(parser.format_help())
        return None
    values = flags.read(parser, settings, words, method)
    return method, TrainSettings(**_of(both[0], values)), own(**_of(both[1], values))


def _of(settings: Sequence[Setting], values: Mapping[str, Any]) -> dict[str, Any]:
    return {setting.name: values[setting.name] for setting in settings if setting.name in values}


def _demo(words: list[str]) -> None:
    from pathlib import Path

    from tropism.config import DemoSettings, read_config
    from tropism.plan import next_folder

    found = _read(
        DemoSettings, words, "demo", "Train a small model that comes with the package, and see the difference."
    )
    if found is None:
        return
    (demo,) = found
    preset = str(Path(__file__).with_name(PRESET)) if demo.preset is None else demo.preset
    given = {name: getattr(demo, name) for name in ("steps", "seed", "device", "threads")}
    argv = ["--config", preset, "--out", str(demo.out or next_folder(Path("runs"), "demo"))]
    argv += [word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))]
    run = _train_settings(str(read_config(preset).get("method", "ddpo")), argv, "demo")
    assert run is not None
    from tropism.commands import run_demo

    run_demo(*run)


def _methods(words: list[str]) -> None:
    from tropism import catalog, flags

    if _asks_help(words) or any(word.startswith("-") for word in words):
        print(
            "usage: tropism methods [METHOD ...]\n\nThe methods (all, unless named) with their settings and defaults."
        )
        return
    for name in words or catalog.method_names():
        own = catalog.method_settings(name)
        print(f"{name.replace('_', '-')}: {catalog.method_names()[name.replace('_', '-')]}")
        for setting in flags.settings_of(own, ""):
            print(f"  {setting.flag:<24} {flags.shown(setting.default):<10} {setting.doc}")
        print()
