"""The shape of a model: what a Config holds, the parameters that follow from it, and Hugging Face's config.json."""
import re
from dataclasses import dataclass
from pathlib import Path

from autograd import ACTIVATIONS
from device import InputError
from files import file_in, read_json
from quantized import LEVELS

_HF_ACTIVATION = {"gelu": "gelu_pytorch_tanh"}     # where the name there is another
_HF_NAME = {"vocab_size": "vocab_size", "embedding_dim": "hidden_size", "n_block": "num_hidden_layers",
            "n_head": "num_attention_heads", "n_kv_head": "num_key_value_heads", "hidden_dim": "intermediate_size",
            "max_context": "max_position_embeddings", "eps": "rms_norm_eps", "rope_theta": "rope_theta",
            "activation": "hidden_act", "tie_embeddings": "tie_word_embeddings"}
_LARGEST = 1 << 20      # any size in a Config: a file that asks for more is broken, and would take all memory


@dataclass(frozen=True)
class Config:
    """The shape of a model. Raises InputError that names the field and the rule."""
    vocab_size: int
    embedding_dim: int = 512
    n_block: int = 6
    n_head: int = 8
    n_kv_head: int | None = None        # fewer key/value than query heads: grouped-query attention; None: n_head
    max_context: int = 512
    hidden_dim: int = 2048
    eps: float = 1e-6
    rope_theta: float = 10000.0
    activation: str = "silu"
    tie_embeddings: bool = False        # lm_head is the embedding matrix itself

    def __post_init__(self):
        if self.n_kv_head is None:
            object.__setattr__(self, "n_kv_head", self.n_head)
        for name in ("vocab_size", "embedding_dim", "n_block", "n_head", "n_kv_head", "max_context", "hidden_dim"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _LARGEST:
                raise InputError(f"{name} must be a whole number from 1 to {_LARGEST}, not {value!r}")
        for name in ("eps", "rope_theta"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not 1e-30 < value < 1e30:
                raise InputError(f"{name} must be a number above 0 that a float32 can hold, not {value!r}")
        if self.embedding_dim % (2 * self.n_head):
            raise InputError(f"embedding_dim ({self.embedding_dim}) must be a multiple of 2 * n_head ({self.n_head}): "
                             "heads of one even size, for RoPE turns pairs")
        if self.n_head % self.n_kv_head:
            raise InputError(f"n_kv_head ({self.n_kv_head}) must divide n_head ({self.n_head})")
        if self.activation not in list(ACTIVATIONS):
            raise InputError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {self.activation!r}")
        if not isinstance(self.tie_embeddings, bool):
            raise InputError(f"tie_embeddings must be True or False, not {self.tie_embeddings!r}")

    @property
    def head_dim(self):
        return self.embedding_dim // self.n_head

    def flops_per_token(self, seq_len):
        """Floating-point operations of training on one token of a window, forward and backward, the model's own:
        what is done again to save memory does not count.  (PaLM, Chowdhery et al. 2022, appendix B)

        Each of a matrix's N weights is multiplied and added once forward and twice backward (dx, dw): 6 N. An embedding
        is looked up and not multiplied, so it does not count, unless it is the lm_head, too. A token meets T/2 keys on
        average, in two products of width C: 6 C T per block. (PaLM counts all T keys, masked or not: 12 C T.)
        """
        n = sum(shape[0] * shape[1] for shape in self.shapes().values() if len(shape) == 2)
        n -= (not self.tie_embeddings) * self.vocab_size * self.embedding_dim
        return 6 * n + 6 * self.n_block * self.embedding_dim * seq_len

    def to_hugging_face(self):
        """config.json of a LlamaForCausalLM (rope_theta as version 4 spells it, rope_parameters as version 5 does)."""
        return {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama",
            **{name: getattr(self, field) for field, name in _HF_NAME.items()},
            "head_dim": self.head_dim, "hidden_act": _HF_ACTIVATION.get(self.activation, self.activation),
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "attention_bias": False, "mlp_bias": False, "torch_dtype": "float32",
            "bos_token_id": None, "eos_token_id": None,     # if absent, transformers takes 1 and 2
        }

    @classmethod
    def from_hugging_face(cls, hf):
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
            config = cls(**values)
        except InputError as problem:       # in the file's words
            words = r"\b(" + "|".join(_HF_NAME) + r")\b"
            raise InputError(re.sub(words, lambda found: _HF_NAME[found[0]], str(problem))) from None
        if hf.get("head_dim") not in (None, config.head_dim):
            raise InputError(f"head_dim {hf['head_dim']} is not hidden_size/num_attention_heads; not implemented")
        return config

    @classmethod
    def load(cls, folder):
        """The Config of a Hugging Face folder. Raises InputError naming the file."""
        path = file_in(Path(folder), "config.json")
        hf = read_json(path)
        try:
            return cls.from_hugging_face(hf)
        except InputError as problem:
            raise InputError(f"{path}: {problem}") from None

    def shapes(self):
        """Every parameter's Hugging Face name and shape, in the order of the flat buffer.

        Matrices first, for only they decay; q, k, v and gate, up of a block lie side by side, so that one product
        serves them.
        """
        C, F, q, kv = self.embedding_dim, self.hidden_dim, self.embedding_dim, self.n_kv_head * self.head_dim
        matrices, vectors = {"model.embed_tokens.weight": (self.vocab_size, C)}, {}
        for i in range(self.n_block):
            block = f"model.layers.{i}."
            for name, shape in {
                "self_attn.q_proj": (q, C), "self_attn.k_proj": (kv, C), "self_attn.v_proj": (kv, C),
                "self_attn.o_proj": (C, q), "mlp.gate_proj": (F, C), "mlp.up_proj": (F, C), "mlp.down_proj": (C, F),
            }.items():
                matrices[block + name + ".weight"] = shape
            vectors[block + "input_layernorm.weight"] = vectors[block + "post_attention_layernorm.weight"] = (C,)
        if not self.tie_embeddings:
            matrices["lm_head.weight"] = (self.vocab_size, C)
        return matrices | vectors | {"model.norm.weight": (C,)}
