"""The retraining bank: a measurement of every (weights, seed) pair retrained.

`bank(train, measure, weights [M, N], keys [R])` trains M · R models and returns
what `measure(params)` says of each. It is the ground truth of every
counterfactual evaluation: random subsets for the LDS, all but one example for
leave-one-out, all but the top k for removal. Masks and seeds are crossed: a
seed has the same initialisation and order under every mask.

Pairs are trained in chunks, one vmapped program each. The operations of a small
model are too small to be split over the cores of a CPU, so there several chunks
run at once, in threads; on an accelerator, or with a `sharding`, one at a time.

Notation: M masks, R seeds, P pairs of a chunk, N examples.
"""

import functools
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import (
  FIRST_COMPLETED,
  ThreadPoolExecutor,
  as_completed,
  wait,
)
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import Partial
from tqdm import tqdm

from tda import parts
from tda.trajectory import Train

PyTree = Any
Measure = Callable[[PyTree], PyTree]  # params -> arrays

# Most pairs of a chunk on one device. CPU: of 1 to 64 pairs of a digits MLP, 2
# to 8 were fastest, more fall out of the caches. Accelerator: a guess.
_CPU_PAIRS = 8
_ACCELERATOR_PAIRS = 128


def subsets(key: jax.Array, n: int, count: int, fraction: float) -> jax.Array:
  """`count` random masks [M, N], 0 or 1, each keeping round(fraction · n)."""
  kept = round(fraction * n)
  if not 0 < kept <= n:
    raise ValueError(
      f"fraction {fraction} of {n} examples keeps {kept}: it must keep 1..{n}"
    )
  first_N = (jnp.arange(n) < kept).astype(jnp.float32)
  keys = jax.random.split(key, count)
  return jax.vmap(lambda k: jax.random.permutation(k, first_N))(keys)


def bank(
  train: Train,
  measure: Measure,
  weights: jax.Array | np.ndarray,
  keys: jax.Array,
  *,
  chunk: int | None = None,
  workers: int | None = None,
  sharding: NamedSharding | None = None,
  directory: str | os.PathLike | None = None,
  label: str | None = None,
) -> PyTree:
  """Measurements [M, R, ...] (numpy) after training with all weights and keys.

  `train(weights [N], key) -> params`; `measure(params)` returns a pytree of
  arrays (floats narrower than float32 come back as float32). Both may be
  `jax.tree_util.Partial`, whose arrays then enter the program as arguments;
  later calls with the same functions and shapes do not compile again.

  `chunk` (mask, seed) pairs are trained by one program, `workers` programs at
  once; by default what is fast and fits half of the memory. `sharding`, of one
  axis, spreads the pairs of a chunk over the devices of that axis.

  With a `directory` every finished chunk is written there, and a later call
  trains only the missing pairs, whatever its chunks. It is bound to weights,
  keys and shape of the measurement; it cannot know the hyper-parameters inside
  `train`, so give each configuration its own. `label` shows a progress bar.

  Raises ValueError, naming mask and seed, if a measurement is not finite.
  """
  masks = _checked(weights, keys)
  seeds, total = len(keys), len(masks) * len(keys)
  functions = tuple(
    f if isinstance(f, Partial) else Partial(f) for f in (train, measure)
  )
  program = functools.partial(_program(sharding), *functions)
  kinds = jax.eval_shape(program, masks[:1], keys[:1])
  files = parts.opened(directory, _fingerprint(masks, keys, kinds))
  leaves = [
    np.empty((total, *kind.shape[1:]), kind.dtype)
    for kind in jax.tree.leaves(kinds)
  ]
  missing = np.ones(total, bool)

  def record(pairs: np.ndarray, values: list[np.ndarray]) -> int:
    for leaf, value in zip(leaves, values, strict=True):
      leaf[pairs] = value
    missing[pairs] = False
    return len(pairs)

  with tqdm(total=total, desc=label, disable=label is None) as bar:
    for found in files.load():
      bar.update(record(*found))
    todo = np.flatnonzero(missing)
    plan = chunk, workers, sharding
    for new in _retrained(functions, masks, keys, todo, files.save, *plan):
      bar.update(record(*new))
  leaves = [leaf.reshape(-1, seeds, *leaf.shape[1:]) for leaf in leaves]
  return jax.tree.unflatten(jax.tree.structure(kinds), leaves)


def _retrained(
  functions: tuple,
  masks: np.ndarray,
  keys: jax.Array,
  todo: np.ndarray,
  save: Callable[[np.ndarray, list], None],
  chunk: int | None,
  workers: int | None,
  sharding: NamedSharding | None,
) -> Iterator[tuple]:
  """(pairs [P], leaves [P, ...]) of chunks of the pairs `todo`, once saved."""
  if not len(todo):
    return
  seeds = len(keys)

  def inputs(pairs: np.ndarray, chunk: int) -> tuple:
    pairs = np.resize(pairs, chunk)  # repeats some to fill the last chunk
    arrays = jnp.asarray(masks[pairs // seeds]), keys[pairs % seeds]
    return arrays if sharding is None else jax.device_put(arrays, sharding)

  def lower(chunk: int):
    return _program(sharding).lower(*functions, *inputs(todo, chunk))

  # Compiled here: a thread would not see the configuration of this one.
  program, chunk, workers = _compiled(
    lower, len(todo), chunk, workers, sharding
  )

  def run(pairs: np.ndarray, arrays: tuple) -> tuple:
    values = jax.tree.leaves(program(*functions, *arrays))
    values = [np.asarray(value)[: len(pairs)] for value in values]
    _check_finite(values, pairs, seeds)
    save(pairs, values)
    return pairs, values

  chunks = np.split(todo, range(chunk, len(todo), chunk))
  jobs = ((pairs, inputs(pairs, chunk)) for pairs in chunks)
  yield from _concurrently(run, jobs, workers)


def _checked(weights: jax.Array | np.ndarray, keys: jax.Array) -> np.ndarray:
  masks = np.asarray(weights)
  if masks.ndim != 2 or 0 in masks.shape:
    raise ValueError(f"weights must be [masks, examples], got {masks.shape}")
  if not np.isfinite(masks).all():
    mask, example = np.argwhere(~np.isfinite(masks))[0]
    raise ValueError(f"weight of example {example}, mask {mask} is not finite")
  typed = jnp.issubdtype(keys.dtype, jax.dtypes.prng_key)
  if not typed or keys.ndim != 1 or not len(keys):
    raise ValueError(
      f"keys must be a vector of jax.random.key's, got {keys.dtype} "
      f"{keys.shape}: make them by jax.random.split(jax.random.key(0), seeds)"
    )
  return masks


@functools.cache  # so that another bank of the same functions finds its program
def _program(sharding: NamedSharding | None) -> Any:
  """Jitted (train, measure, weights [P, N], keys [P]) -> measurements [P, ...].

  With a sharding the measurements come back on every device (and process).
  """

  def run(
    train: Train, measure: Measure, weights: jax.Array, keys: jax.Array
  ) -> PyTree:
    measured = jax.vmap(lambda w, key: measure(train(w, key)))(weights, keys)
    return jax.tree.map(_widened, measured)

  if sharding is None:
    return jax.jit(run)
  everywhere = NamedSharding(sharding.mesh, PartitionSpec())
  return jax.jit(run, out_shardings=everywhere)


def _widened(array: jax.Array) -> jax.Array:
  if not jnp.issubdtype(array.dtype, jnp.floating):
    return array
  return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def _compiled(
  lower: Callable[[int], Any],
  pairs: int,
  chunk: int | None,
  workers: int | None,
  sharding: NamedSharding | None,
) -> tuple[Any, int, int]:
  """The compiled chunk, its number of pairs, and how many to run at once."""
  device, shards = jax.devices()[0], 1
  if sharding is not None:
    device, many = sharding.mesh.devices.flat[0], sharding.num_devices
    shards = many // sharding.shard_shape((many,))[0]
  cpu = device.platform == "cpu"
  threaded = cpu and sharding is None
  if sharding is not None and workers not in (None, 1):
    raise ValueError(f"a sharded chunk needs one worker, got {workers}")
  workers = workers or ((os.cpu_count() or 1) if threaded else 1)
  if chunk is not None:
    if chunk < 1 or chunk % shards:
      raise ValueError(f"chunk {chunk} is not a multiple of {shards} shards")
    return lower(chunk).compile(), chunk, workers
  most = _CPU_PAIRS if cpu else _ACCELERATOR_PAIRS
  local = min(most, -(-pairs // (workers * shards)))
  program = lower(local * shards).compile()
  # Program and memory are those of one device; a CPU's devices share theirs.
  fitting = (
    local * _memory(device) // (_needed(program) * (shards if cpu else 1))
  )
  workers = min(workers, max(1, fitting))
  if fitting < local * workers:
    local = max(1, fitting // workers)
    program = lower(local * shards).compile()
  return program, local * shards, workers


def _needed(program: Any) -> int:
  """Bytes that a compiled program takes on a device while it runs."""
  stats = program.memory_analysis()
  return max(1, stats.temp_size_in_bytes + stats.output_size_in_bytes)


def _memory(device: jax.Device) -> int:
  """Half of a device's bytes: the other half is for data and other users."""
  stats = device.memory_stats() or {}
  host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  return stats.get("bytes_limit", host) // 2


def _concurrently(
  run: Callable, jobs: Iterable[tuple], workers: int
) -> Iterator:
  """Results of run(*job) as they come; jobs are drawn as workers get free.

  After a failure what already runs is finished (and so kept) before it raises.
  """
  with ThreadPoolExecutor(workers) as pool:
    running: set = set()
    for job in jobs:
      running.add(pool.submit(run, *job))
      if len(running) > workers:
        finished, running = wait(running, return_when=FIRST_COMPLETED)
        yield from (future.result() for future in finished)
    yield from (future.result() for future in as_completed(running))


def _check_finite(values: list, pairs: np.ndarray, seeds: int) -> None:
  for value in values:
    finite = np.isfinite(value).reshape(len(pairs), -1).all(axis=1)
    if not finite.all():
      mask, seed = divmod(int(pairs[np.argmin(finite)]), seeds)
      raise ValueError(
        f"a measurement is not finite after training with mask {mask} and "
        f"seed {seed}: the run diverged (lower its learning rate), or the mask "
        "keeps more examples than the trainer's size. Finished chunks are kept"
      )


def _fingerprint(weights: np.ndarray, keys: jax.Array, kinds: PyTree) -> dict:
  """What a directory's chunks must have been made with, by name."""
  key_data = np.asarray(jax.random.key_data(keys))
  paths = jax.tree_util.tree_leaves_with_path(kinds)
  return {
    "weights": [weights.shape, hashlib.sha256(weights.tobytes()).hexdigest()],
    "keys": [str(keys.dtype), hashlib.sha256(key_data.tobytes()).hexdigest()],
    "measurement": {
      jax.tree_util.keystr(path): [kind.shape[1:], str(kind.dtype)]
      for path, kind in paths
    },
  }
