"""Write a model in llama.cpp's file format:  python -m extras.export_gguf FOLDER FILE.gguf

It needs the package `gguf`. The file holds the weights in float32, the hyperparameters and the tokenizer.

llama.cpp's RoPE rotates neighbours (2i, 2i + 1); ours rotates halves (i, i + D/2), as Hugging Face's does. A product
q · k does not depend on the order of its D terms, as long as q and k have the same one. So within each head the rows of
q and k get the order 0, D/2, 1, D/2 + 1, …: then llama.cpp rotates the pairs that the model was trained with. (A Qwen's
rows stay as they are, because llama.cpp rotates halves there.)

Hyperparameters and tokenizer are collected in dicts {name of a method of gguf.GGUFWriter: its argument}, such as
{"add_block_count": 6}. At the end `export` calls these methods. A name with dots is a key for which gguf has no method.
"""
import itertools
import json
import sys
import warnings
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import numpy as np
from tokenizers import pre_tokenizers

if not __package__:             # run by its path, as editors do
    sys.path[0] += "/.."

from console import cli
from console.chat import find_template
from generate import open_model
from hardware import device
from nanollm import rope_table
from storage import huggingface
from storage.files import InputError, refuse_existing, require, whole

NAMES = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
         "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
         "mlp.down_proj": "ffn_down", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
         "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def architecture(config):
    """llama.cpp's name for models with this nanollm.Config."""
    kind = huggingface.family(config)
    return "llama" if kind == "mistral" else kind


def interleave(w, heads):
    """A q or k projection (heads · D, C) with each head's halves interleaved: rows i, i + D/2 become 2i, 2i + 1."""
    return w.reshape(heads, 2, -1, w.shape[1]).swapaxes(1, 2).reshape(w.shape)


def tensors(model):
    """{llama.cpp's name: float32 array} of all weights. Raises InputError for a quantised model."""
    if model.weights.bits:
        raise InputError("a quantised model cannot be exported: give the model from which it was made")
    result, config = {}, model.config
    heads = {"q_proj": config.n_head, "k_proj": config.n_kv_head} if architecture(config) == "llama" else {}
    for name, w in model.weights.arrays().items():
        name, kind = name.rsplit(".", 1)
        if name[-6:] in heads:
            w = interleave(w, heads[name[-6:]])
        if name in OUTSIDE:
            name = OUTSIDE[name]
        else:
            block, part = name.removeprefix("model.layers.").split(".", 1)
            name = f"blk.{block}.{NAMES[part]}"
        result[f"{name}.{kind}"] = np.ascontiguousarray(w)
    if config.rope_scaling:         # llama.cpp divides the angles by these
        cos, sin = rope_table(replace(config, max_context=2), np.float64)
        angles = np.arctan2(sin[1], cos[1])[:config.head_dim // 2]
        plain = config.rope_theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
        result["rope_freqs.weight"] = (plain / angles).astype(np.float32)
    return result


# ---------------------------------------------------------------- the tokenizer

# Parts of a tokenizer.json, each as `steps` or `options` gives it, and what `vocabulary` then has to say.
Form = namedtuple("Form", "normalizer pre_tokenizer decoder model says")

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace("{1,3}", "")


def forms(kind):
    """Yield the forms of a kind of tokenizer that llama.cpp computes. It knows the regular expressions by a name."""
    if kind == "gpt2":
        def split(regex):
            return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
        as_gpt2 = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
        as_it_is = as_gpt2 | {"use_regex": False}
        for name, before, model in (
                ("gpt-2", [as_gpt2], {}), ("gpt-2", [split(GPT2), as_it_is], {}),
                ("smollm", [{"type": "Digits", "individual_digits": True}, as_gpt2], {}),
                ("qwen2", [split(QWEN2), as_it_is], {}), ("dbrx", [split(LLAMA3), as_it_is], {}),
                ("llama-bpe", [split(LLAMA3), as_it_is], {"ignore_merges": True})):
            yield Form([], before, ["ByteLevel"], model, {"add_tokenizer_pre": name})
    elif kind == "llama":
        space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        text = ["Replace", "ByteFallback", "Fuse"]
        yield Form([space], [], text, {}, {"add_add_space_prefix": False})
        yield Form([{"type": "Prepend", "prepend": "▁"}, space], [], [*text, "Strip"], {},
                   {"add_add_space_prefix": True})
        for scheme, whole_text in itertools.product(("first", "always", "never"), (True, False)):
            before = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": not whole_text}
            yield Form([], [before], text if scheme == "never" else [*text, "Strip"], {},
                       {"add_add_space_prefix": scheme != "never"})
    else:
        for lowercase, accents in itertools.product((True, False), (True, False, None)):
            normalizer = {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
                          "strip_accents": accents, "lowercase": lowercase}
            yield Form([normalizer], [{"type": "BertPreTokenizer"}], ["WordPiece"],
                       {"continuing_subword_prefix": "##", "max_input_chars_per_word": 100},
                       {"tokenizer.ggml.normalizer.lowercase": lowercase,
                        "tokenizer.ggml.normalizer.strip_accents": lowercase if accents is None else accents})


def steps(part):
    """The steps of a normalizer, pre-tokenizer or decoder of a tokenizer.json, without what changes no token."""
    if part is None:
        return []
    for name in ("normalizers", "pretokenizers", "decoders"):
        if name in part:
            return [step for inner in part[name] for step in steps(inner)]
    return [{name: value for name, value in part.items() if name != "trim_offsets"}]


def options(model):
    """The options of a tokenizer's model that change its tokens, except those that are off."""
    names = "ignore_merges", "continuing_subword_prefix", "end_of_word_suffix", "max_input_chars_per_word"
    return {name: model[name] for name in names if model.get(name)}


def find_form(kind, content):
    """The Form of a tokenizer of this kind, which may be without a decoder. Raises InputError that names what
    llama.cpp has nothing like.
    """
    normalizer = steps(content["normalizer"])
    if kind == "gpt2" and normalizer == [{"type": "NFC"}]:          # Qwen's
        warnings.warn("this tokenizer composes letters and their accents (NFC); llama.cpp does not, and gives other "
                      "tokens to a text in which they are apart", stacklevel=2)
        normalizer = []
    found = {"normalizer": normalizer, "pre_tokenizer": steps(content["pre_tokenizer"]),
             "decoder": [step["type"] for step in steps(content["decoder"])], "model": options(content["model"])}
    if not found["decoder"]:
        del found["decoder"]
    left = list(forms(kind))
    for name, part in found.items():
        left = [form for form in left if part == getattr(form, name)]
        require(left, f"llama.cpp has nothing like this tokenizer's {name}, {json.dumps(part):.300}: the forms that it "
                "has are listed in extras/export_gguf.py")
    return left[0]


def vocabulary(tokenizer, size):
    """{name of a method of GGUFWriter, or a key: its argument}, which describes the tokenizer.

    Byte-level BPE ("gpt2" in llama.cpp), Llama's BPE over characters that falls back to bytes ("llama", where a token's
    score decides which merge comes first), and WordPiece ("bert"). Raises InputError that names what llama.cpp would
    compute in another way. What remains: before a text that begins with a space, and after a special token inside a
    text, llama.cpp puts the space that Metaspace leaves out.
    """
    from gguf import TokenType

    content = json.loads(tokenizer.to_str())
    model = content["model"]
    require(model["type"] in ("BPE", "WordPiece"), f"llama.cpp has no tokenizer like this one ({model['type']}): "
            "byte-level BPE, Llama's BPE and WordPiece can be exported")
    kind = "bert" if model["type"] == "WordPiece" else "llama" if model["byte_fallback"] else "gpt2"
    words = [f"[unused {i}]" for i in range(size)]
    types = [TokenType.UNUSED] * size
    letters = {"gpt2": pre_tokenizers.ByteLevel.alphabet(), "llama": [f"<0x{i:02X}>" for i in range(256)]}.get(kind, [])
    for word, i in tokenizer.get_vocab().items():
        words[i], types[i] = word, TokenType.BYTE if kind == "llama" and word in letters else TokenType.NORMAL
    for token in content["added_tokens"]:
        if types[token["id"]] != TokenType.BYTE:
            types[token["id"]] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
        for name in ("lstrip", "rstrip", "single_word"):
            require(not token[name], f"llama.cpp has nothing like {name} of this tokenizer's {token['content']!r}")
    unknown = tokenizer.token_to_id(model["unk_token"]) if model.get("unk_token") else None
    about = {"add_tokenizer_model": kind, "add_add_bos_token": False, "add_add_eos_token": False}
    if unknown is not None:
        types[unknown] = TokenType.UNKNOWN
        about["add_unk_token_id"] = unknown
    about |= find_form(kind, content).says
    missing = [letter for letter in letters if tokenizer.token_to_id(letter) is None]
    require(not missing or kind == "gpt2",
            f"llama.cpp needs a token for each of the 256 bytes; this tokenizer lacks {len(missing)}")
    if missing and unknown is not None:     # without one both leave such a byte out: SmolLM2's tokenizer lacks 21
        warnings.warn(f"this tokenizer lacks {len(missing)} of the 256 bytes; where it gives {model['unk_token']!r}, "
                      "llama.cpp gives nothing", stacklevel=2)
    merges = [pair if isinstance(pair, list) else pair.split(" ") for pair in model.get("merges", [])]
    if kind == "gpt2":
        about["add_token_merges"] = [" ".join(pair) for pair in merges]
    elif kind == "llama":
        inside = next((word for word in words if "▁" in word[1:]), None)
        require(not inside or not any(step.get("split") for step in steps(content["pre_tokenizer"])),
                f"llama.cpp would merge words that this tokenizer's pre_tokenizer splits, into {inside!r}")
        rank = {"".join(pair): i for i, pair in reversed(list(enumerate(merges)))}
        about["add_token_scores"] = [-float(rank.get(word, len(rank))) for word in words]
    else:
        words = [_as_bert(word) if of == TokenType.NORMAL else word for word, of in zip(words, types, strict=True)]
        about |= {"add_add_sep_token": False, **{
            f"add_{name}_token_id": tokenizer.token_to_id(f"[{name.upper()}]")
            for name in ("sep", "pad", "mask") if tokenizer.token_to_id(f"[{name.upper()}]") is not None}}
    if letters:     # without an EOS llama.cpp takes token 11 or 2 for it; no text has the byte 255 or a special token
        never = ["ÿ" if kind == "gpt2" else "<0xFF>", *(x["content"] for x in content["added_tokens"] if x["special"])]
        ids = [tokenizer.token_to_id(word) for word in never if tokenizer.token_to_id(word) is not None]
        require(ids, "llama.cpp needs a token that is in no text, and this tokenizer has no special one")
        about["add_eos_token_id"] = ids[0]
    return about | {"add_token_list": words, "add_token_types": types}


def _as_bert(word):
    """WordPiece marks what continues a word; llama.cpp marks what begins one."""
    return word[2:] if word.startswith("##") else "\u2581" + word


def export(folder, path):
    """Write the model in `folder` as the GGUF file `path`. Raises InputError if llama.cpp cannot run this model."""
    from gguf import GGUFWriter, LlamaFileType

    model, tokenizer, ends = open_model(folder)
    config, path = model.config, Path(path)
    kind = architecture(config)
    if config.activation != "silu":
        raise InputError(f"{folder}: llama.cpp's {kind} has no activation {config.activation!r}, only silu")
    require(kind == "llama" or not config.rope_scaling, f"{folder}: llama.cpp's {kind} has no rope_scaling")
    require(len(ends.front) < 2, f"{folder}: llama.cpp puts one token in front of a text, not {len(ends.front)}")
    require(len(ends.eos) < 4, f"{folder}: llama.cpp ends a text at three tokens at most, not {len(ends.eos)}")
    with whole(path) as draft:
        writer = GGUFWriter(draft, kind)
        about = {
            "add_name": Path(folder).resolve().name, "add_context_length": config.max_context,
            "add_embedding_length": config.embedding_dim, "add_block_count": config.n_block,
            "add_feed_forward_length": config.hidden_dim, "add_head_count": config.n_head,
            "add_head_count_kv": config.n_kv_head, "add_layer_norm_rms_eps": config.eps,
            "add_rope_freq_base": config.rope_theta, "add_rope_dimension_count": config.head_dim,
            "add_key_length": config.head_dim, "add_value_length": config.head_dim,
            "add_vocab_size": config.vocab_size, "add_file_type": LlamaFileType.ALL_F32,
        } | vocabulary(tokenizer, config.vocab_size)
        if template := find_template(Path(folder))[0]:
            about["add_chat_template"] = template
        if bos := ends.front or ends.bos:
            about |= {"add_bos_token_id": bos[0], "add_add_bos_token": bool(ends.front)}
        about |= dict(zip(("add_eos_token_id", "add_eot_token_id", "add_eom_token_id"), ends.eos, strict=False))
        for name, value in about.items():
            writer.add_bool(name, value) if "." in name else getattr(writer, name)(value)
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
