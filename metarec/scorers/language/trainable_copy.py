"""A copy of a language model of which a LoRA, or every parameter, can be trained.

Sources: Hu et al. 2021, "LoRA"; Liu et al. 2024, "DoRA"; Zhang et al. 2023, "AdaLoRA".
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
Form = Literal["lora", "dora", "adalora"]
# Of an AdaLoRA: shares of the steps before the first rank is taken away, and after the last one.
_BEFORE, _AFTER = 0.1, 0.25


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
        form: ``dora`` learns the length of every output's weights beside a low-rank update of their direction;
            ``adalora`` starts with half as many ranks more, and ends with `rank` of them on average, where they matter
            most.
        dropout: Of the LoRA's input, and of the model's own dropout layers, while it is trained.
    """

    trainable: Trainable
    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] | None = None
    seed: int = 0
    form: Form = "lora"
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


def trainable_copy(backbone: Backbone, recipe: Recipe, steps: int = 1) -> TrainableCopy:
    """Copies a model and makes the parameters of a recipe trainable.

    Args:
        backbone: The model.
        recipe: Which parameters.
        steps: How many steps are taken in all, by which an AdaLoRA takes ranks away.

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
    wrapped = None if full else _with_lora(model, recipe, backbone, steps)
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


def _with_lora(model: Any, recipe: Recipe, backbone: Backbone, steps: int) -> Any:
    """Returns the PEFT model that adds a LoRA to a model."""
    from peft import AdaLoraConfig, LoraConfig, get_peft_model

    common: dict[str, Any] = {
        "lora_alpha": recipe.alpha,
        "target_modules": None if recipe.targets is None else list(recipe.targets),
        "lora_dropout": recipe.dropout,
        # GPT-2 keeps its weights as (in, out).
        "fan_in_fan_out": any(type(module).__name__ == "Conv1D" for module in model.modules()),
        "task_type": backbone.task_type,
    }
    if recipe.form == "adalora":
        first = recipe.rank + max(1, recipe.rank // 2)
        before, after = int(_BEFORE * steps), int(_AFTER * steps)
        settings: LoraConfig = AdaLoraConfig(
            target_r=recipe.rank, init_r=first, tinit=before, tfinal=after, total_step=steps, **common
        )
    else:
        settings = LoraConfig(r=recipe.rank, use_dora=recipe.form == "dora", **common)
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
