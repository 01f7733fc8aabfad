"""This library's side of `store_peers`, and what every side is given.

A side stores the projected gradients of rows in a folder, or given numbers in
their place, and is asked for the rows that score highest:

    side = Side(given, rows, folder, batch=8)
    side.build()
    side.search("built", side.ask(queries), k)

Rows are of one document each, with "x", "y" and "mask" [N, T].

Notation: N rows, Q queries, F columns of a store, K directions of a side.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.ekfac_stages import plain_gradient
from tda import meshes, streams
from tda.attribution import logra
from tda.data.packing import Rows
from tda.models import decoder
from tda.models.config import DecoderConfig
from tda.projections import Sides
from tda.store import disk, layout, lenses, search, writing
from tda.store.search import Lens
from tda.streams import Loop

PyTree = Any
Directions = dict[str, tuple[np.ndarray, np.ndarray]]
"""Of a module in torch: [K, inputs] and [K, outputs]."""

KEYWORDS = {"mlp": "mlp_", "linear": "blocks."}
"""What the names of the sites' modules have in common in torch."""


class Given(NamedTuple):
  """A decoder as of `config`, and of which gradients what is kept."""

  config: DecoderConfig
  params: PyTree
  sites: str
  dimension: int  # K

  @property
  def weights(self) -> PyTree:
    """For `torch_models.Decoder`."""
    return jax.tree.map(np.asarray, self.params)

  @property
  def keyword(self) -> str:
    return KEYWORDS[self.sites]


def config(vocab: int, dimension: int, **sizes: Any) -> DecoderConfig:
  """A decoder whose rows are the same in all libraries.

  It has no biases, which LogIX does not see, and no side that is shorter than
  K, which LogIX would cut K to, bergson fill up to and this one keep.
  """
  found = DecoderConfig(
    vocab,
    scan_layers=False,
    qkv_bias=False,
    output_bias=False,
    mlp_bias=False,
    **sizes,
  )
  if dimension >= found.width:
    raise ValueError(
      f"dimension {dimension} of a decoder of width {found.width}: the peers"
      " are compared at fewer directions than a side has coordinates"
    )
  return found


class Side:
  """This library's gradient store."""

  def __init__(
    self,
    given: Given,
    rows: Rows,
    folder: str | Path,
    *,
    batch: int,
    dtype: str = "float32",
    draw: int = 0,
  ):
    self.given, self.rows, self.dtype = given, rows, dtype
    self.folder, self.batch = Path(folder), batch
    self.loop = Loop(batch, mesh=meshes.mesh())
    objective = decoder.objective(given.config)
    self.log = logra.logger(
      objective,
      given.params,
      rows,
      key=jax.random.key(1 + draw),
      dimension=given.dimension,
      select=decoder.SITES[given.sites],
    )
    self.plain = plain_gradient(objective)

  @property
  def columns(self) -> int:
    """F."""
    return layout.width(self.log.layout)

  def gradient(self) -> None:
    """The plain gradient of all rows."""
    found = streams.fold(self.plain, self.given.params, self.rows, self.loop)
    jax.block_until_ready(found)

  def build(self) -> None:
    """Stores the rows' gradients anew."""
    path = self._anew("built")
    self.log.build(
      path, self.given.params, self.rows, dtype=self.dtype, loop=self.loop
    )

  def fill(self, values: np.ndarray) -> None:
    """Stores numbers [N, F] in place of gradients, under "filled"."""
    path = self._anew("filled")
    disk.create(path, self.log.layout, self.dtype, {})
    kept = lambda _, batch: (batch.rows, jnp.ones(len(batch.positions), bool))
    writing.build(path, kept, None, values, loop=Loop(1024))

  def ask(self, queries: Rows) -> np.ndarray:
    """Gradients [Q, F]."""
    return self.log.ask(self.given.params, queries, loop=self.loop)

  def search(
    self, which: str, asked: np.ndarray, k: int
  ) -> tuple[np.ndarray, np.ndarray]:
    """Scores and numbers [Q, k] of the first rows by dot product."""
    lens = Lens(disk.opened(self.folder / which), asked)
    found = search.ends(lens, k).top
    return found.scores, found.rows

  def scores(self, asked: np.ndarray) -> dict[str, np.ndarray]:
    """Scores [N, Q] of what was built, by method."""
    store = disk.opened(self.folder / "built")
    seen = lambda x, **how: search.scores(lenses.lens(store, asked, x, **how))
    methods = ("relatif", "logra", "trackstar", "cosine", "dot")
    found = {method: seen(method) for method in methods}
    return {**found, "trackstar unmixed": seen("trackstar", mixing=0.0)}

  def directions(self) -> Directions:
    """The store's, for the other libraries."""
    return directions(self.log.sides)

  def _anew(self, which: str) -> Path:
    path = self.folder / which
    shutil.rmtree(path, ignore_errors=True)
    return path


def directions(sides: Mapping[str, Sides]) -> Directions:
  """Of unrolled blocks, by the names of their modules in torch."""
  found = {}
  for name, side in sides.items():
    block, *_, module, _ = name.split("/")
    assert side.inputs is not None and side.outputs is not None
    found[f"{block.replace('_', '.')}.{module}"] = (
      np.asarray(side.inputs[0]).T,
      np.asarray(side.outputs[0]).T,
    )
  return found
