"""What a GPU rounds, done on a CPU: float32 arithmetic whose numbers are rounded where the GPU's would be.

A GPU multiplies float16, bfloat16 or TF32 numbers and adds the products up in float32. Float32 arithmetic on numbers
that were rounded before does the same, if not bit for bit: sums come in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

_NUM_FACTORS = {
    F.conv2d: 2,
    F.conv3d: 2,
    F.linear: 2,
    F.scaled_dot_product_attention: 3,
    torch.bmm: 2,
    torch.matmul: 2,
    Tensor.matmul: 2,
    Tensor.__matmul__: 2,
}
"""Everything that multiplies matrices in these models, and how many of its first arguments are factors. What may follow
is only added."""
_TF32_DROPPED_BITS = 13  # of float32's 23, TF32 keeps 10


class Tf32(TorchFunctionMode):
    """Factors of matrix products and convolutions have 10 bits after the point; all else is float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """Round the factors."""
        num_factors = _NUM_FACTORS.get(func, 0)
        return func(*map(to_tf32, args[:num_factors]), *args[num_factors:], **(kwargs or {}))


class Stored(TorchFunctionMode):
    """Weights and results are of a narrower type; each operation computes in float32."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """Round what goes into a product, weights among it, and what comes out of anything."""
        if func in _NUM_FACTORS:
            args = tree_map_only(Tensor, self._round, args)
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and args and result is args[0]:  # an operation in place
            return result.copy_(self._round(result))
        return tree_map_only(Tensor, self._round, result)

    def _round(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._dtype).float() if tensor.dtype == torch.float32 else tensor


def to_tf32(tensor: Tensor) -> Tensor:
    """float32 numbers rounded to the nearest with 10 bits after the point, a tie to the even one."""
    if tensor.dtype != torch.float32:
        return tensor
    bits = tensor.contiguous().view(torch.int32)
    half = (1 << (_TF32_DROPPED_BITS - 1)) - 1 + ((bits >> _TF32_DROPPED_BITS) & 1)
    return ((bits + half) & -(1 << _TF32_DROPPED_BITS)).view(torch.float32)


@contextmanager
def encode_within(vae: Any, mode: TorchFunctionMode) -> Iterator[None]:
    """Inside, this VAE encodes in ``mode``; what is done to pixels before and to latents after is not rounded."""
    encode: Callable[[Tensor], Any] = vae.encode

    def encode_rounded(pixels: Tensor) -> Any:
        with mode:
            return encode(pixels)

    vae.encode = encode_rounded
    try:
        yield
    finally:
        vae.encode = encode
