"""Templates to files. What a run says (prompts, names, errors) is text, never markup: everything is escaped."""

from __future__ import annotations

import os
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from tropism import __version__
from tropism.config import BadInput
from tropism.flags import shown
from tropism.log import clock


@cache
def _environment() -> Environment:
    found = Environment(
        loader=PackageLoader("tropism.pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {"num": number, "signed": signed, "percent": percent, "clock": clock, "setting": shown}
    found.globals["version"] = __version__
    return found


def write_page(template: str, file: Path, **values: Any) -> Path:
    """The page, whole or not at all. Raises BadInput where it cannot be written."""
    text = _environment().get_template(template).render(values)
    temporary = file.with_name(f".saving-{os.getpid()}-{file.name}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, file)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise BadInput(f"{file} cannot be written ({error.strerror}); give another place with --out") from error
    return file


def check_html(out: str) -> Path:
    """Raises BadInput for what is no .html file."""
    file = Path(out).expanduser()
    if file.suffix != ".html" or file.is_dir():
        raise BadInput(f"out is {out}; wanted an .html file")
    return file


def number(value: float | None, digits: int = 4) -> str:
    """A dash where there is none."""
    return "–" if value is None else f"{value:.{digits}g}"


def signed(value: float | None) -> str:
    """With its sign."""
    return "–" if value is None else f"{value:+.3g}"


def percent(value: float | None) -> str:
    """0.25 -> 25 %."""
    return "–" if value is None else f"{value:.0%}".replace("%", " %")
