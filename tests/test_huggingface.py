"""Folders in Hugging Face's format: read, written, compared with transformers, and bad ones refused."""
import json
import os
import shutil
import struct
import sys
import tracemalloc

import numpy as np
import pytest
from conftest import reference
from safetensors.numpy import load_file, save_file
from tiny import (
    QUICK,
    SHAPE,
    command,
    edit_config,
    every_model,
    every_shape,
    lively,
    logits_of,
    random_ids,
    refused,
    small,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import evaluate
import generate
import train
from extras import export_gguf, quantize
from hardware.device import to_host
from nanollm import Config, NanoLLM
from storage import checkpoint, huggingface

# ---------------------------------------------------------------- folders

def read_tensors(folder):
    return load_file(folder / "model.safetensors")


def write_tensors(folder, tensors):
    save_file(tensors, folder / "model.safetensors")


@pytest.fixture
def folder(tmp_path):
    """A saved model, as small as possible."""
    tiny = Config(3, embedding_dim=4, n_block=1, n_head=2, n_kv_head=1, max_context=8, hidden_dim=3)
    lively(tiny).save(tmp_path / "model")
    return tmp_path / "model"


@every_shape
def test_a_saved_model_loads_bit_for_bit(tmp_path, activation, n_kv_head, tied):
    config = small(activation=activation, n_kv_head=n_kv_head, tie_embeddings=tied, rope_theta=123.5, eps=3e-4)
    model = lively(config)
    model.save(tmp_path / "new" / "folder")
    again = NanoLLM.load(tmp_path / "new" / "folder")
    assert again.config == config and again.weights.flat.dtype == np.float32
    assert (to_host(again.weights.flat) == to_host(model.weights.flat)).all()
    assert (logits_of(again, random_ids(config, 2, 9)) == logits_of(model, random_ids(config, 2, 9))).all()
    assert sorted(os.listdir(tmp_path / "new" / "folder")) == ["config.json", "model.safetensors"]


def test_a_folder_is_named_by_a_string_too_and_settings_are_written_along(tmp_path, folder):
    model = NanoLLM.load(str(folder))
    model.save(str(folder), eos_token_id=2, model_type="llama")     # replaces the old one
    config = json.loads((folder / "config.json").read_text())
    assert config["eos_token_id"] == 2 and config["bos_token_id"] is None
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000     # transformers 4 and 5
    assert (to_host(NanoLLM.load(folder).weights.flat) == to_host(model.weights.flat)).all()


def test_a_save_that_fails_leaves_the_old_model(folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full_disk(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(huggingface, "save_file", full_disk)
    with pytest.raises(OSError):
        lively(NanoLLM.load(folder).config, seed=9).save(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("name", ["float16", "float64", "bfloat16"])
def test_other_float_types_are_converted(folder, name):
    dtype = getattr(reference("ml_dtypes"), name) if name == "bfloat16" else np.dtype(name)
    stored = {key: value.astype(dtype) for key, value in read_tensors(folder).items()}
    write_tensors(folder, stored)
    model = NanoLLM.load(folder)
    assert model.weights.flat.dtype == np.float32
    for key, t in model.parameters().items():
        assert (to_host(t.data) == stored[key].astype(np.float32)).all()


def shard(folder, parts=3):
    """Spread model.safetensors over several files and an index."""
    tensors = sorted(read_tensors(folder).items())
    weight_map = {}
    for i in range(parts):
        file = f"model-{i + 1:05}-of-{parts:05}.safetensors"
        save_file(dict(tensors[i::parts]), folder / file)
        weight_map |= {name: file for name, _ in tensors[i::parts]}
    (folder / "model.safetensors").unlink()
    write_index(folder, weight_map)
    return weight_map


def write_index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_shards_are_put_together(folder):
    whole = to_host(NanoLLM.load(folder).weights.flat)
    shard(folder)
    assert (to_host(NanoLLM.load(folder).weights.flat) == whole).all()


def test_tensors_that_follow_from_others_are_skipped(tmp_path):
    model = lively(small(tie_embeddings=True))
    model.save(tmp_path)
    tensors = read_tensors(tmp_path)
    write_tensors(tmp_path, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"],
                                       "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32)})
    assert (to_host(NanoLLM.load(tmp_path).weights.flat) == to_host(model.weights.flat)).all()


def test_settings_that_may_be_absent_have_llamas_defaults(folder):
    edit_config(folder, "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_theta",
                "rope_parameters", "hidden_act", "tie_word_embeddings", "attention_bias", "mlp_bias", "architectures")
    tensors = read_tensors(folder)
    for x in "kv":
        name = f"model.layers.0.self_attn.{x}_proj.weight"
        tensors[name] = np.tile(tensors[name], (2, 1))
    write_tensors(folder, tensors)
    assert NanoLLM.load(folder).config == Config(3, 4, 1, 2, 2, 2048, 3, 1e-6, 10000.0, "silu", False)


def test_a_tokenizer_inserts_special_tokens_only_where_the_model_has_a_bos():
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "a": 1, "</s>": 2}, unk_token="a"))
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    for settings, ids in ({}, [1]), ({"bos_token_id": None}, [1]), ({"bos_token_id": 0, "eos_token_id": [2]}, [0, 1]):
        written = huggingface.tokenizer_files(tokenizer, settings, 8)
        assert Tokenizer.from_str(written["tokenizer.json"]).encode("a").ids == ids
        about, generation = (json.loads(written[name]) for name in ("tokenizer_config.json", "generation_config.json"))
        assert about["model_max_length"] == 8 and about["eos_token"] is None
        assert about.get("bos_token") == ("<s>" if settings.get("bos_token_id") == 0 else None)
        assert generation == {"bos_token_id": None, "eos_token_id": None} | settings


@pytest.mark.parametrize("spelling", [
    {"rope_theta": 77.0}, {"rope_theta": 77}, {"rope_theta": 77.0, "rope_scaling": None},
    {"rope_parameters": {"rope_theta": 77.0, "rope_type": "default"}}, {"rope_parameters": {"rope_theta": 77.0}},
    {"rope_theta": 5.0, "rope_parameters": {"rope_theta": 77.0, "rope_type": "default"}},   # as transformers 5 decides
    {"rope_theta": 77.0, "rope_scaling": {"type": "default"}}, {"rope_theta": 77.0, "rope_parameters": {}},
    {"rope_theta": 77.0, "rope_scaling": {"rope_type": "default"}, "rope_parameters": None},
])
def test_every_spelling_of_ropes_theta(folder, spelling):
    edit_config(folder, "rope_theta", "rope_parameters", **spelling)
    assert NanoLLM.load(folder).config.rope_theta == 77


@pytest.mark.parametrize("theirs, ours", [("gelu_pytorch_tanh", "gelu"), ("gelu_new", "gelu"), ("gelu_fast", "gelu"),
                                          ("swish", "silu"), ("relu", "relu")])
def test_other_names_of_activations(folder, theirs, ours):
    edit_config(folder, hidden_act=theirs)
    assert NanoLLM.load(folder).config.activation == ours


def test_a_mistral_without_a_window_is_a_llama(folder):
    whole = to_host(NanoLLM.load(folder).weights.flat)
    for window in {"sliding_window": 4096}, {}:                     # 4096 is what transformers takes if it is absent
        edit_config(folder, model_type="mistral", **window)
        refused(lambda: NanoLLM.load(folder), "config.json", "sliding_window", "4096")
        edit_config(folder, "sliding_window")
    edit_config(folder, model_type="mistral", sliding_window=None, pretraining_tp=2)
    assert (to_host(NanoLLM.load(folder).weights.flat) == whole).all()
    edit_config(folder, "num_key_value_heads")
    refused(lambda: NanoLLM.load(folder), "num_key_value_heads", "8")


# ---------------------------------------------------------------- a tied output layer that is in the file too

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize("kind", ["float32", "float16", "shards", "8 bits", "4 bits"])
def test_a_tied_output_layer_must_be_the_embedding(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(huggingface, "AT_ONCE", 100)        # four rows of the embedding
    model, bits = lively(small(tie_embeddings=True)), int(kind[0]) if kind.endswith("bits") else None
    model.save(tmp_path)
    if bits:
        quantize.write(tmp_path / "quantised", tmp_path, model, bits)
    folder = tmp_path / "quantised" if bits else tmp_path
    tensors = read_tensors(folder)
    if kind == "float16":
        tensors = {name: value.astype(np.float16) for name, value in tensors.items()}
    heads = {name.replace(EMBED, HEAD): value for name, value in tensors.items() if name.startswith(EMBED)}

    def write(heads):
        write_tensors(folder, tensors | heads)
        if kind == "shards":
            shard(folder)
    write(heads)
    assert NanoLLM.load(folder).lm_head is not None
    for name, value in heads.items():
        other = value.copy()
        other[-1, -1] += 1
        write(heads | {name: other})
        refused(lambda: NanoLLM.load(folder), "safetensors", f"{name} is not", "tie_word_embeddings", "false")
        write(heads | {name: value[1:]})
        refused(lambda: NanoLLM.load(folder), "safetensors", name, str(value[1:].shape), str(value.shape))
    write({HEAD: tensors[EMBED].astype(np.int32)})
    refused(lambda: NanoLLM.load(folder), HEAD, "I32")


# ---------------------------------------------------------------- folders that are refused

@pytest.mark.parametrize("setting, value, words", [
    ("model_type", "gpt2", ["gpt2"]), ("model_type", None, []), ("model_type", ["llama"], []),
    ("rope_scaling", {"type": "linear", "factor": 2.0}, ["linear"]), ("rope_scaling", {"factor": 2.0}, []),
    ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}, ["high_freq_factor", "missing"]),
    ("rope_scaling", dict.fromkeys(huggingface.LLAMA3, 4.0) | {"rope_type": "llama3"}, ["low", "high", "4.0"]),
    ("rope_scaling", "linear", []), ("rope_parameters", {"type": "longrope"}, ["longrope"]),
    ("rope_scaling", [1], []), ("rope_scaling", 2.0, []), ("rope_scaling", {"type": ["default"]}, []),
    ("rope_parameters", {"rope_type": "yarn", "rope_theta": 10000.0}, ["yarn"]), ("rope_parameters", "default", []),
    ("rope_parameters", {"full_attention": {"rope_type": "default"}}, []),
    ("attention_bias", True, []), ("mlp_bias", True, []), ("quantization_config", {"bits": 4}, []),
    ("head_dim", 3, ["3"]), ("head_dim", "2", []), ("head_dim", 0, []),
    ("hidden_act", "gelu", ["gelu"]), ("hidden_act", "tanh", []), ("hidden_act", None, []), ("hidden_act", 1, []),
    ("hidden_act", ["silu"], []), ("hidden_act", {}, []),
    *((name, value, []) for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
                                     "max_position_embeddings", "intermediate_size")
      for value in ("4", None, [4], {}, 4.0, True, 0, -1, 10**13, 10**30)),
    *(("num_key_value_heads", value, []) for value in ("1", [1], 1.0, True, 0, 3, 10**30)),
    *((name, value, []) for name in ("rms_norm_eps",) for value in ("1e-6", None, [1], 0, -1, True, 10**400)),
    ("tie_word_embeddings", "false", []), ("tie_word_embeddings", None, []), ("tie_word_embeddings", 1, []),
])
def test_a_setting_that_is_wrong_or_not_implemented_is_named(folder, setting, value, words):
    edit_config(folder, **{setting: value})
    refused(lambda: NanoLLM.load(folder), "config.json", setting, *words)


@pytest.mark.parametrize("value", ["1", None, [1], {}, True, 0, -1])
def test_a_wrong_rope_theta_is_named_in_either_spelling(folder, value):
    edit_config(folder, "rope_parameters", rope_theta=value)
    refused(lambda: NanoLLM.load(folder), "config.json", "rope_theta")
    edit_config(folder, "rope_theta", rope_parameters={"rope_type": "default", "rope_theta": value})
    refused(lambda: NanoLLM.load(folder), "config.json", "rope_theta")


@pytest.mark.parametrize("setting", ["model_type", "vocab_size", "hidden_size", "num_hidden_layers",
                                     "num_attention_heads", "intermediate_size"])
def test_a_missing_setting_is_named(folder, setting):
    edit_config(folder, setting)
    refused(lambda: NanoLLM.load(folder), "config.json", setting)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'"llama"', b"\xff\xfe{}", b"[" * 100_000,
                                     b'{"model_type": "llama", "vocab_size": ' + b"1" * 5000 + b"}"])
def test_a_config_that_is_not_a_json_object(folder, content):
    (folder / "config.json").write_bytes(content)
    refused(lambda: NanoLLM.load(folder), "config.json")


def test_missing_files(folder, tmp_path):
    refused(lambda: NanoLLM.load(tmp_path / "nowhere"), "config.json", "nowhere")
    refused(lambda: NanoLLM.load(folder / "config.json"), "config.json")
    shutil.copytree(folder, tmp_path / "other")
    (tmp_path / "other" / "config.json").unlink()
    refused(lambda: NanoLLM.load(tmp_path / "other"), "config.json")
    (folder / "model.safetensors").unlink()
    refused(lambda: NanoLLM.load(folder), "model.safetensors")
    (folder / "model.safetensors").mkdir()
    refused(lambda: NanoLLM.load(folder), "model.safetensors")


NORM, DOWN = "model.norm.weight", "model.layers.0.mlp.down_proj.weight"


@pytest.mark.parametrize("change, words", [
    (lambda t: t.pop(DOWN), [DOWN, "missing"]),
    (lambda t: t.pop("lm_head.weight"), ["lm_head.weight", "missing"]),
    (lambda t: t.update({"model.layers.1.mlp.down_proj.weight": t[DOWN]}), ["model.layers.1.mlp.down_proj.weight"]),
    (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": t[NORM]}), ["model.layers.0.self_attn.q_proj.bias"]),
    (lambda t: t.update({"two\nlines\x1b[2J": t[NORM]}), ["two"]),
    (lambda t: t.update({DOWN: t[DOWN].T.copy()}), [DOWN, "(3, 4)", "(4, 3)"]),
    (lambda t: t.update({DOWN: t[DOWN].reshape(-1)}), [DOWN, "(12,)"]),
    (lambda t: t.update({NORM: t[NORM][:0]}), [NORM, "(0,)"]),
    (lambda t: t.update({NORM: t[NORM].astype(np.int32)}), [NORM, "I32"]),
    (lambda t: t.update({NORM: t[NORM].astype(np.uint8)}), [NORM, "U8"]),
    (lambda t: t.update({NORM: t[NORM] > 0}), [NORM, "BOOL"]),
    *((lambda t, bad=bad, name=name: t.update({name: np.where(np.arange(t[name].size).reshape(t[name].shape) == 1,
                                                              np.float32(bad), t[name])}), [name, "NaN"])
      for bad in ("nan", "inf", "-inf") for name in (NORM, DOWN)),
    (lambda t: t.update({NORM: np.array([1, 1, 1, np.inf], np.float16)}), [NORM, "NaN"]),
    (lambda t: t.update({NORM: np.array([1, 1, 1, 1e300])}), [NORM]),         # infinite as float32
])
@pytest.mark.parametrize("at_once", [1, 8, 1 << 20])
def test_wrong_tensors_are_named(folder, monkeypatch, at_once, change, words):
    monkeypatch.setattr(huggingface, "AT_ONCE", at_once)
    tensors = read_tensors(folder)
    change(tensors)
    write_tensors(folder, tensors)
    refused(lambda: NanoLLM.load(folder), "model.safetensors", *words)


def test_a_file_cut_short_anywhere(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for length in [*range(12), *range(12, len(whole), 23), len(whole) - 1]:
        path.write_bytes(whole[:length])
        refused(lambda: NanoLLM.load(folder), "model.safetensors")
    path.write_bytes(whole + b"\0")
    refused(lambda: NanoLLM.load(folder), "model.safetensors")


def allocated(call):
    """The most bytes that call() held at once."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("shards, dtype", [(False, np.float32), (True, np.float16)])
def test_a_model_that_is_only_read_takes_its_weights_and_no_more(tmp_path, monkeypatch, shards, dtype):
    monkeypatch.setattr(huggingface, "AT_ONCE", 1 << 14)
    model = lively(Config(8000, embedding_dim=64, n_block=1, n_head=2, hidden_dim=64, max_context=8))
    model.save(tmp_path)
    write_tensors(tmp_path, {name: value.astype(dtype) for name, value in read_tensors(tmp_path).items()})
    if shards:
        shard(tmp_path)
    found = []
    assert allocated(lambda: found.append(NanoLLM.load(tmp_path, trainable=False))) < 1.15 * model.weights.flat.nbytes
    assert not found[0].trainable and found[0].weights.grad is None
    ids = random_ids(model.config, 1, 5)
    np.testing.assert_allclose(logits_of(found[0], ids), logits_of(model, ids), rtol=1e-2, atol=1e-1)
    assert NanoLLM.load(tmp_path).trainable


def with_header(folder, header, length=None, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


@pytest.mark.parametrize("header, length", [
    ({NORM: {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}, None),
    ({NORM: {"dtype": "F32", "shape": [2**63, 2**63], "data_offsets": [0, 8]}}, None),
    ({NORM: {"dtype": "F32", "shape": [-1], "data_offsets": [0, 8]}}, None),
    ({NORM: {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}, None),
    ({NORM: {"dtype": "F32", "shape": [2], "data_offsets": [0, 2**64]}}, None),
    ({NORM: {"dtype": "F33", "shape": [2], "data_offsets": [0, 8]}}, None),
    ({NORM: None}, None), ([], None), (b"\xff\xff", None), (b"[" * 50_000, None),
    ({}, 2**40), ({}, 2**63), ({}, 90_000_000), ({}, 0), ({}, None),
])
def test_a_header_that_lies_is_refused_before_anything_is_allocated(folder, header, length):
    with_header(folder, header, length, bytes(8))
    assert allocated(lambda: refused(lambda: NanoLLM.load(folder), "model.safetensors")) < 10e6


@pytest.mark.parametrize("changes", [
    {"num_hidden_layers": 10**6}, {"num_hidden_layers": 10**12}, {"vocab_size": 10**12}, {"vocab_size": 10**6},
    {"hidden_size": 2**20}, {"hidden_size": 2**40}, {"intermediate_size": 2**20}, {"intermediate_size": 2**62},
    {"max_position_embeddings": 10**12}, {"hidden_size": 2**20, "head_dim": 2**19, "num_hidden_layers": 10**6},
])
def test_a_config_that_asks_for_terabytes_is_refused_before_anything_is_allocated(folder, changes):
    edit_config(folder, **changes)
    assert allocated(lambda: refused(lambda: NanoLLM.load(folder), str(folder))) < 10e6


def in_the_cache(folder, root):
    """The layout of the Hugging Face cache: every file of a snapshot is a link to a blob. Returns the snapshot."""
    snapshot, blobs = root / "models--some--one/snapshots/0123abcd", root / "models--some--one/blobs"
    snapshot.mkdir(parents=True), blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        if path.is_file():
            shutil.copy(path, blobs / f"blob{number}")
            (snapshot / path.name).symlink_to(f"../../blobs/blob{number}")
    return snapshot


@pytest.mark.parametrize("shards", [False, True])
def test_files_may_be_links(folder, tmp_path, shards):
    whole = to_host(NanoLLM.load(folder).weights.flat)
    if shards:
        shard(folder)
    snapshot = in_the_cache(folder, tmp_path)
    assert (to_host(NanoLLM.load(snapshot).weights.flat) == whole).all()
    for path in (snapshot.parent.parent / "blobs").iterdir():
        away = path.rename(tmp_path / "away")
        named, = (link for link in snapshot.iterdir() if not link.exists())
        refused(lambda: NanoLLM.load(snapshot), f"{named} is a link to {path}, which does not exist")
        away.rename(path)


@pytest.mark.usefixtures("cheap")
def test_every_command_takes_a_folder_of_the_cache(finished, tmp_path):
    reference("gguf")
    run, (_, text, *_), _ = finished
    snapshot = in_the_cache(run, tmp_path)
    new = ["--init-from", snapshot, *QUICK, "--max-steps", 1, "--text", text, "--artifact-dir"]
    for main, *flags in (
            (generate.main, snapshot, "--prompt", "the", "--max-new-tokens", 1),
            (evaluate.main, snapshot, "--text", text),
            (train.main, *new, "run1"), (train.main, "--tokenizer", snapshot / "tokenizer.json", *new, "run2"),
            (quantize.main, snapshot, "small"), (export_gguf.main, snapshot, "model.gguf")):
        code, _, err = command(main, *flags)
        assert code == 0, err
    assert not any(path.is_symlink() for path in (tmp_path / "small").iterdir())


@pytest.mark.usefixtures("cheap")
def test_a_model_on_the_hub_is_named_by_its_name(finished, tmp_path, monkeypatch):
    hub, (run, (_, text, *_), _), asked = reference("huggingface_hub"), finished, []
    snapshot = in_the_cache(run, tmp_path)

    def download(name, allow_patterns):
        if name == "org/gated":
            raise hub.errors.LocalEntryNotFoundError("cannot be\nreached")
        asked.append(name)
        assert {path.name for path in hub.utils.filter_repo_objects(
            [*snapshot.iterdir(), tmp_path / "model.bin", tmp_path / "consolidated.safetensors"], key=lambda p: p.name,
            allow_patterns=allow_patterns)} == {
            "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
        return str(snapshot)
    monkeypatch.setattr(hub, "snapshot_download", download)
    new = "--init-from", "hf:org/name", *QUICK, "--max-steps", 1, "--text", text, "--artifact-dir", "run"
    for main, *flags in ((generate.main, "hf:org/name", "--prompt", "the", "--max-new-tokens", 1), (train.main, *new)):
        code, _, err = command(main, *flags)
        assert code == 0, err
    assert asked == ["org/name"] * 2
    assert train.main(["--resume", "--artifact-dir", "run", "--max-steps", "2"]) == 0 and len(asked) == 2
    code, out, err = command(generate.main, "hf:org/gated", name="generate.py")
    assert (code, out, err) == (2, "", "generate.py: hf:org/gated: cannot be reached\n")
    code, _, err = command(generate.main, "hf:org/name", "--top-p", 2)
    assert code == 2 and "--top-p" in err and len(asked) == 2       # nothing is downloaded for a command that is wrong
    bare = tmp_path / "bare"
    bare.mkdir()
    monkeypatch.setattr(hub, "snapshot_download", lambda name, allow_patterns: str(bare))
    refused(lambda: huggingface.from_hub("hf:org/name"), "hf:org/name has no config.json")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused(lambda: huggingface.from_hub("hf:org/name"), "hf:org/name", "pip install huggingface_hub")


@pytest.mark.usefixtures("cheap")
def test_a_tokenizer_on_the_hub_is_named_by_its_name(finished, tmp_path, monkeypatch):
    """Nothing else of its repository is downloaded, and a resumed run needs no Hub."""
    hub, (run, (_, text, *_), _), asked = reference("huggingface_hub"), finished, []
    snapshot = in_the_cache(run, tmp_path)
    monkeypatch.setattr(hub, "snapshot_download", lambda *args, **named: asked.append((args, named)) or str(snapshot))
    new = *SHAPE, *QUICK, "--text", text, "--tokenizer", "hf:org/name", "--artifact-dir", "run"
    for flags in (*new, "--max-steps", 1), ("--resume", "--artifact-dir", "run", "--max-steps", 2):
        code, _, err = command(train.main, *flags)
        assert code == 0, err
    assert asked == [(("org/name",), {"allow_patterns": ("tokenizer.json",)})]
    assert Tokenizer.from_file("run/tokenizer.json").get_vocab_size() == 290
    (snapshot / "tokenizer.json").unlink()
    code, _, err = command(train.main, *new)
    assert (code, err.count("\n")) == (2, 1) and err.startswith("train.py: hf:org/name has no tokenizer.json: give")


INSTEAD = {
    "config.json": {
        "adapter_config.json": "adapter_config.json belongs to a LoRA adapter", "stories.gguf": "is for llama.cpp",
        "params.json consolidated.00.pth": "consolidated.00.pth is in Meta's or Mistral's own format",
        "ckpt.pt": "ckpt.pt is a pickle",
        "blobs refs snapshots": "snapshots holds the versions", "README.md": "is this a model's folder?"},
    "model.safetensors": {
        "optimizer.pt pytorch_model.bin training_args.bin": "pytorch_model.bin is a pickle",
        "model.gguf": "model.gguf is for llama.cpp", "q4.gguf": "GgufConfig(dequantize=True), then save_pretrained",
        "pytorch_model-00001-of-00002.bin pytorch_model.bin.index.json": "pytorch_model-00001-of-00002.bin is a pickle",
        "consolidated.safetensors": "consolidated.safetensors is in Meta's or Mistral's own format",
        "model.fp16.safetensors": "model.fp16.safetensors is there: if it is the whole model, rename it",
        "model-00001-of-00002.safetensors": "model-00001-of-00002.safetensors is a part of the model, but model.safe",
        "adapter_model.safetensors adapter_config.json": "adapter_config.json belongs to a LoRA adapter",
        "tf_model.h5": "tf_model.h5 is in the format of another library", "README.md": "is this a model's folder?"},
}


@pytest.mark.parametrize("missing, there, words", [
    (missing, there, words) for missing, cases in INSTEAD.items() for there, words in cases.items()])
def test_what_lies_in_the_folder_instead_is_named(folder, missing, there, words):
    (folder / missing).unlink()
    for name in there.split():
        (folder / name).touch()
    refused(lambda: NanoLLM.load(folder), f"{folder / missing}: there is no such file", words)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json", "shard"])
def test_what_stands_for_a_file_is_told_from_it(folder, name):
    weight_map = shard(folder) if name not in ("config.json", "model.safetensors") else {NORM: None}
    path = folder / (weight_map[NORM] if name == "shard" else name)
    path.unlink()
    os.mkfifo(path)
    refused(lambda: NanoLLM.load(folder), f"{path} is a pipe or a device, not a regular file")
    path.unlink()
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    refused(lambda: NanoLLM.load(folder), f"{path} is only Git LFS's pointer to a file: get the file itself")


def test_json_may_begin_with_a_byte_order_mark(folder):
    whole = to_host(NanoLLM.load(folder).weights.flat)
    shard(folder)
    for name in ("config.json", "model.safetensors.index.json"):
        (folder / name).write_text((folder / name).read_text(), encoding="utf-8-sig")
    assert (to_host(NanoLLM.load(folder).weights.flat) == whole).all()


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "..", ".", "", "sub/x.safetensors", "a\0b",
                                  "\ud800", "a\nb", "x" * 5000, "gone.safetensors", "./model.safetensors",
                                  "model.safetensors/"])
def test_an_index_names_files_in_the_folder_only(folder, name):
    shutil.copy(folder / "model.safetensors", folder.parent / "outside.safetensors")
    weight_map = shard(folder)
    write_index(folder, weight_map | {NORM: name})
    refused(lambda: NanoLLM.load(folder), str(folder))


@pytest.mark.parametrize("weight_map", [None, [], "model.safetensors", {}, {NORM: None}, {NORM: 3}, {NORM: ["a"]}])
def test_an_index_without_a_map_is_refused(folder, weight_map):
    shard(folder)
    write_index(folder, weight_map)
    refused(lambda: NanoLLM.load(folder), "model.safetensors.index.json")


def test_a_missing_shard_is_named(folder):
    shard(folder)
    (folder / "model-00002-of-00003.safetensors").unlink()
    refused(lambda: NanoLLM.load(folder), "model-00002-of-00003.safetensors")


def test_a_tensor_in_no_shard_is_named(folder):
    weight_map = shard(folder)
    tensors = load_file(folder / weight_map[NORM])
    del tensors[NORM]
    save_file(tensors, folder / weight_map[NORM])
    refused(lambda: NanoLLM.load(folder), NORM, "missing")


# ---------------------------------------------------------------- Hugging Face's own model

@pytest.fixture(scope="module")
def torch():
    torch = reference("torch")
    torch.set_num_threads(1)
    return torch


@pytest.fixture(scope="module")
def transformers(torch):
    transformers = reference("transformers")
    transformers.utils.logging.disable_progress_bar()
    return transformers


def their_model(transformers, torch, config, **settings):
    """Hugging Face's model of the same shape, with random weights that are all large enough to matter."""
    kind = "qwen2" if config.qkv_bias else "qwen3" if config.qk_norm else "mistral" if config.n_head == 5 else "llama"
    rope = {"rope_type": "default"}
    if config.rope_scaling:
        factor, low, high, length = config.rope_scaling
        rope = {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
                "original_max_position_embeddings": length}
    theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(
        kind, vocab_size=config.vocab_size, head_dim=config.head_dim, sliding_window=None,
        hidden_size=config.embedding_dim, intermediate_size=config.hidden_dim,
        num_hidden_layers=config.n_block, num_attention_heads=config.n_head, num_key_value_heads=config.n_kv_head,
        max_position_embeddings=config.max_context, rms_norm_eps=config.eps, tie_word_embeddings=config.tie_embeddings,
        rope_parameters=rope | {"rope_theta": config.rope_theta},
        hidden_act={"gelu": "gelu_pytorch_tanh"}.get(config.activation, config.activation), **settings))
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.copy_(torch.randn(weight.shape) * 0.3 + (weight.dim() == 1))
    return theirs.eval()


def assert_same_text(theirs, torch, ours, length=40):
    """Logits agree to 1e-4, and so does greedy text, except where the two best logits differ by less than that."""
    ids = random_ids(ours.config, 2, 5)
    text = np.concatenate([ids, np.stack(list(ours.generate(ids, length, temperature=0)), 1)], 1)
    with torch.no_grad():
        logits = theirs(torch.tensor(text)).logits.float().numpy()
    np.testing.assert_allclose(logits_of(ours, text), logits, atol=1e-4)
    best, second = np.sort(logits, -1)[:, 4:-1, :-3:-1].transpose(2, 0, 1)
    clear = best - second > 1e-4
    assert clear.mean() > 0.9 and (text[:, 5:][clear] == logits[:, 4:-1].argmax(-1)[clear]).all()


@every_model
def test_logits_and_gradients_equal_those_of_transformers(transformers, torch, tmp_path, fields, kind):
    config = small(**{"max_context": 64, "rope_theta": 500.0, "eps": 1e-3} | fields)
    theirs = their_model(transformers, torch, config)
    theirs.save_pretrained(tmp_path)
    assert theirs.config.model_type == kind
    ours = NanoLLM.load(tmp_path)
    assert ours.config == config
    assert_same_text(theirs, torch, ours)

    ids, targets = random_ids(config, 2, 20), random_ids(config, 2, 20, seed=2)
    loss = torch.nn.functional.cross_entropy(theirs(torch.tensor(ids)).logits.flatten(0, 1),
                                             torch.tensor(targets).flatten())
    loss.backward()
    mine = ours.loss(ids, targets)
    mine.backward()
    assert float(mine.data) == pytest.approx(loss.item(), abs=1e-5)
    gradients = {name: weight.grad.numpy() for name, weight in theirs.named_parameters()}
    assert gradients.keys() == ours.parameters().keys()
    for name, t in ours.parameters().items():
        scale = abs(gradients[name]).max()
        np.testing.assert_allclose(to_host(t.grad), gradients[name], atol=1e-4 * scale, err_msg=name)


@every_model
def test_transformers_opens_what_is_saved_here(transformers, torch, tmp_path, fields, kind):
    ours = lively(small(**{"max_context": 64, "rope_theta": 500.0, "eps": 1e-3} | fields))
    ours.save(tmp_path)
    assert NanoLLM.load(tmp_path).config == ours.config
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(theirs).__name__ == f"{kind.capitalize()}ForCausalLM" and theirs.dtype == torch.float32
    assert not any(info[x] for x in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert theirs.config.bos_token_id is None and theirs.config.eos_token_id is None
    assert_same_text(theirs.eval(), torch, ours)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("max_shard_size", ["1GB", "4KB"])
def test_their_shards_and_half_precision_load(transformers, torch, tmp_path, dtype, max_shard_size):
    reference("ml_dtypes")
    theirs = their_model(transformers, torch, small(max_context=64)).to(getattr(torch, dtype))
    theirs.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (max_shard_size == "4KB")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert_same_text(theirs.eval(), torch, NanoLLM.load(tmp_path))


@pytest.mark.parametrize("spelling", [{"rope_theta": 30.0}, {"rope_theta": 30.0, "rope_scaling": None},
                                      {"rope_parameters": {"rope_theta": 30.0, "rope_type": "default"}},
                                      {"rope_parameters": {"rope_theta": 30.0}, "rope_theta": 7.0}])
def test_transformers_and_we_read_ropes_theta_alike(transformers, torch, tmp_path, spelling):
    lively(small(max_context=64)).save(tmp_path)
    edit_config(tmp_path, "rope_theta", "rope_parameters", **spelling)
    assert_same_text(transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval(), torch, NanoLLM.load(tmp_path))


# ---------------------------------------------------------------- what begins and what ends a text

BOTH, START = {"bos_token_id": 0, "eos_token_id": "<e>"}, {"bos_token_id": 0}
# The tokenizer's template, the ids in front of a text, config.json, generation_config.json, tokenizer_config.json.
CONVENTIONS = {
    "nothing": ("$A", [], {}, None, {}),
    "a BOS that nobody inserts": ("$A", [], BOTH, None, {}),
    "a BOS that nobody names": ("<s> $A", [0], {}, None, {}),
    "BOS and EOS in generation_config.json": ("<s> $A", [0], {}, BOTH, {}),
    "a list in generation_config.json": ("<s> $A", [0], BOTH | {"eos_token_id": "<f>"},
                                         BOTH | {"eos_token_id": ["<f>", "<e>"]}, {}),
    "a list in config.json": ("$A", [], {"eos_token_id": ["<f>", "<e>"]}, None, {}),
    "no EOS in generation_config.json": ("<s> $A", [0], BOTH, START, {}),
    "null in generation_config.json": ("$A", [], BOTH, {"eos_token_id": None}, {}),
    "two in front": ("<b> <s> $A", [1, 0], BOTH, None, {}),
    "add_bos_token true": ("$A", [], BOTH, None, {"add_bos_token": True, "bos_token": "<s>"}),     # has no effect,
    "add_bos_token false": ("<s> $A", [0], START, None, {"add_bos_token": False, "bos_token": "<s>"}),      # either
}


def conventional(folder, name):
    """Make the folder of a tiny model that follows a convention; its greedy text from "a b c" meets <e>, then <f>."""
    inserted, front, config, generation, about = CONVENTIONS[name]
    words = ["<s>", "<b>", *"abcdefghijklmnopqrstuvwxyzA"]
    tokenizer = Tokenizer(models.WordLevel(dict(zip(words, range(29), strict=True)), unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(words[:2])
    tokenizer.post_processor = processors.TemplateProcessing(inserted, special_tokens=[("<s>", 0), ("<b>", 1)])
    model = lively(small(max_context=64), seed=10)
    free = list(model.generate([*front, 2, 3, 4], 20, temperature=0))
    new = [token for n, token in enumerate(free) if n > 3 and token not in free[:n]]

    def fill(settings):
        return json.loads(json.dumps(settings).replace('"<e>"', str(new[0])).replace('"<f>"', str(new[1])))
    model.save(folder, **fill(config))
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", **about}
    for file, settings in ("generation_config.json", generation), ("tokenizer_config.json", about):
        if settings is not None:
            (folder / file).write_text(json.dumps(fill(settings)))
    return model, tokenizer


@pytest.mark.parametrize("name", CONVENTIONS)
def test_a_text_begins_and_ends_as_in_transformers(cheap, transformers, torch, tmp_path, name):
    conventional(tmp_path, name)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ends = generate.open_model(tmp_path)[2]
    assert ends.front == CONVENTIONS[name][1]
    for prompt in ("a b c", "") if ends.front or ends.bos else ("a b c",):
        ids = torch.tensor([tokenizer(prompt)["input_ids"] or ends.bos])
        text = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)[0]
        shown = text[:-1] if text[-1] in ends.eos else text
        ours = command(generate.main, tmp_path, "--prompt", prompt, "--temperature", 0, "--max-new-tokens", 20)
        assert ours == (0, tokenizer.decode(shown, skip_special_tokens=True) + "\n", "")
        assert prompt == "" or (len(text) < ids.shape[1] + 20) == bool(ends.eos)


@pytest.mark.parametrize("name", ["a BOS that nobody inserts", "a BOS that nobody names", "two in front",
                                  "a list in generation_config.json", "no EOS in generation_config.json"])
def test_a_model_made_of_another_begins_and_ends_a_text_as_that_does(cheap, tmp_path, name):
    """By training that starts from it, by resuming that, and by quantising it."""
    model, tokenizer = conventional(tmp_path / "model", name)
    ends, source = generate.open_model(tmp_path / "model")[2], tmp_path / "model"
    for folder in (tmp_path / "tuned", tmp_path / "resumed"):
        hf = json.loads((source / "config.json").read_text())
        settings = {name: hf[name] for name in ("bos_token_id", "eos_token_id")}
        files = huggingface.tokenizer_files(tokenizer, settings, 64, source)
        folder.mkdir()
        checkpoint.Run(folder, files, settings, {}).write_model(folder, model)
        assert generate.open_model(folder)[2] == ends
        source = folder
    quantize.write(tmp_path / "quantised", tmp_path / "model", model, 8)
    assert generate.open_model(tmp_path / "quantised")[2] == ends


def test_a_fresh_model_inserts_nothing_whatever_its_tokenizer_did(cheap, tmp_path):
    model, tokenizer = conventional(tmp_path / "model", "two in front")
    files = huggingface.tokenizer_files(tokenizer, {}, 64)
    for folder in (tmp_path / "fresh", tmp_path / "resumed"):
        folder.mkdir()
        checkpoint.Run(folder, files, {}, {}).write_model(folder, model)
        assert generate.open_model(folder)[2] == ([], [], [])
        files = huggingface.tokenizer_files(tokenizer, {}, 64, folder)


@pytest.mark.parametrize("file, settings", [
    ("config.json", {"eos_token_id": 29}), ("config.json", {"bos_token_id": [0]}),
    ("generation_config.json", {"eos_token_id": [2, "a"]}),
])
def test_an_id_that_the_model_has_not_is_named(tmp_path, file, settings):
    conventional(tmp_path, "nothing")
    path = tmp_path / file
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | settings))
    refused(lambda: generate.open_model(tmp_path), str(path), "token id")
