"""A device with two levels of memory: DRAM, and flash or a disk behind it. One YAML file each, with the source of every number.

    name: phone
    dram_bytes_per_second: {value: 60.0e+9, source: "…"}
    flash_bytes_per_second: {value: 1.0e+9, source: "…"}

A batch of reads from flash takes one latency, and then as long as its bytes take at the bandwidth or its reads at the rate of
reads, whichever is longer. Every read is rounded up to whole pages.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from sparsify.errors import RecipeError, nearest
from sparsify.files import storage_errors
from sparsify.metadata import user_path

DEVICES = "devices"
"""Folder of this package with the files of devices."""


class Figure(BaseModel):
    """A number of a device and where it comes from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    value: float = Field(ge=0, allow_inf_nan=False)
    source: str = Field(min_length=1)


class Positive(Figure):
    value: float = Field(gt=0, allow_inf_nan=False)


Stripped = Annotated[str, BeforeValidator(lambda text: " ".join(text.split()) if isinstance(text, str) else text)]


class Device(BaseModel):
    """What decoding takes on a device.

    Attributes:
        dram_bytes_per_second: Rate at which decoding reads weights that are in memory.
        flash_bytes_per_second: Rate at which it reads what is not.
        read_latency_seconds: Until the first byte of a batch of reads arrives. None for 0.
        reads_per_second: Most reads, however small they are. None for no limit.
        page_bytes: Unit of reads from flash. None for single bytes.
        token_seconds: What a token takes in addition to its bytes. None for 0.
        concurrent: Whether a layer reads flash and computes on what is in memory at the same time.
        gathers: Whether a layer computes on nothing before all its slots are in memory, and then reads all of them from there, those
            that were late as well, as this package's runtime does. Only what is streamed is read during other work then.
        slot_bytes_per_second: Rate at which a device that gathers reads slots from memory; None for that of other weights. It is less,
            since their rows are apart, and those of down are added up instead of multiplied.
        places_seconds: What finding places for the slots of a layer takes, each time. None for 0.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Stripped
    dram_bytes_per_second: Positive
    flash_bytes_per_second: Positive
    read_latency_seconds: Figure | None = None
    reads_per_second: Positive | None = None
    page_bytes: Positive | None = None
    token_seconds: Figure | None = None
    concurrent: bool = False
    gathers: bool = False
    slot_bytes_per_second: Positive | None = None
    places_seconds: Figure | None = None

    def dram_seconds(self, num_bytes: float) -> float:
        return num_bytes / self.dram_bytes_per_second.value

    def flash_seconds(self, num_bytes: float, reads: float) -> float:
        """Of a batch of reads; 0 without any."""
        if not num_bytes:
            return 0.0
        latency = self.read_latency_seconds.value if self.read_latency_seconds else 0.0
        rate = self.reads_per_second.value if self.reads_per_second else math.inf
        return latency + max(num_bytes / self.flash_bytes_per_second.value, reads / rate)

    def read_bytes(self, num_bytes: float) -> float:
        """What one read of so many bytes transfers: whole pages."""
        page = self.page_bytes.value if self.page_bytes else 0.0
        return math.ceil(num_bytes / page) * page if page else num_bytes

    def slots_seconds(self, num_bytes: float) -> float:
        """Of computing on slots that are in memory."""
        rate = self.slot_bytes_per_second
        return self.dram_seconds(num_bytes) if rate is None else num_bytes / rate.value

    @property
    def fixed_seconds(self) -> float:
        """Of a token, whatever it reads."""
        return self.token_seconds.value if self.token_seconds else 0.0


def device_names() -> list[str]:
    """Devices that come with the package."""
    return sorted(path.stem for path in (Path(__file__).parent / DEVICES).glob("*.yaml"))


def read_device(name_or_path: str) -> Device:
    """A device of the package by its name, or of a YAML file.

    Raises:
        RecipeError: If there is no such device or file, or a number in it is missing or invalid.
    """
    if name_or_path in device_names():
        text = (Path(__file__).parent / DEVICES / f"{name_or_path}.yaml").read_text("utf-8")
        return Device.model_validate(yaml.safe_load(text))
    path = user_path(name_or_path)
    if not path.is_file():
        raise RecipeError(
            f"There is no device {name_or_path!r}.",
            allowed=f"{nearest(name_or_path, device_names())}Devices: {', '.join(device_names())}, or a YAML file.",
        )
    try:
        with storage_errors(path, "read"):
            content = yaml.safe_load(path.read_text("utf-8"))
        if not isinstance(content, dict):
            raise RecipeError(f"{path} is not a device: it holds no settings.", next_step=_EXAMPLE)
        return Device.model_validate(content)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not YAML: {str(error).splitlines()[0]}.", next_step=_EXAMPLE) from error
    except ValidationError as error:
        # A number under another name is both missing and unknown: the unknown name says more.
        first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        message = f"{first['msg'][:1].lower()}{first['msg'][1:]}"
        raise RecipeError(f"{path}: {where}: {message}.", next_step=_EXAMPLE) from error


_EXAMPLE = "Each number has a value and a source: dram_bytes_per_second: {value: 60.0e+9, source: data sheet}"
