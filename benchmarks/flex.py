"""The peer: PyTorch's FlexAttention under the same rule, for `benchmarks/attention.py` on a GPU that has torch.

Its blocks are made by its own `create_block_mask` from our rows, compiled as its documentation advises.
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np

from data_pipelines.batch import Rows


def is_here() -> bool:
    """Whether torch is installed and sees a GPU."""
    if importlib.util.find_spec("torch") is None:
        return False
    import torch
    return torch.cuda.is_available()


def make_attention(rows: Rows, device: str, compiled: bool = True) -> Callable[..., Any]:
    """Attention of a pack's rows [S]: queries [1, N, S, H] and keys, values [1, K, S, H] as torch tensors."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    order, first, span, last, noised = (torch.as_tensor(np.ascontiguousarray(row), device=device) for row in (
        rows.order, rows.first, rows.span, rows.last, rows.noised))

    def sees(batch, head, query, key):
        at = order[key]
        return (first[query] <= at) & (at <= last[query]) & (~noised[key] | (at >= span[query]))
    wrap = torch.compile if compiled else lambda function: function
    size = rows.order.size
    mask = wrap(create_block_mask)(sees, None, None, size, size, device=device)
    attention = wrap(flex_attention)
    return lambda query, key, value: attention(query, key, value, block_mask=mask, enable_gqa=True)


def time_flex(rows: Rows, heads: list[np.ndarray], seconds_of: Callable[..., float]) -> dict[str, Any]:
    """Seconds of a pass forwards and of one backwards, and what came out [S, N, H] in float32.

    Args:
        heads: queries [S, N, H], keys and values [S, K, H] as float32.
        seconds_of: times a call.
    """
    import torch
    on_gpu = lambda x: torch.from_numpy(x).to("cuda", torch.bfloat16).transpose(0, 1)[None].contiguous()
    tensors = [on_gpu(x).requires_grad_() for x in heads]
    attention = make_attention(rows, "cuda")
    out = attention(*tensors)
    cotangent = torch.ones_like(out)

    def run(function: Callable[..., Any]) -> None:
        function()
        torch.cuda.synchronize()
    forward = seconds_of(run, lambda: attention(*tensors))
    backward = seconds_of(run, lambda: torch.autograd.grad(out, tensors, cotangent, retain_graph=True))
    out = out[0].transpose(0, 1).float().detach().cpu().numpy()
    return {"forward": forward, "backward": backward, "out": out}
