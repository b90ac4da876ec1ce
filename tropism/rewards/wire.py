"""How pictures and scores travel between a reward's client and its server. Nothing is pickled.

A call is one of

- ``application/octet-stream``: a safetensors file with ``images`` (B, 3, H, W), in the type they have, and ``call``,
  the bytes of the JSON below without its images. Floats arrive as they left: scores are those of a local reward.
- ``application/json``: ``{"id": ..., "prompts": [...], "columns": {name: [...]}, "images": [PNG in base64, ...]}``, for
  any language that can write a PNG. Eight bits a channel, hence rounded.

A reply is JSON: ``{"id": ..., "version": ..., "scores": [number or null, ...], "failures": [sentence, ...]}``. Null is
a sample without a score. A float32 written as a decimal number and read again is the same float32.
"""

from __future__ import annotations

import base64
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load, save
from torch import Tensor

Format = Literal["safetensors", "png"]
CONTENT_TYPES: Mapping[Format, str] = {"safetensors": "application/octet-stream", "png": "application/json"}
TOKEN = "TROPISM_REWARD_TOKEN"  # in the environment, on both sides
TOKEN_WANTED = "wanted letters, digits and signs"
NAME_OF_CALL = re.compile(r"[0-9A-Za-z-]{1,64}")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Refused(ValueError):
    """A call that is not answered: an HTTP status, and one sentence that says why."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


@dataclass(frozen=True)
class Limits:
    """What a server takes in one call."""

    bytes: int = 256 * 2**20  # of the call, and of its pictures as float32
    images: int = 256
    pixels: int = 2**22  # of one picture


class Call(NamedTuple):
    """What is to be scored, by a name of the caller's that the reply repeats."""

    id: str
    images: Tensor  # (B, 3, H, W) floats in [0, 1]
    prompts: Sequence[str]  # B
    columns: Mapping[str, Sequence[Any]]  # B values each


def is_token(text: str) -> bool:
    """Whether it can be sent in a header as it is."""
    return bool(text) and text.isascii() and text.isprintable() and " " not in text


# Calls.


def pack(call: Call, format: Format = "safetensors") -> bytes:
    """The body of a call. Raises TypeError or ValueError for columns that are not JSON."""
    said: dict[str, Any] = {"id": call.id, "prompts": list(call.prompts), "columns": dict(call.columns)}
    if format == "png":
        said["images"] = [base64.b64encode(_png(image)).decode() for image in call.images]
        return json.dumps(said, allow_nan=False).encode()
    text = json.dumps(said, allow_nan=False).encode()
    images = call.images.detach().cpu().contiguous()
    return bytes(save({"images": images, "call": torch.frombuffer(bytearray(text), dtype=torch.uint8)}))


def unpack(content_type: str, body: bytes, limits: Limits) -> Call:
    """The call of a body. Raises Refused: 413 for what is too large, 415 for another type, 422 for what is no call."""
    kind = content_type.partition(";")[0].strip().lower()
    if kind == CONTENT_TYPES["png"]:
        said = _read_json(body)
        encoded = said.pop("images", None)
        call = _checked(said, limits)
        return call._replace(images=_decoded(encoded, len(call.prompts), limits))
    if kind == CONTENT_TYPES["safetensors"]:
        images, text = _tensors(body)
        call = _checked(_read_json(text), limits)
        return call._replace(images=_as_pictures(images, len(call.prompts), limits))
    raise Refused(415, f"the content type is {kind[:40]!r}; wanted {' or '.join(CONTENT_TYPES.values())}")


def _read_json(text: bytes) -> dict[str, Any]:
    try:
        said = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise Refused(422, "the call is not JSON; wanted an object with id, prompts and columns") from error
    if not isinstance(said, dict):
        raise Refused(422, f"the call is a JSON {type(said).__name__}; wanted an object with id, prompts and columns")
    return said


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _checked(said: Mapping[str, Any], limits: Limits) -> Call:
    """The call but for its pictures."""
    unknown = sorted(set(said) - {"id", "prompts", "columns"})
    if unknown:
        raise Refused(422, f"the call has {unknown[0][:40]!r}; wanted id, prompts, columns and images alone")
    name, prompts, columns = said.get("id"), said.get("prompts"), said.get("columns", {})
    if not isinstance(name, str) or not NAME_OF_CALL.fullmatch(name):
        raise Refused(422, "id is not 1 to 64 letters, digits and dashes; wanted a new one for each call")
    if not isinstance(prompts, list) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise Refused(422, "prompts is not a list of texts; wanted one text a picture")
    if len(prompts) > limits.images:
        raise Refused(413, f"the call has {len(prompts)} prompts; wanted at most {limits.images}: send several calls")
    if not isinstance(columns, dict) or not all(
        isinstance(values, list) and len(values) == len(prompts) for values in columns.values()
    ):
        raise Refused(422, f"columns is not an object of lists of {len(prompts)} values; wanted a value a picture")
    return Call(name, torch.empty(0), prompts, columns)


def _tensors(body: bytes) -> tuple[Tensor, bytes]:
    try:
        found = load(body)
    except Exception as error:  # whatever the parser says, the sender is to be told
        raise Refused(422, "the call is not a safetensors file; wanted one with images and call") from error
    if set(found) != {"images", "call"} or found["call"].dtype != torch.uint8:
        raise Refused(422, "the safetensors file does not hold images and call (bytes of JSON) alone")
    return found["images"], found["call"].numpy().tobytes()


def _as_pictures(images: Tensor, count: int, limits: Limits) -> Tensor:
    if images.dtype not in FLOATS or images.ndim != 4 or images.shape[1] != 3 or not images.numel():
        raise Refused(
            422, f"images is {tuple(images.shape)} of {images.dtype}; wanted floats (B, 3, height, width) in [0, 1]"
        )
    _check_size(images.shape[3], images.shape[2], limits)
    return _as_many(images, count)


def _as_many(images: Tensor, count: int) -> Tensor:
    if len(images) != count:
        raise Refused(422, f"the call has {len(images)} pictures and {count} prompts; wanted as many of each")
    return images


def _check_size(width: int, height: int, limits: Limits) -> None:
    if width * height > limits.pixels:
        raise Refused(413, f"a picture has {width} x {height} pixels; wanted at most {limits.pixels} in all")


def _png(image: Tensor) -> bytes:
    pixels = (image.detach().float() * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def _decoded(encoded: Any, count: int, limits: Limits) -> Tensor:
    if not isinstance(encoded, list) or len(encoded) != count or not all(isinstance(each, str) for each in encoded):
        raise Refused(422, f"images is not a list of {count} PNG files in base64; wanted one a prompt")
    pictures: list[Tensor] = []
    for each in encoded:
        pictures.append(_from_png(each, limits, room=limits.bytes - sum(12 * p[0].numel() for p in pictures)))
        if pictures[-1].shape != pictures[0].shape:
            raise Refused(422, "the pictures of a call have different sizes; wanted one size, or a call for each")
    return torch.stack(pictures).float() / 255


def _from_png(text: str, limits: Limits, room: int) -> Tensor:
    """(3, H, W) bytes; what a file unpacks to is looked at before it is unpacked."""
    try:
        opened = Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"])
        _check_size(*opened.size, limits)
        if 12 * opened.width * opened.height > room:
            raise Refused(413, f"the pictures are more than {limits.bytes} bytes as float32; send several calls")
        return torch.from_numpy(np.array(opened.convert("RGB"))).permute(2, 0, 1)
    except Refused:
        raise
    except Exception as error:  # Pillow raises of many kinds for files that are broken
        raise Refused(422, "images holds something that is not a PNG file in base64") from error


# Replies.


def reply(call: Call, version: str, scores: Sequence[float | None], failures: Sequence[str]) -> dict[str, Any]:
    """What is said to a call; characters that UTF-8 does not have are replaced."""
    said = [failure.encode("utf-8", "replace").decode() for failure in failures]
    return {"id": call.id, "version": version, "scores": list(scores), "failures": said}


def read_reply(content: bytes, call: Call) -> tuple[str, list[float], list[str]]:
    """(version, B scores with NaN for none, failures). Raises ValueError for what does not answer the call."""
    said = json.loads(content)
    if not isinstance(said, dict) or said.get("id") != call.id:
        raise ValueError("a reply to another call")
    scores, failures = said.get("scores"), said.get("failures", [])
    if not isinstance(scores, list) or len(scores) != len(call.prompts) or not isinstance(failures, list):
        raise ValueError(f"no list of {len(call.prompts)} scores")
    for score in scores:
        if score is not None and (isinstance(score, bool) or not isinstance(score, int | float)):
            raise ValueError(f"{score!r} as a score")
    return str(said.get("version")), [math.nan if score is None else float(score) for score in scores], failures
