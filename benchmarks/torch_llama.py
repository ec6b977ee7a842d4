"""Llama in PyTorch, as a good PyTorch user would write it; speed.py compares nanollm with it.

c is a dict of nanollm's Config fields. Weights are read and written under Hugging Face's names.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

# The Hugging Face tensors that one matrix here holds, stacked in this order.
PARTS = {"qkv_proj": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], "o_proj": ["self_attn.o_proj"],
         "gate_up_proj": ["mlp.gate_proj", "mlp.up_proj"], "down_proj": ["mlp.down_proj"]}


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        C, self.H, self.K = c["embedding_dim"], c["n_head"], c["n_kv_head"]
        self.D = C // self.H
        self.input_layernorm = nn.RMSNorm(C, c["eps"])
        self.qkv_proj = nn.Linear(C, (self.H + 2 * self.K) * self.D, bias=False)
        self.o_proj = nn.Linear(C, C, bias=False)
        self.post_attention_layernorm = nn.RMSNorm(C, c["eps"])
        self.gate_up_proj = nn.Linear(C, 2 * c["hidden_dim"], bias=False)
        self.down_proj = nn.Linear(c["hidden_dim"], C, bias=False)

    def forward(self, x, cos, sin):
        B, T, C = x.shape
        H, K, D = self.H, self.K, self.D
        qkv = self.qkv_proj(self.input_layernorm(x)).view(B, T, H + 2 * K, D).transpose(1, 2)
        qk, v = qkv.split([H + K, K], dim=1)
        a, b = qk.chunk(2, dim=-1)
        q, k = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).split([H, K], dim=1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=H != K)
        x = x + self.o_proj(y.transpose(1, 2).reshape(B, T, C))
        gate, up = self.gate_up_proj(self.post_attention_layernorm(x)).chunk(2, dim=-1)
        return x + self.down_proj(F.silu(gate) * up)


class Llama(nn.Module):
    def __init__(self, c):
        super().__init__()
        C, half = c["embedding_dim"], c["embedding_dim"] // c["n_head"] // 2
        self.embed_tokens = nn.Embedding(c["vocab_size"], C)
        self.layers = nn.ModuleList(Block(c) for _ in range(c["n_block"]))
        self.norm = nn.RMSNorm(C, c["eps"])
        self.lm_head = nn.Linear(C, c["vocab_size"], bias=False)
        if c["tie_embeddings"]:
            self.lm_head.weight = self.embed_tokens.weight
        frequency = c["rope_theta"] ** (-torch.arange(half, dtype=torch.float64) / half)
        angle = torch.outer(torch.arange(c["max_context"], dtype=torch.float64), frequency)
        self.register_buffer("cos", angle.cos().float())  # (T, D/2)
        self.register_buffer("sin", angle.sin().float())

    def forward(self, ids, targets):
        """Mean cross-entropy in nats of targets (B, T) after ids (B, T); T is max_context."""
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        return F.cross_entropy(self.lm_head(self.norm(x)).flatten(0, 1), targets.flatten())

    def hf_tensors(self):
        """{Hugging Face name: its rows of this model's weights}, as views: read them, or copy_ into them."""
        tensors = {}
        for name, p in self.named_parameters():
            *path, module, leaf = name.split(".")
            root = [] if module == "lm_head" else ["model"]
            names = [".".join([*root, *path, part, leaf]) for part in PARTS.get(module, [module])]
            q, kv = (n * self.layers[0].D for n in (self.layers[0].H, self.layers[0].K))
            rows = [q, kv, kv] if module == "qkv_proj" else len(p) // len(names)
            tensors.update(zip(names, p.detach().split(rows), strict=True))
        return tensors
