"""Cut a batch into microbatches, and accumulate their gradients: more parts need less memory."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from warp_jax.types import Array, Params


class Cut(NamedTuple):
    """Cuts batches into parts of equal size. Group g of rows goes to part g % parts.

    Rows stay on their devices if the batch is a multiple of parts * group_size * devices.
    """

    parts: int
    group_size: int  # consecutive rows that stay together

    def split(self, tree: Any) -> Any:
        """Cut each array [B, ...] into [parts, B / parts, ...]."""

        def split(x: Array) -> Array:
            groups = x.reshape(-1, self.parts, self.group_size, *x.shape[1:])
            return groups.swapaxes(0, 1).reshape(self.parts, -1, *x.shape[1:])

        return jax.tree.map(split, tree)

    def join(self, tree: Any) -> Any:
        """Undo `split`."""

        def join(x: Array) -> Array:
            groups = x.reshape(self.parts, -1, self.group_size, *x.shape[2:])
            return groups.swapaxes(0, 1).reshape(-1, *x.shape[2:])

        return jax.tree.map(join, tree)


def mean_gradient(gradient: Callable[[Any], tuple[Params, Any]], chunks: Any, params: Params) -> tuple[Params, Any]:
    """Return the mean over all chunks of what gradient(chunk) returns first, shaped like params; stack the rest."""
    parts = len(jax.tree.leaves(chunks)[0])
    if parts == 1:  # without a sum, which is a second copy
        grads, rest = gradient(jax.tree.map(lambda x: x[0], chunks))
        return grads, jax.tree.map(lambda x: x[None], rest)

    def add(total: Params, chunk: Any) -> tuple[Params, Any]:
        grads, rest = gradient(chunk)
        return jax.tree.map(lambda a, b: a + b / parts, total, grads), rest

    return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), chunks)
