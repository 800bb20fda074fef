"""Looks for a model before any loader does; one of the Hugging Face hub in the hub's cache, else with a short request.

Imports neither torch nor transformers, so that a wrong name is said before either is.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from metarec.errors import BackboneError
from metarec.lm.model_files import check_model_dir, missing_shards, refuse_pickles
from metarec.lm.names import MINILM, SMOLLM2, known_names, minilm_dir, named_dir, smollm2_gguf

# Seconds for the one request; retries inside the loaders take half a minute to say that there is no network.
_TIMEOUT = 5.0


def check_backbone(name: str) -> None:
    """Looks for a model by name, without opening it: in its wheel, as a directory, or on the hub.

    Raises:
        BackboneError: Nothing is called so, or the hub's model cannot be used, see `find_on_hub`.
    """
    if name == SMOLLM2:
        smollm2_gguf()
    elif name == MINILM:
        minilm_dir()
    elif named_dir(name) is None:
        find_on_hub(name)


def find_on_hub(name: str) -> bool:
    """Says whether a model of the hub is whole in the hub's cache, so that loading it needs no network.

    Args:
        name: The model's name on the hub.

    Raises:
        BackboneError: There is no such model, it has no safetensors weights, or it is not in the cache and the hub
            cannot be reached.
    """
    cached = _cached(name)
    if cached is not None and _is_whole(cached):
        check_model_dir(cached)
        return True
    refuse_pickles(name, _files_on_hub(name))
    return False


def _cached(name: str) -> Path | None:
    """Returns the newest snapshot of a model in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        raise BackboneError(
            f"there is no directory '{name}', and the Hugging Face hub has no such names", "Give one of the two"
        ) from None
    return Path(config).parent if isinstance(config, str) else None


def _is_whole(snapshot: Path) -> bool:
    """Says whether a snapshot has weights and a tokenizer; a download that was interrupted leaves a part."""
    words = [*snapshot.glob("tokenizer*"), *snapshot.glob("vocab*")]
    return bool(words) and any(snapshot.glob("*.safetensors")) and not missing_shards(snapshot)


def _files_on_hub(name: str) -> Iterable[str]:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        found = HfApi().model_info(name, timeout=_TIMEOUT)
    except GatedRepoError:
        raise BackboneError(
            f"the model '{name}' asks for consent on the Hugging Face hub", "Give it there, then: hf auth login"
        ) from None
    except RepositoryNotFoundError:
        raise BackboneError(
            f"there is no directory '{name}', and no such model on the Hugging Face hub",
            f"Check the name; a private model needs: hf auth login. {known_names(name)}",
        ) from None
    except Exception as error:  # without a network each system, proxy and server fails in its own way
        why = str(error).rstrip(".")
        raise BackboneError(
            f"there is no directory '{name}', and the Hugging Face hub cannot be asked for it: {why}",
            f"Give a directory, or fetch it where there is a network: hf download {name}. {known_names(name)}",
        ) from None
    return [file.rfilename for file in found.siblings or []]
