"""A decoder's two layouts of parameters: stacked by layer, or layer by layer.

Stacked: "blocks" with leaves [L, ...]. Unrolled: "blocks_0" to "blocks_{L-1}".
"""

from operator import itemgetter
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


def stack(params: PyTree) -> PyTree:
  """Parameters of unrolled blocks -> the layout of a scanned decoder."""
  layers = sum(name.startswith("blocks_") for name in params)
  if not layers:
    raise ValueError(f"no blocks_0, blocks_1, ... among {sorted(params)}")
  blocks = [params[f"blocks_{layer}"] for layer in range(layers)]
  rest = {k: v for k, v in params.items() if not k.startswith("blocks_")}
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)
  return {**rest, "blocks": stacked}


def unstack(params: PyTree) -> PyTree:
  """Parameters of a scanned decoder -> the layout of unrolled blocks."""
  if "blocks" not in params:
    raise ValueError(f"no stacked 'blocks' among {sorted(params)}")
  rest = {k: v for k, v in params.items() if k != "blocks"}
  layers = len(jax.tree.leaves(params["blocks"])[0])
  for i in range(layers):
    rest[f"blocks_{i}"] = jax.tree.map(itemgetter(i), params["blocks"])
  return rest
