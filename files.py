"""Files that appear whole or not at all, and files that are not trusted: a model's, before anything is read from it."""
import json
import os

from safetensors import SafetensorError, safe_open

from device import InputError
from quantized import packed_shapes

_UMASK = os.umask(0)                    # can only be read by being set
os.umask(_UMASK)


def replace_file(path, write):
    """Have write(path) make a file beside `path`, then rename it there: under its name it is whole, or the old one."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(beside)
        beside.chmod(0o666 & ~_UMASK)       # safetensors makes files that only their owner can read
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def read_json(path):
    """The JSON object in a file. Raises InputError that names the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise InputError(f"{path}: {problem.strerror}; a Hugging Face model folder is needed") from None
    except (ValueError, RecursionError) as problem:     # not UTF-8, not JSON, or brackets in brackets without end
        raise InputError(f"{path}: not valid JSON ({problem})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: not a JSON object")
    return value


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
