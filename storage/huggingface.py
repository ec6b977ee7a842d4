"""A Hugging Face model folder: what config.json calls things, and the tensors, checked before any is read."""
import itertools
import json
import math
import os
import re
from collections import namedtuple
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models

from hardware.quantized import LEVELS, packed_shapes
from storage.files import InputError, read_json, readable, require, whole
from storage.tokens import load_tokenizer

# ---------------------------------------------------------------- config.json

# Config's field: its name in config.json
NAMES = {"vocab_size": "vocab_size", "embedding_dim": "hidden_size", "n_block": "num_hidden_layers",
         "n_head": "num_attention_heads", "n_kv_head": "num_key_value_heads", "hidden_dim": "intermediate_size",
         "max_context": "max_position_embeddings", "eps": "rms_norm_eps", "rope_theta": "rope_theta",
         "activation": "hidden_act", "tie_embeddings": "tie_word_embeddings", "head_dim": "head_dim"}
REQUIRED = "vocab_size", "embedding_dim", "n_block", "n_head", "hidden_dim"
NO_IDS = {"bos_token_id": None, "eos_token_id": None}       # if absent, transformers takes 1 and 2
TANH_GELU = "gelu_pytorch_tanh"         # is our "gelu"; their "gelu" is the exact one
ACTIVATIONS = {"swish": "silu", TANH_GELU: "gelu", "gelu_new": "gelu", "gelu_fast": "gelu"}     # three spellings of it
LLAMA3 = "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"     # Config.rope_scaling

# model_type: the fields of Config in which it is no Llama; the settings that transformers takes where the file has none
FAMILIES = {
    "llama": ({}, {"max_position_embeddings": 2048}),
    "mistral": ({}, {"num_key_value_heads": 8, "max_position_embeddings": 4096 * 32}),
    "qwen2": ({"qkv_bias": True}, {"num_key_value_heads": 32, "max_position_embeddings": 32768}),
    "qwen3": ({"qk_norm": True}, {"num_key_value_heads": 32, "max_position_embeddings": 32768, "head_dim": 128})}


def family(config):
    """The model_type of a nanollm.Config. A Mistral is a Llama whose width need not be a multiple of n_head."""
    llama = "mistral" if config.embedding_dim % config.n_head else "llama"
    return "qwen2" if config.qkv_bias else "qwen3" if config.qk_norm else llama


def to_config(config, bits=None):
    """The settings in config.json of a model with this nanollm.Config; `bits` as in tensor_reader.

    RoPE's settings are spelt twice, as version 5 of transformers and as version 4 read them.
    """
    kind, scaling = family(config), {}
    if config.rope_scaling:
        scaling = {"rope_type": "llama3", **dict(zip(LLAMA3, config.rope_scaling, strict=True))}
    return {
        "architectures": [f"{kind.capitalize()}ForCausalLM"], "model_type": kind,
        **{name: getattr(config, field) for field, name in NAMES.items()},
        "hidden_act": {"gelu": TANH_GELU}.get(config.activation, config.activation),
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta} | scaling,
        **({"rope_scaling": scaling} if scaling else {}),
        **({} if config.qkv_bias else {"attention_bias": False}), "mlp_bias": False, "torch_dtype": "float32",
        **({"sliding_window": None} if kind == "mistral" else {}),
        **NO_IDS,
        **({"quantization_config": quantization(bits)} if bits else {}),
    }


def to_fields(hf):
    """{field of nanollm.Config: value} of the settings in config.json; Config checks the values.

    Raises InputError that names any setting that is not implemented here.
    """
    kind = hf.get("model_type")
    require(kind in list(FAMILIES), f"model_type {kind!r} is not implemented, only {', '.join(FAMILIES)}")
    own, defaults = FAMILIES[kind]
    hf = defaults | hf
    window = hf.get("sliding_window", 4096)
    slides = {"llama": False, "mistral": True}.get(kind, hf.get("use_sliding_window"))
    require(not slides or window is None, f"sliding_window {window!r} is not implemented: for shorter texts set it to "
            "null, and max_position_embeddings to this number")
    name = "rope_scaling" if hf.get("rope_scaling") else "rope_parameters"      # as transformers decides
    rope, scaling = hf.get(name) or {}, ()
    require(isinstance(rope, dict), f"{name} must be an object, not {rope!r}")
    rope_type = rope.get("rope_type", rope.get("type", "default" if set(rope) <= {"rope_theta"} else None))
    if rope_type == "llama3":
        missing = [part for part in LLAMA3 if part not in rope]
        require(not missing, f"{name}: {', '.join(missing)} is missing")
        scaling = tuple(rope[part] for part in LLAMA3)
    elif rope_type != "default":
        raise InputError(f"{name}: RoPE scaling (rope_type {rope_type!r}) is not implemented")
    for name in ("attention_bias", "mlp_bias"):
        if hf.get(name):
            raise InputError(f"{name} is not implemented")
    if hf.get("quantization_config") and hf["quantization_config"] not in [quantization(bits) for bits in LEVELS]:
        raise InputError("quantization_config: only what extras.quantize writes is implemented")
    for field in REQUIRED:
        if NAMES[field] not in hf:
            raise InputError(f"{NAMES[field]} is missing")
    fields = {field: hf[name] for field, name in NAMES.items() if name in hf} | own | {"rope_scaling": scaling}
    if "rope_theta" in rope:
        fields["rope_theta"] = rope["rope_theta"]
    match fields.get("activation"):
        case "gelu":
            raise InputError(f"hidden_act 'gelu' is not implemented, {TANH_GELU!r} is")
        case str(name):
            fields["activation"] = ACTIVATIONS.get(name, name)
    return fields


def tokenizer_files(tokenizer, settings, max_context, source=None):
    """{name: text} of the files next to a language model; `settings` may hold bos_token_id and eos_token_id.

    The tokenizer inserts no special tokens, as in training, unless the model has a BOS. But where the model comes from
    the folder `source`, what that says about the beginning and the end of a text is kept, file by file.
    """
    content = json.loads(tokenizer.to_str())
    if settings.get("bos_token_id") is None:
        content["post_processor"] = None
    special = {name.removesuffix("_id"): tokenizer.id_to_token(value) for name, value in settings.items()
               if isinstance(value, int)}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
              "eos_token": None, **special, "model_max_length": max_context}
    files = {"tokenizer.json": json.dumps(content, ensure_ascii=False) + "\n",
             "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
             "generation_config.json": json.dumps(NO_IDS | settings, indent=2) + "\n"}
    if source is None:
        return files
    there = {name: Path(source, name) for name in (*files, "chat_template.jinja")
             if os.path.lexists(Path(source, name))}
    if "tokenizer.json" not in there or load_tokenizer(there["tokenizer.json"]).to_str() != tokenizer.to_str():
        there = {name: path for name, path in there.items() if name == "generation_config.json"}
    return files | {name: readable(path).read_text("utf-8") for name, path in there.items()}


def quantization(bits):
    """What extras.quantize writes as quantization_config, for matrices of 8 or 4 bits."""
    return {"quant_method": "nanollm", "bits": bits}


# What may lie in a folder in place of a model's files, and what to do. Keys: see `readable`.
QUESTION = "; is this a model's folder?"
PARTS = {r".+-of-\d+\.safetensors": "is a part of the model, but model.safetensors.index.json, which lists all parts, "
         "is missing: get it, too"}
FOREIGN = {
    r"adapter_.+": "belongs to a LoRA adapter: merge it into its model (merge_and_unload in PEFT) and save that",
    r"consolidated\..+": "is in Meta's or Mistral's own format: get the Hugging Face version of this model",
    r".+\.gguf": "is for llama.cpp: give the folder from which it was made, or let transformers convert it "
    "(from_pretrained with gguf_file and, in new versions, quantization_config=GgufConfig(dequantize=True), then "
    "save_pretrained)",
    r"(?!optimizer|scheduler|scaler|rng_state|training_args).+\.(bin|pt|pth|ckpt)":       # not a trainer's
    "is a pickle, which may run any program when it is opened: save the model as safetensors (in transformers: "
    "from_pretrained, then save_pretrained)",
    r".+\.(h5|msgpack|onnx|npz|ot)": "is in the format of another library: save the model as safetensors",
    r"snapshots": "holds the versions of this model in the cache: give the folder of one, snapshots/NAME",
}
OTHERS = {r".+\.safetensors": "is there: if it is the whole model, rename it model.safetensors"}


def read_config(folder):
    """(path, settings) of a folder's config.json. Raises InputError that names the file."""
    path = Path(folder, "config.json")
    return path, read_json(path, QUESTION, FOREIGN)


def load_config(folder, Config):
    """The nanollm.Config of a folder. Raises InputError that names the file."""
    path, settings = read_config(folder)
    return config_of(settings, path, Config)


def config_of(settings, path, Config):
    """The nanollm.Config of the settings in the file `path`; an InputError names that file and its settings."""
    try:
        return Config(**to_fields(settings))
    except InputError as problem:
        words = re.sub(r"\b(" + "|".join(NAMES) + r")\b", lambda found: NAMES[found[0]], str(problem))
        raise InputError(f"{path}: {words}") from None


# ---------------------------------------------------------------- the Hugging Face Hub

HUB = "hf:"
TOKENIZER = ("tokenizer.json",)
MODEL = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
         "model*.safetensors", "model.safetensors.index.json")      # other formats of the same weights may lie there


def from_hub(name, files=MODEL):
    """The folder, in the Hub's cache, of the model hf:ORG/NAME. Of these files, those that it lacks are downloaded.

    Without a network a model that is in the cache opens as well. Raises InputError that names the model, also if it has
    no file of the first name.
    """
    try:
        from huggingface_hub import snapshot_download
        folder = snapshot_download(name.removeprefix(HUB), allow_patterns=files)
    except ImportError:
        raise InputError(f"{name}: the package huggingface_hub is needed: pip install huggingface_hub") from None
    except (OSError, ValueError) as problem:
        raise InputError(f"{name}: {problem}") from None
    require(os.path.exists(Path(folder, files[0])), f"{name} has no {files[0]}: give another model, or a folder "
            "into which transformers has saved this one")
    return folder


# ---------------------------------------------------------------- what begins and what ends a text

Ends = namedtuple("Ends", "front bos eos")


def text_ends(folder, tokenizer, size):
    """The ids that begin and end a text in the folder of a model of `size` tokens, as transformers finds them.

    Ends.front: what the tokenizer puts in front of every text. Ends.bos: what a text without a prompt begins with if
    that is nothing, [its BOS] or []. Ends.eos: all that end a text. Raises InputError that names the file.
    """
    path = folder / "generation_config.json"
    config = read_config(folder)[1]
    if os.path.lexists(path):
        settings = read_json(path)
    else:
        path, settings = folder / "config.json", config
    bos, eos = settings.get("bos_token_id", config.get("bos_token_id")), settings.get("eos_token_id")
    ends = Ends(front_ids(tokenizer), [] if bos is None else [bos],
                eos if isinstance(eos, list) else [] if eos is None else [eos])
    for name, ids in (folder / "tokenizer.json", ends.front), (path, ends.bos + ends.eos):
        for token in ids:
            if type(token) is not int or not 0 <= token < size:
                raise InputError(f"{name}: {token!r} is not a token id of this model")
    return ends


def front_ids(tokenizer):
    """The ids that a tokenizer's post-processor puts in front of every text."""
    letter = tokenizer.post_process(Tokenizer(models.WordLevel({"a": 0})).encode("a"))      # any text of one token
    marked = zip(letter.ids, letter.special_tokens_mask, strict=True)
    return [token for token, _ in itertools.takewhile(lambda pair: pair[1], marked)]


# ---------------------------------------------------------------- tensors

AT_ONCE = 1 << 20       # numbers that are read at a time


def save_model(folder, settings, tensors):
    """Write model.safetensors with the arrays {name: on the host}, then config.json with the settings, into folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    format = "nanollm" if settings.get("quantization_config") else "pt"      # "pt": other programs can read it
    with whole(folder / "model.safetensors") as path:
        save_file(tensors, path, {"format": format})
    with whole(folder / "config.json") as path:
        path.write_text(json.dumps(settings, indent=2) + "\n")


def tensor_reader(folder, config):
    """(read, bits) of a model's folder; read(name) yields (rows, these rows of a tensor, on the host and in float32).

    `bits` is None, or 8 or 4 for a quantised model. Then a matrix is integers, and under name.scale are their scales.
    Names, shapes and types are checked against the Config here and now (see `find_tensors`), the values by `read`.
    Both raise InputError that names the file.
    """
    bits = (read_config(folder)[1].get("quantization_config") or {}).get("bits")
    found = find_tensors(Path(folder), config, bits)

    def load(name, rows):
        with safe_open(found[name], framework="numpy") as file, np.errstate(all="ignore"):      # closed: unmapped
            array = file.get_slice(name)[rows]
            return array if array.dtype in (np.int8, np.uint8) else array.astype(np.float32, copy=False)

    def read(name):
        with safe_open(found[name], framework="numpy") as file:
            length, *width = file.get_slice(name).get_shape()
        step, head = max(AT_ONCE // math.prod(width), 1), head_of(name)
        for rows in (slice(start, min(start + step, length)) for start in range(0, length, step)):
            array = load(name, rows)
            if not np.isfinite(array).all():
                raise InputError(f"{found[name]}: {name} holds NaN or infinity, or more than a float32 can")
            if config.tie_embeddings and head in found and not np.array_equal(array, load(head, rows)):
                raise InputError(f"{found[head]}: {head} is not equal to {name}, although config.json has "
                                 "tie_word_embeddings true: set that to false to use both, as transformers does")
            yield rows, array
    return read, bits


def head_of(name):
    """The name of the output layer's part that is the embedding's part `name` where the two are tied, or None."""
    return name.replace("model.embed_tokens.", "lm_head.") if name.startswith("model.embed_tokens.") else None


def find_tensors(folder, config, bits=None):
    """{tensor's name: the .safetensors file that holds it}, after checking names, shapes and types against config.

    With `bits` 8 or 4 each matrix is two tensors, its integers and, under its name and ".scale", their scales.

    Only headers are read: a file that claims more than it holds, or a config that asks for more, allocates nothing.
    Raises InputError that names the file.
    """
    files, headers = weight_files(folder), {}
    for path in files:
        headers |= read_headers(path)
    if config.n_block > len(headers):       # before `shapes` lists the parameters of a billion blocks
        raise InputError(f"{folder / 'config.json'}: num_hidden_layers is {config.n_block}, "
                         f"but the model's files hold {len(headers)} tensors in all")
    eight = {name for name, (*_, dtype) in headers.items() if dtype == "I8" and not name.startswith("model.layers.")}
    expected, found = stored(config.shapes(), bits, eight), {}
    heads = {head_of(name): expected[name] for name in expected if head_of(name)} if config.tie_embeddings else {}
    for name, (path, shape, dtype) in headers.items():
        if name.endswith("rotary_emb.inv_freq"):
            continue        # RoPE's angles follow from the config
        if name not in expected | heads:
            raise InputError(f"{path}: tensor {name!r} is not part of the model of this config.json")
        right, dtypes = (expected | heads)[name]
        if shape != right:
            raise InputError(f"{path}: {name} has shape {shape}, config.json asks for {right}")
        if dtype not in dtypes:
            raise InputError(f"{path}: {name} is {dtype}; only {', '.join(dtypes)} are implemented")
        found[name] = path
    missing = next((name for name in expected if name not in found), None)
    if missing:
        raise InputError(f"{files[0]}: tensor {missing} is missing")
    return found


def weight_files(folder):
    """The .safetensors files of a model: one, or those that an index names. Raises InputError that names the file.

    An index can name only files that are in the folder, though they may be links to others.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if os.path.lexists(single) or not os.path.lexists(index):
        return [readable(single, QUESTION, PARTS | FOREIGN | OTHERS)]
    weight_map = read_json(index).get("weight_map")
    if not (isinstance(weight_map, dict) and weight_map and all(isinstance(x, str) for x in weight_map.values())):
        raise InputError(f"{index}: weight_map must name a file for every tensor")
    names = sorted(set(weight_map.values()))
    for name in names:
        if not name.isprintable() or name in ("", "..") or Path(name).name != name:
            raise InputError(f"{index}: {name!r} is not the name of a file in the model's folder")
    return [readable(folder / name, f": {index.name} names it, so get it, too") for name in names]


def read_headers(path):
    """{name: (path, shape, type)} of the tensors in a .safetensors file. Raises InputError that names the file."""
    headers = {}
    try:
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():        # noqa: SIM118 (it is no dict)
                header = file.get_slice(name)
                headers[name] = path, tuple(header.get_shape()), header.get_dtype()
    except (OSError, SafetensorError) as problem:
        raise InputError(f"{path}: not a whole safetensors file ({problem})") from None
    return headers


def stored(shapes, bits, eight):
    """{tensor's name: (shape, allowed types)} that the files of a model with these parameters must hold.

    With `bits` 4 the matrices whose names are in `eight` have 8.
    """
    expected = {}
    for name, shape in shapes.items():
        expected[name] = shape, ("F32", "F16", "BF16", "F64")
        if bits and len(shape) == 2:
            own = 8 if name in eight else bits
            integers, scales = packed_shapes(shape, own)
            expected[name] = integers, ("I8" if own == 8 else "U8",)
            expected[name + ".scale"] = scales, ("F32",)
    return expected
