"""A copy of a language model of which a LoRA, or every parameter, can be trained.

Sources: Hu et al. 2021, "LoRA"; Liu et al. 2024, "DoRA".
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from metarec.errors import ConfigError
from metarec.lm.backbone import Backbone

Trainable = Literal["lora", "all"]


@dataclass(frozen=True)
class Recipe:
    """Which parameters of a model are trained.

    Args:
        trainable: ``lora``: one low-rank update for all users; ``all``: every parameter.
        rank: Of the LoRA.
        alpha: The LoRA is scaled by ``alpha / rank``.
        targets: Linear layers that carry the LoRA; None takes those that PEFT knows for the architecture, which are
            queries and values of a Llama.
        seed: Of the LoRA's A.
        form: ``dora`` learns the length of every output's weights beside a low-rank update of their direction.
        dropout: Of the LoRA's input, and of the model's own dropout layers, while it is trained.
    """

    trainable: Trainable
    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] | None = None
    seed: int = 0
    form: Literal["lora", "dora"] = "lora"
    dropout: float = 0.0


@dataclass(frozen=True)
class TrainableCopy:
    """A copy of a model that shares its frozen parameters and owns the trained ones.

    Args:
        backbone: The copy.
        parameters: The trained parameters by name.
        wrapped: The PEFT model around the copy; None where all parameters are trained.
    """

    backbone: Backbone
    parameters: Mapping[str, torch.nn.Parameter]
    wrapped: Any

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Sets the trained parameters, without copying the tensors."""
        for name, parameter in self.parameters.items():
            parameter.data = tensors[name]

    def training(self, on: bool, seed: int = 0) -> AbstractContextManager[None]:
        """Returns a context in which dropout, where the recipe has any, draws by a seed."""
        return _dropping(self.backbone.model, seed) if on else nullcontext()

    def finish(self) -> None:
        """Merges a LoRA into copies of the weights that it changes, and freezes everything."""
        if self.wrapped is not None:
            for module in self.wrapped.modules():
                if hasattr(module, "lora_A"):
                    base = module.get_base_layer()
                    base.weight = torch.nn.Parameter(base.weight.detach().clone(), requires_grad=False)
            self.wrapped.merge_and_unload()
        self.backbone.model.requires_grad_(False)


def trainable_copy(backbone: Backbone, recipe: Recipe) -> TrainableCopy:
    """Copies a model and makes the parameters of a recipe trainable.

    Raises:
        ConfigError: The model is of low precision and all of it is to be trained, or no LoRA fits it.
    """
    full = recipe.trainable == "all"
    if full and backbone.dtype.itemsize < torch.float32.itemsize:
        raise ConfigError(
            f"'{backbone.name}' is loaded as {backbone.dtype}, too coarse for small steps", "Load it as float32"
        )
    # Modules are copied; parameters share their memory, which nothing below writes to.
    shared: dict[int, Any] = {
        id(parameter): torch.nn.Parameter(parameter.data, requires_grad=True) if full else parameter
        for parameter in backbone.model.parameters()
    }
    model = copy.deepcopy(backbone.model, shared)
    wrapped = None if full else _with_lora(model, recipe, backbone)
    if not full and backbone.kind == "classifier":
        _own_head(model)
    if recipe.dropout:
        _set_dropout(model, recipe.dropout)
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    model.eval()
    return TrainableCopy(replace(backbone, modules=model, open_model=None), parameters, wrapped)


def _own_head(model: Any) -> None:
    """Gives a classifier's copy trainable parameters of its own for all that lies behind its body."""
    for name, module in model.named_modules():
        if name.startswith(f"{model.base_model_prefix}.") or name == model.base_model_prefix:
            continue
        for key, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, key, torch.nn.Parameter(parameter.detach().clone(), requires_grad=True))


def _set_dropout(model: Any, share: float) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = share
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = share


@contextmanager
def _dropping(model: Any, seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.train()
        try:
            yield
        finally:
            model.eval()


def _with_lora(model: Any, recipe: Recipe, backbone: Backbone) -> Any:
    """Returns the PEFT model that adds a LoRA to a model."""
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,  # type: ignore[arg-type]  # the factor is a quotient; any number does
        target_modules=None if recipe.targets is None else list(recipe.targets),
        use_dora=recipe.form == "dora",
        lora_dropout=recipe.dropout,
        # GPT-2 keeps its weights as (in, out).
        fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in model.modules()),
        task_type=backbone.task_type,
    )
    try:
        # PEFT draws on the processor and moves what it drew.
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # PEFT asks transformers for a name that transformers has renamed; nobody else can do anything about it.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            torch.manual_seed(recipe.seed)
            return get_peft_model(model, settings)
    except ValueError as error:
        raise ConfigError(
            f"no LoRA fits '{backbone.name}': {str(error).splitlines()[0]}", "Name its linear layers as 'targets'"
        ) from None
