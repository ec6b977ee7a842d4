"""Write a model in llama.cpp's file format:  python -m extras.export_gguf FOLDER FILE.gguf

It needs the package `gguf`. The file holds the weights in float32, the hyperparameters and the tokenizer.

llama.cpp's RoPE rotates neighbours (2i, 2i + 1); ours rotates halves (i, i + D/2), as Hugging Face's does. A product
q · k does not depend on the order of its D terms, as long as q and k have the same one. So within each head the rows of
q and k get the order 0, D/2, 1, D/2 + 1, …: then llama.cpp rotates the pairs that the model was trained with.

Hyperparameters and tokenizer are collected in dicts {name of a method of gguf.GGUFWriter: its argument}, such as
{"add_block_count": 6}. At the end `export` calls these methods.
"""
import json
import sys
from pathlib import Path

import numpy as np

if not __package__:             # run by its path, as editors do
    sys.path[0] += "/.."

from console import cli
from generate import open_model
from hardware import device
from storage.files import InputError, refuse_existing, whole

NAMES = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
         "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
         "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def interleave(w, heads):
    """A q or k projection (heads · D, C) with each head's halves interleaved: rows i, i + D/2 become 2i, 2i + 1."""
    return w.reshape(heads, 2, -1, w.shape[1]).swapaxes(1, 2).reshape(w.shape)


def tensors(model):
    """{llama.cpp's name: float32 array} of all weights. Raises InputError for a quantised model."""
    if not model.trainable:
        raise InputError("a quantised model cannot be exported: give the model from which it was made")
    result, config = {}, model.config
    for name, w in model.weights.arrays().items():
        name = name.removesuffix(".weight")
        if name.endswith("q_proj"):
            w = interleave(w, config.n_head)
        elif name.endswith("k_proj"):
            w = interleave(w, config.n_kv_head)
        if name in OUTSIDE:
            name = OUTSIDE[name]
        else:
            block, part = name.removeprefix("model.layers.").split(".", 1)
            name = f"blk.{block}.{NAMES[part]}"
        result[name + ".weight"] = np.ascontiguousarray(w)
    return result


def vocabulary(tokenizer, size):
    """{name of a method of GGUFWriter: its argument}, which describes the tokenizer. Raises InputError for kinds other
    than these.

    Byte-level BPE ("gpt2" in llama.cpp), Llama's BPE over characters that falls back to bytes ("llama", where a token's
    score decides which merge comes first), and WordPiece ("bert").
    """
    from gguf import TokenType

    content = json.loads(tokenizer.to_str())
    kind, before, model = content["model"]["type"], json.dumps(content["pre_tokenizer"]), content["model"]
    words = [f"[unused {i}]" for i in range(size)]
    types = [TokenType.UNUSED] * size
    for word, i in tokenizer.get_vocab().items():
        is_byte = len(word) == 6 and word.startswith("<0x") and word.endswith(">")
        words[i], types[i] = word, TokenType.BYTE if is_byte and model.get("byte_fallback") else TokenType.NORMAL
    for token in content["added_tokens"]:
        if types[token["id"]] != TokenType.BYTE:
            types[token["id"]] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    unknown = tokenizer.token_to_id(model["unk_token"]) if model.get("unk_token") else None
    if unknown is not None:
        types[unknown] = TokenType.UNKNOWN
    about = {"add_tokenizer_model": "gpt2", "add_token_list": words, "add_token_types": types,
             "add_add_bos_token": False, "add_add_eos_token": False}
    merges = [pair if isinstance(pair, list) else pair.split(" ") for pair in model.get("merges", [])]
    if kind == "BPE" and model.get("byte_fallback"):
        rank = {"".join(pair): i for i, pair in reversed(list(enumerate(merges)))}
        prepends = "Prepend" in json.dumps(content["normalizer"])
        about |= {"add_tokenizer_model": "llama", "add_token_scores": [-float(rank.get(w, len(rank))) for w in words],
                  "add_add_space_prefix": prepends}
    elif kind == "BPE" and before.count('"ByteLevel"') == 1 and '"Split"' not in before:
        about |= {"add_tokenizer_pre": "gpt-2", "add_token_merges": [" ".join(pair) for pair in merges]}
    elif kind == "WordPiece" and model["continuing_subword_prefix"] == "##":
        words = [_as_bert(word) if of == TokenType.NORMAL else word for word, of in zip(words, types, strict=True)]
        about |= {"add_tokenizer_model": "bert", "add_token_list": words, "add_add_sep_token": False,
                  **{f"add_{name}_token_id": tokenizer.token_to_id(f"[{name.upper()}]")
                     for name in ("sep", "pad", "mask") if tokenizer.token_to_id(f"[{name.upper()}]") is not None}}
    else:
        raise InputError(f"llama.cpp has no tokenizer like this one ({kind} after {before}): byte-level BPE, "
                         "Llama's BPE and WordPiece can be exported")
    return about | ({} if unknown is None else {"add_unk_token_id": unknown})


def _as_bert(word):
    """WordPiece marks what continues a word; llama.cpp marks what begins one."""
    return word[2:] if word.startswith("##") else "\u2581" + word


def export(folder, path):
    """Write the model in `folder` as the GGUF file `path`. Raises InputError if llama.cpp cannot run this model."""
    from gguf import GGUFWriter, LlamaFileType

    model, tokenizer, bos, eos = open_model(folder)
    config, path = model.config, Path(path)
    if config.activation != "silu":
        raise InputError(f"{folder}: llama.cpp's Llama has no activation {config.activation!r}, only silu")
    with whole(path) as draft:
        writer = GGUFWriter(draft, "llama")
        about = {
            "add_name": Path(folder).resolve().name, "add_context_length": config.max_context,
            "add_embedding_length": config.embedding_dim, "add_block_count": config.n_block,
            "add_feed_forward_length": config.hidden_dim, "add_head_count": config.n_head,
            "add_head_count_kv": config.n_kv_head, "add_layer_norm_rms_eps": config.eps,
            "add_rope_freq_base": config.rope_theta, "add_rope_dimension_count": config.head_dim,
            "add_vocab_size": config.vocab_size, "add_file_type": LlamaFileType.ALL_F32,
        } | vocabulary(tokenizer, config.vocab_size)
        if bos is not None:
            about |= {"add_bos_token_id": bos, "add_add_bos_token": True}
        if eos:
            about |= {"add_eos_token_id": eos[0]}
        for method, value in about.items():
            getattr(writer, method)(value)
        for name, array in tensors(model).items():
            writer.add_tensor(name, array)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        refuse_existing(path)


def main(argv=None):
    parser = cli.Parser(usage="python -m extras.export_gguf FOLDER FILE",
                        description="Write a model in llama.cpp's file format.")
    parser.add_model()
    parser.add_argument("file", metavar="FILE", help=".gguf file to write; it must not exist yet")
    args = parser.parse_args(argv)
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise InputError("the package gguf is needed: pip install gguf") from None
    refuse_existing(Path(args.file))
    device.use("cpu")
    export(args.folder, args.file)
    return 0


if __name__ == "__main__":
    cli.run(main, "python -m extras.export_gguf")
