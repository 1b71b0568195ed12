"""The thirty operations by which two engines compare their numbers, in f32 on this engine's device.

Names, shapes and definitions are those of `crates/engine/src/numerics.rs`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from .errors import first_line, request_error, shape_error
from .model import rotate

RMS_NORM_EPSILON = 1e-5
ROTARY_THETA = 10_000.0

Operation = Callable[..., torch.Tensor]


def _rotary(x_td: torch.Tensor) -> torch.Tensor:
    positions, size = x_td.shape
    frequencies = 1.0 / (ROTARY_THETA ** (torch.arange(0, size, 2, dtype=torch.float, device=x_td.device) / size))
    angles_tp = torch.outer(torch.arange(positions, dtype=torch.float, device=x_td.device), frequencies)
    angles_td = torch.cat((angles_tp, angles_tp), -1)
    return rotate(x_td, angles_td.cos(), angles_td.sin())


def _causal_attention(q_atd: torch.Tensor, k_atd: torch.Tensor, v_atd: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q_atd[None], k_atd[None], v_atd[None], is_causal=True)[0]


def _ids(ids: torch.Tensor, below: int) -> torch.Tensor:
    """Ids come as f32. They are checked here, for an index outside its table ends the process on some devices."""
    whole = ids.to(torch.int64)
    if not bool(((whole >= 0) & (whole < below) & (whole == ids)).all()):
        raise shape_error("operation", f"an id is not a whole number below {below}")
    return whole


OPERATIONS: dict[str, tuple[int, Operation]] = {
    "add": (2, torch.add),
    "subtract": (2, torch.sub),
    "multiply": (2, torch.mul),
    "maximum": (2, torch.maximum),
    "divide": (2, torch.div),
    "square": (1, torch.square),
    "round_to_bf16": (1, lambda x: x.to(torch.bfloat16).to(torch.float32)),
    "exp": (1, torch.exp),
    "sigmoid": (1, torch.sigmoid),
    "silu": (1, F.silu),
    "tanh": (1, torch.tanh),
    "sine": (1, torch.sin),
    "cosine": (1, torch.cos),
    "sum_rows": (1, lambda x: x.sum(-1)),
    "mean_columns": (1, lambda x: x.mean(0)),
    "max_rows": (1, lambda x: x.amax(-1)),
    "softmax": (1, lambda x: F.softmax(x, -1)),
    "log_softmax": (1, lambda x: F.log_softmax(x, -1)),
    "log": (1, torch.log),
    "sqrt": (1, torch.sqrt),
    "reciprocal_sqrt": (1, torch.rsqrt),
    "cross_entropy": (2, lambda x, ids: F.cross_entropy(x, _ids(ids, x.shape[-1]), reduction="sum")),
    "embedding": (2, lambda table, ids: F.embedding(_ids(ids, table.shape[0]), table)),
    "rms_norm": (2, lambda x, weight: F.rms_norm(x, weight.shape, weight, RMS_NORM_EPSILON)),
    "rotary": (1, _rotary),
    "causal_attention": (3, _causal_attention),
    "matmul": (2, torch.matmul),
    "matmul_transposed": (2, lambda a, b: a @ b.transpose(-1, -2)),
    "matmul_long": (2, torch.matmul),
    "batched_matmul": (2, torch.matmul),
}


def compute(name: str, inputs: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    """The flat result, on the host."""
    if name not in OPERATIONS:
        raise request_error(f"operation '{name[:40]}' is not known")
    count, operation = OPERATIONS[name]
    if len(inputs) != count:
        raise request_error(f"operation {name} takes {count} inputs, not {len(inputs)}")
    try:
        with torch.no_grad():
            return operation(*(tensor.to(device) for tensor in inputs)).float().cpu().flatten()
    except (RuntimeError, ValueError, IndexError) as error:
        shapes = [list(tensor.shape) for tensor in inputs]
        raise shape_error("operation", f"{name} of {shapes}: {first_line(error)}") from None
