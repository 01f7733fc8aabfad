"""Training as a pure function of example weights and a key.

`trainer(...)` returns `train(weights [N], key) -> params`, a pure function that
may be jitted, differentiated, and vmapped over weights and keys alike.

Weights. The gradient of a batch is the sum of weight_i · grad_i over its
examples, divided by the number of examples in it: weights are not normalised,
so that the derivative in one of them is the effect of one example. An example
of weight 0 is excluded: each epoch draws one permutation of all N examples,
moves the excluded ones to its end without changing the order of the others,
and stops at the last example kept. Training with 0/1 weights is therefore
training on the subset alone, in the same order; the last batch of an epoch
holds (and is divided by the number of) what remains. A `masked` run excludes
nobody: an example of weight 0 keeps its place in its batches, which are divided
by the same number, so that the run depends smoothly on every weight.

A loss may return several values of an example, as one for each token. Weights
are then [N, ...] with an entry for each; their weighted sum is the example's
loss, and an example is excluded when all of its weights are 0.

Cost. An epoch runs ceil(size / batch_size) steps, where `size` is the largest
number of non-zero weights ever passed: a half subset costs half. With fewer
non-zero weights the surplus steps are computed and discarded (parameters,
optimizer state and its step count stay), so that `size` never changes a result.
(On a CPU, XLA runs the gradient of a convolution about ten times slower inside
a loop, as here, than outside; patches and a matrix product are not affected.)

Keys. The key is split in two: one half draws the initialisation, the other,
folded with the epoch, the order. Weights enter neither, so the same key gives
the same initialisation, and the same order up to exclusion, whatever the
weights. (Keys of the default implementation: `rbg` draws differ under vmap.)

The derivative in a weight is exact where the weight is not 0, and everywhere in
a masked run; otherwise it is 0 where the weight is 0, since whether an example
takes part is not differentiable.

Memory. With `microbatch` the gradient of a batch is summed over parts of that
many slots, one after another, also where it is differentiated.

Notation: N examples, S steps of an epoch, B slots of a batch.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

PyTree = Any
# params, one example -> scalar, or one value for each of its weights
Loss = Callable[[PyTree, PyTree], jax.Array]
Init = Callable[[jax.Array], PyTree]  # key -> params
Train = Callable[[jax.Array, jax.Array], PyTree]  # weights, key -> params


class State(NamedTuple):
  """Parameters, and the optimizer's state at them."""

  params: PyTree
  opt_state: PyTree


class Trajectory(NamedTuple):
  """The parts of a run, for those who scan over its steps themselves."""

  start: Callable[[jax.Array], State]  # initialisation key -> state
  # weights [N], order key, epoch -> indices [S, B], -1 in empty slots
  batches: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
  # state, data, weights [N], indices [B] -> state
  step: Callable[[State, PyTree, jax.Array, jax.Array], State]
  # params, data, weights [N], indices [B] -> what the optimizer is given
  gradient: Callable[[PyTree, PyTree, jax.Array, jax.Array], PyTree]
  epochs: int


def steps(size: int, batch_size: int, epochs: int) -> int:
  """Optimizer steps of a run over `size` examples, for schedules."""
  return epochs * -(-size // batch_size)


def resized(
  n: int, size: int | None, batch_size: int, epochs: int
) -> dict[str, Any]:
  """Options of a run that keeps `size` examples, about as long as with n.

  Fewer examples are seen in as many more epochs, and more in one, which takes
  longer.
  """
  size = n if size is None else size
  goal = steps(n, batch_size, epochs)
  batch_size = min(batch_size, size)
  epochs = max(round(goal / steps(size, batch_size, 1)), 1)
  return {"batch_size": batch_size, "epochs": epochs, "size": size}


def permutation(
  key: jax.Array, weights: jax.Array, epoch: jax.Array | int
) -> jax.Array:
  """Order of one epoch [N] int32: those of weight 0 last, otherwise random.

  Sorts 31 random bits (ties, one pair in 2³¹, by index) under one bit that says
  whether the weight is 0: one sort draws the permutation and partitions it.
  """
  (n,) = weights.shape
  bits_N = jax.random.bits(jax.random.fold_in(key, epoch), (n,), jnp.uint32)
  excluded_N = (weights == 0).astype(jnp.uint32)
  rank_N = (bits_N >> 1) | (excluded_N << 31)
  index_N = jnp.arange(n, dtype=jnp.int32)
  return jax.lax.sort((rank_N, index_N), num_keys=1, is_stable=True)[1]


def trajectory(
  loss: Loss,
  init: Init,
  optimizer: optax.GradientTransformation,
  n: int,
  *,
  epochs: int,
  batch_size: int,
  size: int | None = None,
  masked: bool = False,
  microbatch: int | None = None,
) -> Trajectory:
  """Start, batches and step of a run over `n` examples; see `trainer`."""
  size = n if size is None else size
  if not 0 < size <= n:
    raise ValueError(f"size must be in 1..{n} (the examples), got {size}")
  if not 0 < batch_size <= size:
    raise ValueError(
      f"batch_size must be in 1..size = {size}, got {batch_size}: lower it, "
      "or keep more examples"
    )
  if epochs < 1:
    raise ValueError(f"epochs must be positive, got {epochs}")
  if microbatch is not None and not 0 < microbatch <= batch_size:
    raise ValueError(
      f"microbatch must be in 1..batch_size = {batch_size}, got {microbatch}"
    )
  if masked and size != n:
    raise ValueError(f"a masked run sees all {n} examples: size={size} is less")
  epoch_steps = steps(size, batch_size, 1)

  def start(key: jax.Array) -> State:
    params = init(key)
    return State(params, optimizer.init(params))

  def batches(weights, key, epoch):
    present_N = jnp.ones(n) if masked else present(weights)
    order = permutation(key, present_N, epoch)[:size]
    kept = jnp.count_nonzero(present_N)
    order = jnp.where(jnp.arange(size) < kept, order, -1)
    slots = epoch_steps * batch_size
    order = jnp.pad(order, (0, slots - size), constant_values=-1)
    return order.reshape(epoch_steps, batch_size)

  def objective(params, data, weights, index_B, filled_B):
    """Weighted sum over the filled slots of a batch, or of a part of one."""
    examples = jax.tree.map(lambda leaf: leaf[index_B], data)
    loss_B = jax.vmap(loss, (None, 0))(params, examples)
    weight_B = weights[index_B]
    if loss_B.shape != weight_B.shape:
      raise ValueError(
        "loss(params, example) must return a scalar for one example, or as "
        f"many values as an example has weights: got shape {loss_B.shape[1:]} "
        f"for weights of shape {weight_B.shape[1:]}"
      )
    filled_B = filled_B.reshape(-1, *[1] * (weight_B.ndim - 1))
    return jnp.sum(jnp.where(filled_B, weight_B, 0) * loss_B)

  def gradient(params, data, weights, batch):
    filled_B = batch >= 0
    # An empty slot repeats the batch's first example with weight 0: another
    # might be excluded because its loss is infinite, and 0 · inf is NaN.
    index_B = jnp.where(filled_B, batch, batch[0])
    part = lambda index, filled: jax.grad(objective)(
      params, data, weights, index, filled
    )
    if microbatch is None:
      total = part(index_B, filled_B)
    else:
      total = _summed(part, index_B, filled_B, microbatch)
    count = jnp.maximum(jnp.count_nonzero(filled_B), 1)
    return jax.tree.map(lambda g: g / count, total)

  def step(state, data, weights, batch):
    grads = gradient(state.params, data, weights, batch)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    moved = State(optax.apply_updates(state.params, updates), opt_state)
    keep = batch[0] >= 0  # slots fill from the front
    return jax.tree.map(
      lambda new, old: jnp.where(keep, new, old), moved, state
    )

  return Trajectory(start, batches, step, gradient, epochs)


def through(
  parts: Trajectory,
  state: State,
  data: PyTree,
  weights: jax.Array,
  key: jax.Array,
) -> State:
  """The state after all epochs, in the order of a key."""

  def step(state, batch):
    return parts.step(state, data, weights, batch), None

  def epoch(state, i):
    return jax.lax.scan(step, state, parts.batches(weights, key, i))[0], None

  return jax.lax.scan(epoch, state, jnp.arange(parts.epochs))[0]


def trainer(
  loss: Loss,
  init: Init,
  optimizer: optax.GradientTransformation,
  data: PyTree,
  *,
  epochs: int,
  batch_size: int,
  size: int | None = None,
  masked: bool = False,
  microbatch: int | None = None,
) -> Train:
  """`train(weights [N], key) -> params`; the module says what it computes.

  `loss(params, example) -> scalar` of one row of `data`, a pytree of arrays
  with N rows; `optimizer` is any optax transformation that needs no extra
  arguments, and its schedules count `steps(kept, batch_size, epochs)` steps.

  `size`, default N, bounds the number of non-zero weights. More of them than
  `size` cannot be seen on shapes, and give NaN parameters instead of a run on
  part of them. `masked` and `microbatch` are what the module says.

  `train` is a `jax.tree_util.Partial` that holds `data`: passed as an argument
  to a jitted function the data stay arguments, called inside one they become
  constants of the program.
  """
  data = jax.tree.map(jnp.asarray, data)
  n = rows(data)
  size = n if size is None else size
  parts = trajectory(
    loss,
    init,
    optimizer,
    n,
    epochs=epochs,
    batch_size=batch_size,
    size=size,
    masked=masked,
    microbatch=microbatch,
  )

  def train(data: PyTree, weights: jax.Array, key: jax.Array) -> PyTree:
    weights = as_weights(weights)
    if weights.shape[:1] != (n,):
      raise ValueError(
        f"weights are of {n} examples, and not of shape {weights.shape}"
      )
    init_key, order_key = jax.random.split(key)
    state = through(parts, parts.start(init_key), data, weights, order_key)
    fits = masked | (jnp.count_nonzero(present(weights)) <= size)
    return jax.tree.map(lambda p: jnp.where(fits, p, jnp.nan), state.params)

  return jax.tree_util.Partial(train, data)


def as_weights(weights: jax.Array) -> jax.Array:
  """Floating, whatever they are given as."""
  weights = jnp.asarray(weights)
  if jnp.issubdtype(weights.dtype, jnp.floating):
    return weights
  return weights.astype(jnp.result_type(float))


def present(weights: jax.Array) -> jax.Array:
  """Which examples have a weight that is not 0, bool [N]."""
  return (weights != 0).any(axis=tuple(range(1, weights.ndim)))


def _summed(
  part: Callable[[jax.Array, jax.Array], PyTree],
  index_B: jax.Array,
  filled_B: jax.Array,
  microbatch: int,
) -> PyTree:
  """The gradients of parts of a batch, one after another, and their sum."""
  empty = -len(index_B) % microbatch
  index_B = jnp.pad(index_B, (0, empty), mode="edge")
  filled_B = jnp.pad(filled_B, (0, empty))
  split = lambda x: x.reshape(-1, microbatch)

  @jax.checkpoint
  def add(total, slots):
    return jax.tree.map(jnp.add, total, part(*slots)), None

  like = jax.eval_shape(part, index_B[:microbatch], filled_B[:microbatch])
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
  return jax.lax.scan(add, zeros, (split(index_B), split(filled_B)))[0]


def rows(data: PyTree) -> int:
  """N, the leading axis that all leaves share."""
  shapes = {
    jax.tree_util.keystr(path): leaf.shape
    for path, leaf in jax.tree_util.tree_leaves_with_path(data)
  }
  counts = {shape[:1] for shape in shapes.values()}
  if len(counts) != 1 or () in counts:
    raise ValueError(
      f"the arrays of a dataset must share their first axis, got {shapes}"
    )
  return counts.pop()[0]
