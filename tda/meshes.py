"""Meshes of devices: the one place that knows how arrays are placed.

Library functions take arrays in any sharding. A batch is spread over the
"data" axis; parameters are the caller's to place, replicated by default.
"""

import contextlib
import zlib
from collections.abc import Iterator
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

PyTree: TypeAlias = Any


def mesh(data: int | None = None, model: int = 1) -> Mesh:
  """A mesh with axes ("data", "model") over all devices of all processes.

  Args:
    data: size of the data axis; None takes what `model` leaves.
    model: size of the model axis.
  """
  count = len(jax.devices())
  data = count // model if data is None else data
  if data < 1 or model < 1 or data * model > count:
    raise ValueError(
      f"a mesh of data={data} by model={model} needs {data * model} devices; "
      f"there are {count}"
    )
  devices = jax.devices()[: data * model]
  axes = ("data", "model")
  kinds = (AxisType.Auto,) * 2
  return jax.make_mesh((data, model), axes, axis_types=kinds, devices=devices)


def spread(batch: PyTree, over: Mesh | None) -> PyTree:
  """Puts a host batch on devices, rows split over the data axis."""
  if over is None:
    return jax.device_put(batch)
  rows = NamedSharding(over, P("data"))
  return jax.tree.map(lambda x: _placed(x, rows), batch)


def places(size: int, over: Mesh | None) -> dict[jax.Device, slice]:
  """Which of so many rows each device holds when they are spread."""
  if over is None:
    return {jax.local_devices()[0]: slice(0, size)}
  sharding = NamedSharding(over, P("data"))
  found = sharding.devices_indices_map((size,))
  return {device: index[0] for device, index in found.items()}


def constrained(tree: PyTree, over: Mesh | None) -> PyTree:
  """Inside a jitted function: rows of the result split as `spread` does."""
  if over is None:
    return tree
  return jax.lax.with_sharding_constraint(tree, NamedSharding(over, P("data")))


def replicate(tree: PyTree, over: Mesh | None) -> PyTree:
  """Puts a copy of every array on every device of the mesh.

  What the caller has placed on its devices stays as it is, and so do keys,
  which jit copies, and leaves that are no arrays.
  """
  if over is None:
    return tree
  whole, devices = NamedSharding(over, P()), set(over.devices.flat)

  def put(x):
    if isinstance(x, jax.Array):
      is_key = jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
      settled = is_key or x.sharding.device_set == devices
    else:
      settled = not isinstance(x, np.ndarray | np.generic)
    return x if settled else _placed(x, whole)

  return jax.tree.map(put, tree)


def _placed(x: Any, sharding: NamedSharding) -> jax.Array:
  """A host array on devices, without a word to the other processes."""
  x = np.asarray(x)
  x = x.astype(jax.dtypes.canonicalize_dtype(x.dtype))
  return jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])


def fetch(x: jax.Array) -> np.ndarray:
  """The whole array on the host, also when other processes hold parts."""
  if isinstance(x, jax.Array) and not x.is_fully_addressable:
    if x.is_fully_replicated:
      return np.asarray(x.addressable_data(0))
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
  return np.asarray(x)


@contextlib.contextmanager
def together(name: str) -> Iterator[None]:
  """Goes on once every process has done what is inside, or fails in all.

  What is inside does not wait for other processes; `name` says what it is.

  Raises:
    ValueError: another process failed there.
  """
  error: Exception | None = None
  try:
    yield
  except Exception as found:
    error = found
  failed = _of_all(error is not None)
  if error is not None:
    raise error
  if failed.any():
    raise ValueError(f"{name}: process {failed.argmax()} failed, and says why")


def check_same(name: str, digest: str) -> None:
  """Refuses processes of a run that were given different things.

  Args:
    name: what they were given.
    digest: of it, here.

  Raises:
    ValueError: they differ; in all of them.
  """
  found = _of_all(zlib.crc32(digest.encode()))
  if (found != found[0]).any():
    raise ValueError(
      f"the processes of this run were given different {name}: all of them need"
      " the same"
    )


def _of_all(number: int) -> np.ndarray:
  """What every process says, in their order."""
  if jax.process_count() == 1:
    return np.array([number], np.uint32)
  return multihost_utils.process_allgather(np.uint32(number))


def agreed(said: bool) -> bool:
  """What the first process says; all of them have to ask."""
  if jax.process_count() == 1:
    return said
  return bool(multihost_utils.broadcast_one_to_all(np.bool_(said)))
