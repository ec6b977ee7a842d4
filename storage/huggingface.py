"""A Hugging Face model folder: config.json in both directions, and its tensors, checked before anything is read."""
import os
import re
from pathlib import Path

from safetensors import SafetensorError, safe_open

from hardware.quantized import LEVELS, packed_shapes
from storage.files import InputError, read_json

_HF_ACTIVATION = {"gelu": "gelu_pytorch_tanh"}     # where the name there is another
_HF_NAME = {"vocab_size": "vocab_size", "embedding_dim": "hidden_size", "n_block": "num_hidden_layers",
            "n_head": "num_attention_heads", "n_kv_head": "num_key_value_heads", "hidden_dim": "intermediate_size",
            "max_context": "max_position_embeddings", "eps": "rms_norm_eps", "rope_theta": "rope_theta",
            "activation": "hidden_act", "tie_embeddings": "tie_word_embeddings"}


def to_config(config):
    """config.json of a LlamaForCausalLM (rope_theta as version 4 spells it, rope_parameters as version 5 does)."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama",
        **{name: getattr(config, field) for field, name in _HF_NAME.items()},
        "head_dim": config.head_dim, "hidden_act": _HF_ACTIVATION.get(config.activation, config.activation),
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_bias": False, "mlp_bias": False, "torch_dtype": "float32",
        "bos_token_id": None, "eos_token_id": None,     # if absent, transformers takes 1 and 2
    }


def from_config(hf, Config, ACTIVATIONS):
    """The Config of a Llama-type config.json. Raises InputError naming any setting that is not implemented here."""
    if hf.get("model_type") != "llama":
        raise InputError(f"model_type {hf.get('model_type')!r} is not implemented, only 'llama'")
    ropes = {name: hf[name] for name in ("rope_parameters", "rope_scaling") if hf.get(name)}
    for name, rope_settings in ropes.items():
        if not isinstance(rope_settings, dict):
            raise InputError(f"{name} must be an object, not {rope_settings!r}")
        unscaled = "default" if set(rope_settings) <= {"rope_theta"} else None
        kind = rope_settings.get("rope_type", rope_settings.get("type", unscaled))
        if kind != "default":
            raise InputError(f"{name}: RoPE scaling (rope_type {kind!r}) is not implemented")
    for name in ("attention_bias", "mlp_bias"):
        if hf.get(name):
            raise InputError(f"{name} is not implemented")
    ours = [{"quant_method": "nanollm", "bits": bits} for bits in LEVELS]
    if hf.get("quantization_config") and hf["quantization_config"] not in ours:
        raise InputError("quantization_config: only what extras.quantize writes is implemented")
    if hf.get("pretraining_tp") not in (None, 1):
        raise InputError("pretraining_tp other than 1 is not implemented")
    activations = {_HF_ACTIVATION.get(name, name): name for name in ACTIVATIONS} | {"swish": "silu"}
    if hf.get("hidden_act", "silu") not in list(activations):
        raise InputError(f"hidden_act {hf['hidden_act']!r} is not implemented")
    for field in ("vocab_size", "embedding_dim", "n_block", "n_head", "hidden_dim"):
        if _HF_NAME[field] not in hf:
            raise InputError(f"{_HF_NAME[field]} is missing")
    values = {"max_context": 2048} | {field: hf[name] for field, name in _HF_NAME.items() if name in hf}
    values["activation"] = activations[hf.get("hidden_act", "silu")]
    values |= next(({"rope_theta": r["rope_theta"]} for r in ropes.values() if "rope_theta" in r), {})
    try:
        config = Config(**values)
    except InputError as problem:       # in the file's words
        words = r"\b(" + "|".join(_HF_NAME) + r")\b"
        raise InputError(re.sub(words, lambda found: _HF_NAME[found[0]], str(problem))) from None
    if hf.get("head_dim") not in (None, config.head_dim):
        raise InputError(f"head_dim {hf['head_dim']} is not hidden_size/num_attention_heads; not implemented")
    return config


def load_config(folder, Config, ACTIVATIONS):
    """The Config of a Hugging Face folder. Raises InputError naming the file."""
    path = file_in(Path(folder), "config.json")
    hf = read_json(path)
    try:
        return from_config(hf, Config, ACTIVATIONS)
    except InputError as problem:
        raise InputError(f"{path}: {problem}") from None


def file_in(folder, name):
    """The path of a file in the folder. Raises InputError if it leads out of there, as "../x" or a link may."""
    path = folder / name
    if not name.isprintable() or os.path.dirname(os.path.realpath(path)) != os.path.realpath(folder):
        raise InputError(f"{folder}: {name!r} leads out of the model's folder; copy the file itself there")
    return path


def find_tensors(folder, config, bits=None):
    """{tensor's name: the .safetensors file that holds it}, after checking names, shapes and types against config.

    With `bits` 8 or 4 each matrix is two tensors, its integers and, under its name and ".scale", their scales.

    Only headers are read: a file that claims more than it holds, or a config that asks for more, allocates nothing.
    Raises InputError naming the file.
    """
    names, index = ["model.safetensors"], folder / "model.safetensors.index.json"
    if not os.path.lexists(folder / names[0]) and os.path.lexists(index):
        file_in(folder, index.name)
        weight_map = read_json(index).get("weight_map")
        if not (isinstance(weight_map, dict) and weight_map and all(isinstance(x, str) for x in weight_map.values())):
            raise InputError(f"{index}: weight_map must name a file for every tensor")
        names = sorted(set(weight_map.values()))
    headers, found = {}, {}
    for path in [file_in(folder, name) for name in names]:
        try:
            if not path.is_file():
                raise InputError(f"{path}: there is no such file; is this a model's folder?")
            with safe_open(path, framework="numpy") as file:
                for name in file.keys():        # noqa: SIM118 (it is no dict)
                    header = file.get_slice(name)
                    headers[name] = path, tuple(header.get_shape()), header.get_dtype()
        except OSError as problem:
            raise InputError(f"{path}: {problem.strerror or problem}; is this a model's folder?") from None
        except SafetensorError as problem:
            raise InputError(f"{path}: not a whole safetensors file ({problem})") from None
    if config.n_block > len(headers):       # before `shapes` lists the parameters of a billion blocks
        raise InputError(f"{folder / 'config.json'}: num_hidden_layers is {config.n_block}, "
                         f"but the model's files hold {len(headers)} tensors in all")
    expected = {name: (shape, ("F32", "F16", "BF16", "F64")) for name, shape in config.shapes().items()}
    if bits:
        for name, (shape, _) in list(expected.items()):
            if len(shape) == 2:
                integers, scales = packed_shapes(shape, bits)
                expected |= {name: (integers, ("I8" if bits == 8 else "U8",)), name + ".scale": (scales, ("F32",))}
    for name, (path, shape, dtype) in headers.items():
        if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tie_embeddings):
            continue        # RoPE's angles follow from the config; a tied head is the embedding
        if name not in expected:
            raise InputError(f"{path}: tensor {name!r} is not part of a Llama of this config.json")
        right, dtypes = expected[name]
        if shape != right:
            raise InputError(f"{path}: {name} has shape {shape}, config.json asks for {right}")
        if dtype not in dtypes:
            raise InputError(f"{path}: {name} is {dtype}; only {', '.join(dtypes)} are implemented")
        found[name] = path
    missing = next((name for name in expected if name not in found), None)
    if missing:
        raise InputError(f"{folder / names[0]}: tensor {missing} is missing")
    return found
