"""Parameters under other names: a table of names, and layouts as pairs.

A file's array may hold several of our parameters side by side, and one of ours,
stacked over layers and experts, comes from many arrays of the file. A row of a
table says which names go together and a `Form` how their entries are arranged;
both directions follow from it.

Notation: I inputs, O outputs, D width, H heads, K channels of a head.
"""

import dataclasses
import fnmatch
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from tda.models import layouts
from tda.models.config import DecoderConfig
from tda.models.decoder import shapes

PyTree = Any
Array = np.ndarray
Shape = tuple[int, ...]
Source = Mapping[str, Callable[[], Array]]  # name -> reads the array


class Form(NamedTuple):
  """How a file arranges one parameter, or several in one array."""

  read: Callable[[Array, Sequence[Shape]], Sequence[Array]]
  write: Callable[[Sequence[Array]], Array]


class Weight(NamedTuple):
  """A row: `theirs` may contain {layer} and {expert}, `ours` are paths."""

  theirs: str
  ours: tuple[str, ...]
  form: Form


def _transposed(write: Callable[[Array], Array]) -> Form:
  """[O, I] in the file; `write` makes ours a matrix [I, O]."""
  return Form(lambda x, to: [x.T.reshape(*to)], lambda xs: write(xs[0]).T)


def _straight(write: Callable[[Array], Array]) -> Form:
  """[I, O] in the file."""
  return Form(lambda x, to: [x.reshape(*to)], lambda xs: write(xs[0]))


def _first_in(x: Array) -> Array:
  return x.reshape(x.shape[0], -1)


def _last_out(x: Array) -> Array:
  return x.reshape(-1, x.shape[-1])


AS_IT_IS = _straight(lambda x: x)
FLAT = _straight(np.ravel)  # biases [H K], ours [H, K]
LINEAR = _transposed(_first_in)  # torch's Linear
LINEAR_OUT = _transposed(_last_out)  # the same after heads, ours [H, K, D]
CONV = _straight(_first_in)  # Conv1D of GPT-2
CONV_OUT = _straight(_last_out)


def _beside_write(xs: Sequence[Array]) -> Array:
  matrix = xs[0].ndim == 3
  return np.concatenate(
    [_first_in(x) if matrix else x.ravel() for x in xs], axis=-1
  )


BESIDE = Form(  # [D, 3 H K]: query, key and value one after another (GPT-2)
  lambda x, to: [
    part.reshape(shape)
    for part, shape in zip(np.split(x, len(to), axis=-1), to, strict=True)
  ],
  _beside_write,
)


def _by_head_read(x: Array, to: Sequence[Shape]) -> list[Array]:
  *lead, channels = to[0]
  parts = x.T.reshape(*lead, len(to), channels)
  return [parts[..., i, :] for i in range(len(to))]


def _by_head_write(xs: Sequence[Array]) -> Array:
  joined = np.stack(xs, axis=-2)
  return _first_in(joined).T if xs[0].ndim == 3 else joined.ravel()


BY_HEAD = Form(_by_head_read, _by_head_write)  # [H 3 K, D] (GPT-NeoX)


def _adjacent_read(x: Array, to: Sequence[Shape]) -> Sequence[Array]:
  _, heads, channels = to[0]
  pairs = x.reshape(heads, channels // 2, 2, -1)
  return LINEAR.read(pairs.swapaxes(1, 2).reshape(x.shape), to)


def _adjacent_write(xs: Sequence[Array]) -> Array:
  _, heads, channels = xs[0].shape
  x = LINEAR.write(xs)
  halves = x.reshape(heads, 2, channels // 2, -1)
  return halves.swapaxes(1, 2).reshape(x.shape)


# [H K, D] with the two channels of a rotary pair as neighbours (llama.cpp).
ADJACENT = Form(_adjacent_read, _adjacent_write)


def read(
  config: DecoderConfig,
  table: Sequence[Weight],
  source: Source,
  *,
  ignored: Sequence[str] = (),
) -> PyTree:
  """Parameters of a decoder, float32, from the arrays of a file.

  `ignored` are patterns of names that hold no parameters.

  Raises:
    ValueError: names or shapes that do not fit, all of them.
  """
  flat = _flat_shapes(config)
  wanted = {name: (row, at) for row, name, at in _rows(config, table, flat)}
  spare = [row.theirs for row in table if row.ours == ("head/kernel",)]
  if config.tie_embeddings:
    ignored = (*ignored, *spare)
  _check_names(wanted, source, ignored)
  params = {
    path: np.empty(leaf.shape, np.float32) for path, leaf in flat.items()
  }
  for name, (row, at) in wanted.items():
    parts = [params[path][at] for path in row.ours]
    to, found = [part.shape for part in parts], source[name]()
    if found.size != sum(map(math.prod, to)):
      raise ValueError(
        f"{name} of shape {found.shape} does not fit {row.ours} of shapes {to}:"
        " the configuration is of another model"
      )
    values = row.form.read(np.asarray(found, np.float32), to)
    for path, value in zip(row.ours, values, strict=True):
      params[path][at] = value
  tree = traverse_util.unflatten_dict(
    {path: jnp.asarray(x) for path, x in params.items()}, sep="/"
  )
  return tree if config.scan_layers else layouts.unstack(tree)


def write(
  config: DecoderConfig, table: Sequence[Weight], params: PyTree
) -> dict[str, Array]:
  """The arrays of a file, by name: the inverse of `read`."""
  if not config.scan_layers:
    params = layouts.stack(params)
  ours = traverse_util.flatten_dict(params, sep="/")
  flat = _flat_shapes(config)
  found = {path: jnp.shape(x) for path, x in ours.items()}
  expected = {path: leaf.shape for path, leaf in flat.items()}
  if found != expected:
    raise ValueError(
      f"parameters {found} are not those of the configuration, {expected}"
    )
  ours = {path: np.asarray(x, np.float32) for path, x in ours.items()}
  return {
    name: np.ascontiguousarray(row.form.write([ours[p][at] for p in row.ours]))
    for row, name, at in _rows(config, table, flat)
  }


def _flat_shapes(config: DecoderConfig) -> dict[str, jax.ShapeDtypeStruct]:
  """Path -> shape, in the stacked layout."""
  stacked = dataclasses.replace(config, scan_layers=True)
  return traverse_util.flatten_dict(shapes(stacked), sep="/")


def _rows(
  config: DecoderConfig, table: Sequence[Weight], have: Mapping[str, Any]
) -> Iterator[tuple[Weight, str, tuple[int, ...]]]:
  """Rows of parameters that this decoder has: (row, name, index of ours)."""
  counts = {"layer": config.layers, "expert": config.experts}
  for row in table:
    if row.ours[0] not in have:
      continue
    axes = [axis for axis in counts if f"{{{axis}}}" in row.theirs]
    for at in itertools.product(*(range(counts[axis]) for axis in axes)):
      name = row.theirs.format(**dict(zip(axes, at, strict=True)))
      yield row, name, at


def _check_names(
  wanted: Mapping[str, Any], source: Source, ignored: Sequence[str]
) -> None:
  missing = sorted(set(wanted) - set(source))
  unexpected = sorted(
    name
    for name in set(source) - set(wanted)
    if not any(fnmatch.fnmatchcase(name, pattern) for pattern in ignored)
  )
  if missing or unexpected:
    raise ValueError(
      "the file is not of this family and configuration: missing"
      f" {missing or 'none'}, unexpected {unexpected or 'none'}"
    )
