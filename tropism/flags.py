"""Dataclasses as flags and YAML keys. jsonargparse reads values by their types; what it refuses is one sentence.

A field ``save_every: int = 25`` with a string below it is the flag ``--save-every N`` (``--save_every`` as well), the
YAML key ``save_every``, and its help. Truth values are ``--full`` and ``--no-full``; lists take several words or
several flags. ``--config FILE.yaml`` gives values that flags override.
"""

from __future__ import annotations

import argparse
import ast
import copy
import difflib
import inspect
import textwrap
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal

import yaml
from jsonargparse import ActionYesNo, ArgumentError, ArgumentParser, set_loader

from tropism.config import BadInput, PlainLoader, read_config

set_loader("plain", lambda text, **_: yaml.load(text, PlainLoader), exceptions=(yaml.YAMLError,))


class Help(argparse.HelpFormatter):
    """Flags in a column of their own."""

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, max_help_position=30, width=110)


@dataclass(frozen=True)
class Setting:
    """One field of a dataclass."""

    name: str
    kind: Any  # its type
    default: Any
    doc: str
    group: str  # the title it is listed under

    @property
    def flag(self) -> str:
        """As it is typed."""
        return "--" + self.name.replace("_", "-")

    @property
    def is_list(self) -> bool:
        """It takes any number of words."""
        kind = _without_none(self.kind)
        return typing.get_origin(kind) is list or (typing.get_origin(kind) is tuple and Ellipsis in kind.__args__)

    @property
    def pair(self) -> int:
        """How many words it takes, where that is a fixed number above 1; otherwise 0."""
        kind = _without_none(self.kind)
        return len(kind.__args__) if typing.get_origin(kind) is tuple and not self.is_list else 0


def settings_of(kind: type[Any], group: str) -> list[Setting]:
    """The fields of a dataclass, those of its bases after its own."""
    hints, docs = typing.get_type_hints(kind), _docs(kind)
    depth = {name: at for at, base in enumerate(kind.__mro__) for name in vars(base).get("__annotations__", {})}
    ordered = sorted((field for field in fields(kind) if field.init), key=lambda field: depth[field.name])
    return [Setting(f.name, hints[f.name], _default(f), docs.get(f.name, ""), group) for f in ordered]


def _default(field: Any) -> Any:
    if field.default is not MISSING:
        return list(field.default) if isinstance(field.default, tuple) else field.default
    return field.default_factory() if field.default_factory is not MISSING else None


def _docs(kind: type[Any]) -> dict[str, str]:
    """The strings below the fields of a dataclass and of its bases."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(node, ast.ClassDef)
        for field, below in zip(node.body, node.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
                found[ast.unparse(field.target)] = inspect.cleandoc(ast.literal_eval(below.value))
    return found


def _without_none(kind: Any) -> Any:
    """X of ``X | None``, and any other type as it is."""
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        kinds = [k for k in typing.get_args(kind) if k is not type(None)]
        return kinds[0] if len(kinds) == 1 else kind
    return kind


def wanted(kind: Any) -> str:
    """A type in words: ``int | None`` is "a whole number or none"."""
    bare = _without_none(kind)
    if bare is not kind:
        return f"{wanted(bare)} or none"
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(str(choice) for choice in typing.get_args(kind))
    if typing.get_origin(kind) in (list, tuple):
        inner = typing.get_args(kind)
        several = "several" if typing.get_origin(kind) is list or Ellipsis in inner else str(len(inner))
        return f"{several} of: {wanted(inner[0])}"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(kind, str(kind))


def shown(default: Any) -> str:
    """A default as it would be typed."""
    if isinstance(default, list | tuple):
        return " ".join(map(str, default)) or "none"
    if default is None or isinstance(default, bool):
        return {None: "none", True: "yes", False: "no"}[default]
    return f"{default:g}" if isinstance(default, float) else str(default)


def _metavar(kind: Any) -> str:
    """What stands for a value in the help."""
    if typing.get_origin(kind) is Literal:
        return "|".join(map(str, typing.get_args(kind)))
    return {int: "N", float: "X", str: "TEXT"}.get(kind, "VALUE")


def build_parser(prog: str, description: str, settings: Sequence[Setting]) -> ArgumentParser:
    """A jsonargparse parser that knows the settings; ``format_help`` lists them by their groups."""
    parser = ArgumentParser(
        prog=prog, description=description, exit_on_error=False, allow_abbrev=False, parser_mode="plain",
        usage=f"{prog} [--config FILE.yaml] [--SETTING VALUE ...]", formatter_class=Help,
    )  # fmt: skip
    parser.add_argument("--config", metavar="FILE.yaml", type=str, help="Settings by name; flags override them.")
    groups: dict[str, Any] = {}
    for setting in settings:
        group = groups.get(setting.group) or groups.setdefault(setting.group, parser.add_argument_group(setting.group))
        bare = _without_none(setting.kind)
        options: dict[str, Any] = {"type": setting.kind, "metavar": _metavar(bare)}
        if bare is bool:
            options = {"action": ActionYesNo(yes_prefix="", no_prefix="no-")}
        elif setting.is_list or setting.pair:
            inner = typing.get_args(bare)[0]
            options = {"type": inner, "nargs": setting.pair or "+", "metavar": _metavar(inner)}
        text = f"{setting.doc} (default: {shown(setting.default)})".strip()
        group.add_argument(setting.flag, default=setting.default, help=text.replace("%", "%%"), **options)
    return parser


def read(
    parser: ArgumentParser, settings: Sequence[Setting], argv: Sequence[str], method: str | None = None
) -> dict[str, Any]:
    """Values by name: defaults, and over them what is said. Raises BadInput as ``said``."""
    defaults = {setting.name: setting.default for setting in settings}
    pairs = {
        setting.name: tuple(setting.default) for setting in settings if setting.pair and setting.default is not None
    }
    return defaults | pairs | said(parser, settings, argv, method)


def said(
    parser: ArgumentParser, settings: Sequence[Setting], argv: Sequence[str], method: str | None = None
) -> dict[str, Any]:
    """Values by name that ``--config`` files give, and over them flags. Raises BadInput.

    A file may say which method it is for; that must be ``method``.
    """
    known = {setting.name: setting for setting in settings}
    values: dict[str, Any] = {}
    given = list(words_by_flag(argv))
    for name, words in given:
        if name == "config":
            entries = read_config(_one(words, "config"))
            written = str(entries.pop("method", method)).replace("_", "-")
            if written != str(method):
                raise BadInput(f"{words[0]} is for the method {written}; wanted settings of {method or 'this command'}")
            values |= checked(parser, known, entries)
    for name, words in _collected(known, (pair for pair in given if pair[0] != "config")):
        values[name] = _from_words(parser, known[name], words)
    return {name: tuple(v) if known[name].pair and v is not None else v for name, v in values.items()}


def checked(parser: ArgumentParser, known: Mapping[str, Setting], entries: Mapping[str, Any]) -> dict[str, Any]:
    """Entries of a YAML file, as their types. Raises BadInput for an unknown name or a value of another type."""
    values: dict[str, Any] = {}
    for name, value in entries.items():
        if name not in known:
            raise BadInput(f"there is no setting {name}{_close(name, list(known))}")
        setting = known[name]
        if isinstance(value, str) and setting.is_list:
            value = [value]
        if value == setting.default and type(value) is type(setting.default):
            values[name] = value
            continue
        try:
            if isinstance(value, Mapping):  # no setting is one, and jsonargparse stumbles over some
                raise TypeError("it has entries")
            values[name] = parser.parse_object({name: copy.copy(value)})[name]
            if value is None and type(None) not in typing.get_args(setting.kind):
                raise TypeError("it has no value")
            if setting.pair and len(values[name]) != setting.pair:
                raise ValueError(f"{len(values[name])} values")
        except (ArgumentError, TypeError, ValueError) as error:
            raise BadInput(f"{name} is {value!r}; wanted {wanted(setting.kind)}") from error
    return values


def words_by_flag(argv: Sequence[str]) -> Iterable[tuple[str, list[str]]]:
    """(name, words) of every flag; a word "none" is left for its setting to read."""
    groups: list[tuple[str, list[str]]] = []
    for word in argv:
        if word.startswith("--") and len(word) > 2:
            flag, equals, value = word[2:].partition("=")
            groups.append((flag.replace("-", "_"), [value] if equals else []))
        elif groups:
            groups[-1][1].append(word)
        else:
            raise BadInput(f"{word!r} follows no setting; wanted words such as --seed 1")
    return groups


def _collected(known: Mapping[str, Setting], given: Iterable[tuple[str, list[str]]]) -> Iterable[tuple[str, list[str]]]:
    """One entry a setting: lists gather the words of all their flags, of others the last one counts."""
    found: dict[str, list[str]] = {}
    for name, words in given:
        positive = name.removeprefix("no_")
        if name not in known and positive in known and _without_none(known[positive].kind) is bool:
            found[positive] = [*words, "false"]
        elif name not in known:
            raise BadInput(f"there is no setting --{name.replace('_', '-')}{_close(name, list(known), '--')}")
        elif _without_none(known[name].kind) is bool:
            found[name] = words or ["true"]
        else:
            found[name] = [*found.get(name, []), *words] if known[name].is_list else words
    return found.items()


def _from_words(parser: ArgumentParser, setting: Setting, words: list[str]) -> Any:
    """The words after a flag, as its type."""
    if words in (["none"], ["null"]) and type(None) in typing.get_args(setting.kind):
        return None
    if _without_none(setting.kind) is bool and len(words) == 1:
        return checked(parser, {setting.name: setting}, {setting.name: yaml.load(words[0], PlainLoader)})[setting.name]
    try:
        argv = [f"{setting.flag}={words[0]}"] if len(words) == 1 else [setting.flag, *words]
        return parser.parse_args(argv)[setting.name]
    except (ArgumentError, TypeError, ValueError) as error:
        got = repr(" ".join(words)) if words else "given without a value"
        raise BadInput(f"{setting.name} is {got}; wanted {wanted(setting.kind)}") from error


def _one(words: Sequence[str], name: str) -> str:
    if len(words) != 1:
        raise BadInput(f"--{name} got {len(words)} values; wanted one")
    return words[0]


def _close(name: str, known: Sequence[str], dashes: str = "") -> str:
    """What was perhaps meant."""
    likely = [each.replace("_", "-") if dashes else each for each in difflib.get_close_matches(name, known, 1, 0.6)]
    return f"; did you mean {dashes}{likely[0]}?" if likely else "; --help lists them"
