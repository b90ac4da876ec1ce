"""Model libraries without their notices and bars, for the command line, which says itself what matters."""

from __future__ import annotations

import warnings
from typing import Any

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging


def quiet_libraries() -> None:
    """Errors only, and no progress bars, from here on in this process."""
    libraries: tuple[Any, ...] = (diffusers_logging, transformers_logging)
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    warnings.filterwarnings("ignore", module="huggingface_hub|transformers|diffusers")
