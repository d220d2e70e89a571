"""The encoder of BERT (Devlin et al. 2019), without pooler and heads, for inference.

Importing transformers takes longer than encoding a prompt, so that the forward pass is written out here. It makes
the same calls of torch as `transformers.BertModel` with `attn_implementation="sdpa"`, and gives the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.nn import functional as F

EPS = 1e-12  # of LayerNorm


def encode(
    weights: Mapping[str, Tensor], ids: Tensor, mask: Tensor | None, num_layers: int, num_heads: int
) -> Tensor:
    """Last hidden states [N, T, C] of token ids [N, T], by `weights` as a file of `BertModel` names them.

    `mask` is a bool [N, T]: True where there is a token, False where there is padding, which nothing attends to;
    None, for the kernel without a mask, where there is no padding.
    """
    N, T = ids.shape

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(name: str, x: Tensor) -> Tensor:
        weight = weights[f"{name}.weight"]
        return F.layer_norm(x, weight.shape, weight, weights[f"{name}.bias"], EPS)

    def split_heads(x: Tensor) -> Tensor:
        return x.view(N, T, num_heads, -1).transpose(1, 2)  # [N, H, T, C / H]

    # Embedding; every token is of the first segment.
    x = F.embedding(ids, weights["embeddings.word_embeddings.weight"])
    x = x + weights["embeddings.token_type_embeddings.weight"][0]
    x = x + weights["embeddings.position_embeddings.weight"][:T]
    x = norm("embeddings.LayerNorm", x)

    attn_mask = None if mask is None else mask[:, None, None, :].expand(N, 1, T, T)

    for i in range(num_layers):
        layer = f"encoder.layer.{i}"
        # Attention.
        q, k, v = (split_heads(linear(f"{layer}.attention.self.{n}", x)) for n in ("query", "key", "value"))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        y = linear(f"{layer}.attention.output.dense", y.transpose(1, 2).reshape(N, T, -1))
        x = norm(f"{layer}.attention.output.LayerNorm", y + x)
        # MLP.
        y = F.gelu(linear(f"{layer}.intermediate.dense", x))
        x = norm(f"{layer}.output.LayerNorm", linear(f"{layer}.output.dense", y) + x)
    return x
