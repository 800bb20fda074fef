"""Opens models and tokenizers with transformers, which no other module imports.

Weights are safetensors only and remote code is refused.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from metarec.errors import BackboneError, MetarecError
from metarec.lm.hub import find_on_hub
from metarec.lm.model_files import refuse_missing_weights
from metarec.lm.names import missing_model_cure
from metarec.lm.rating_classes import RatingClasses

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Kind = Literal["causal", "masked", "encoder", "classifier"]


def transformers_package() -> Any:
    """Returns transformers, which is imported when it is first asked for, and kept quiet."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def open_model(
    name: str, location: str, dtype: torch.dtype, classes: RatingClasses | None = None
) -> tuple[Any, Kind, Any]:
    """Opens a frozen model in evaluation mode; returns it, its kind and its configuration.

    Args:
        name: How it was asked for.
        location: Its directory, or its name on the Hugging Face hub.
        dtype: Type of the weights.
        classes: Opens it as a classifier of ratings, with a new output layer where it has none for so many classes;
            None opens what its configuration says it is.

    Raises:
        BackboneError: It cannot be fetched or loaded, or needs remote code.
    """
    transformers = transformers_package()
    here = _here(name, location)
    with _explained(name):
        config = transformers.AutoConfig.from_pretrained(location, **here)
        if getattr(config, "auto_map", None):
            raise _remote_code_error(name)
        kind = _kind(config) if classes is None else "classifier"
        options: dict[str, Any] = {**here, "use_safetensors": True, "dtype": dtype}
        # Eager attention is the only one of transformers' kernels with a second derivative on every device.
        options |= {"attn_implementation": "eager", "output_loading_info": True}
        if classes is not None:
            config.num_labels = len(classes.ratings)
            config.update(classes.to_config())
            options |= {"config": config, "ignore_mismatched_sizes": True}
        model, loading = _loader(transformers, kind).from_pretrained(location, **options)
        body = f"{model.base_model_prefix}."
        if kind == "masked" and _headless(loading["missing_keys"], body):
            kind = "encoder"
            model, loading = _loader(transformers, kind).from_pretrained(location, **options)
        missing = loading["missing_keys"]
        refuse_missing_weights(name, missing if classes is None else [key for key in missing if key.startswith(body)])
    return model.requires_grad_(False).eval(), kind, config


def open_tokenizer(name: str, location: str) -> PreTrainedTokenizerBase:
    """Opens a model's tokenizer; see `open_model`."""
    with _explained(name):
        found: PreTrainedTokenizerBase = transformers_package().AutoTokenizer.from_pretrained(
            location, **_here(name, location)
        )
    return found


def _here(name: str, location: str) -> dict[str, bool]:
    """Returns options of a loader that asks the network for nothing that is here already."""
    return {"trust_remote_code": False, "local_files_only": Path(location).is_dir() or find_on_hub(name)}


def _headless(missing: Collection[str], body: str) -> bool:
    """Says whether a masked model lacks weights of its head alone.

    Sentence encoders are published so: under the name of the masked model that they were trained from.

    Args:
        missing: Names of the missing weights.
        body: What names of weights below the head start with.
    """
    return bool(missing) and not any(key.startswith(body) for key in missing)


def _loader(transformers: Any, kind: Kind) -> Any:
    """Returns what opens a kind of model."""
    return {
        "causal": transformers.AutoModelForCausalLM,
        "masked": transformers.AutoModelForMaskedLM,
        "encoder": transformers.AutoModel,
        "classifier": transformers.AutoModelForSequenceClassification,
    }[kind]


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turns what loaders raise into one error; of broken configurations, weights and tokenizers, they say anything."""
    try:
        yield
    except MetarecError:
        raise
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise _remote_code_error(name) from None
        lines = str(error).splitlines()
        raise BackboneError(
            f"the model '{name}' cannot be loaded: {lines[0] if lines else type(error).__name__}",
            missing_model_cure(name),
        ) from None


def _remote_code_error(name: str) -> BackboneError:
    return BackboneError(
        f"the model '{name}' asks to run code from its repository, which metarec never does",
        "Choose a model whose architecture is part of transformers",
    )


def _kind(config: Any) -> Kind:
    layers = getattr(config, "num_hidden_layers", 1)
    if not isinstance(layers, int) or layers < 1:
        raise BackboneError(f"the configuration's number of layers is {layers!r}", "Fetch the model again")
    architecture = str((config.architectures or [""])[0])
    if architecture.endswith("ForSequenceClassification") and RatingClasses.of_config(config) is not None:
        return "classifier"
    if architecture.endswith("ForMaskedLM"):
        return "masked"
    if architecture.endswith(("ForCausalLM", "LMHeadModel")):
        return "causal"
    if architecture.endswith(("Model", "ForSequenceClassification")):
        return "encoder"
    raise BackboneError(
        f"architecture '{architecture}' is neither a causal LM, a masked LM nor an encoder", "Choose another model"
    )
