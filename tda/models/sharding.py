"""Where a decoder's parameters lie on a mesh: heads, hidden units, vocabulary.

Each block's first products are cut by columns and its last by rows over the
"model" axis (Shoeybi et al. 2019), so that a block needs one sum over devices
for attention and one for the MLP. The compiler adds them; the model does not
know.
"""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

PyTree = Any

_AXES = {  # end of a path -> axis that is cut, from the last
  "query/kernel": 2,
  "query/bias": 2,
  "key/kernel": 2,
  "key/bias": 2,
  "value/kernel": 2,
  "value/bias": 2,
  "output/kernel": 3,
  "mlp_in/kernel": 1,
  "mlp_in/bias": 1,
  "mlp_gate/kernel": 1,
  "mlp_gate/bias": 1,
  "mlp_out/kernel": 2,
  "head/kernel": 1,
  "tokens/embedding": 2,
}


def shardings(params: PyTree, mesh: Mesh) -> PyTree:
  """A sharding for each parameter of a `Decoder`, arrays or shapes.

  What the "model" axis does not divide lies whole on every device.
  """
  parts = mesh.shape["model"]

  def place(path: Any, leaf: Any) -> NamedSharding:
    name = "/".join(str(key.key) for key in path[-2:])
    axes: list[str | None] = [None] * len(leaf.shape)
    cut = len(leaf.shape) - _AXES.get(name, 0)
    if cut < len(axes) and leaf.shape[cut] % parts == 0:
      axes[cut] = "model"
    return NamedSharding(mesh, P(*axes))

  return jax.tree_util.tree_map_with_path(place, params)
