"""Devices that this machine computes on, and whether a name is one of them. Imports torch when it is asked."""

from __future__ import annotations

import re

from metarec.errors import ConfigError

_NAME = re.compile(r"cpu|mps|(cuda|xpu)(:\d+)?")
_CURE = "Add --device cpu, or device='cpu' in Python"


def devices() -> list[str]:
    """Returns the names of the devices that metarec can use here, the processor first, e.g. ``["cpu", "cuda:0"]``."""
    import torch

    found = ["cpu"]
    if torch.cuda.is_available():
        found += [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    if torch.xpu.is_available():
        found += [f"xpu:{number}" for number in range(torch.xpu.device_count())]
    if torch.backends.mps.is_available():
        found.append("mps")
    return found


def refused_accelerator() -> str | None:
    """Returns the kind of an accelerator that torch has here and metarec does not use, e.g. ``"npu"``."""
    import torch

    here = torch.accelerator.current_accelerator(check_available=True)
    return None if here is None or here.type in ("cuda", "xpu", "mps") else here.type


def check_device(name: str, where: str = "") -> str:
    """Returns the name of a device that this machine has; ``cuda`` is the first of several.

    Args:
        name: The device.
        where: The file or option it came from, for the message.

    Raises:
        ConfigError: This machine has no such device.
    """
    here = devices()
    if name in here or f"{name}:0" in here:
        return name
    raise ConfigError(
        f"{where}{': ' if where else ''}there is no device '{name}': this machine has {', '.join(here)}",
        _CURE,
    )


def check_device_name(name: str) -> str:
    """Returns the name of a device of a kind that metarec knows, whether this machine has it or not; imports no torch.

    Raises:
        ConfigError: There are no such devices.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"there is no device '{name}': metarec knows cpu, cuda, cuda:0, xpu, xpu:0 and mps", _CURE)
    return name
