"""Causal attention over packed documents: a dense mask on the CPU, variable-length kernels on the GPU."""
from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn

# torch 2.11 shares key heads without being told, later versions want to be told.
_GQA: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}


def causal(q: Tensor, k: Tensor, v: Tensor, doc: Tensor | None, borders: Tensor | None, window: int = 0) -> Tensor:
    """q (B, T, H, K), k and v (B, T, G, K) -> (B, T, H, K). A query sees `window` keys (0: all) of its own document.

    doc (B, T) numbers the documents of each row, None: one a row; borders (N + 1,) int32 are the same as offsets into
    the flattened rows, padded at the end with B * T, built on the CPU: with them, half precision on a GPU never sees a
    T x T mask. Raises ValueError for documents or borders of other rows.
    """
    if doc is not None and doc.shape != q.shape[:2]:
        raise ValueError(f"documents {(*doc.shape,)} do not go with queries {(*q.shape,)}; give {(*q.shape[:2],)}")
    if doc is None and not window:
        return _dense(q, k, v, None, causal=True)
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and borders is not None:
        B, T = q.shape[:2]
        q, k, v = (z.flatten(0, 1) for z in (q, k, v))
        y = varlen_attn(q, k, v, borders, borders, T, T, window_size=(window - 1 if window else -1, 0), **_GQA)
        return y.unflatten(0, (B, T))  # pyright: ignore[reportAttributeAccessIssue]
    at = torch.arange(q.shape[1], device=q.device).expand(q.shape[0], -1)
    doc = torch.zeros_like(at) if doc is None else doc
    return masked(q, k, v, visible(at, at, doc, doc, window))


def visible(q_at: Tensor, k_at: Tensor, q_doc: Tensor, k_doc: Tensor, window: int) -> Tensor:
    """(B, S) places and documents of queries, (B, L) of keys -> (B, S, L) bool; a key at a negative place is empty."""
    ahead = q_at.unsqueeze(-1) - k_at.unsqueeze(-2)
    see = (ahead >= 0) & (k_at >= 0).unsqueeze(-2) & (q_doc.unsqueeze(-1) == k_doc.unsqueeze(-2))
    return see & (ahead < window) if window else see


def masked(q: Tensor, k: Tensor, v: Tensor, see: Tensor) -> Tensor:
    """The reference, and the decoding path: see (B, S, L) says which keys each query may use.

    Others get a weight of 0, and 0 NaN is NaN: a value that is not finite reaches all queries of its row.
    """
    return _dense(q, k, v, see.unsqueeze(1), causal=False)


def _dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask,
                                       is_causal=causal, enable_gqa=q.shape[-2] != k.shape[-2])
    return y.transpose(1, 2)
