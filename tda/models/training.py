"""Training of a decoder on packed rows: AdamW, Grain, Orbax, a mesh.

Which rows a step sees is a function of (seed, step), so a run that was stopped
goes on as if it had not been, on any number of devices. (Runs that are to be
differentiated or repeated on subsets are those of `tda.trajectory`.)

Notation: S steps, B rows of a batch, T positions.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

from tda import checkpoints, extras, meshes, streams
from tda.data.packing import Rows, Source
from tda.models import sharding
from tda.models.config import DecoderConfig
from tda.models.decoder import Decoder, objective
from tda.trajectory import State

PyTree = Any


class Recipe(NamedTuple):
  """How a decoder is trained.

  Attributes:
    steps: of the optimizer.
    batch_size: rows of a step; the loss is the mean over their targets.
    learning_rate: the highest, after the warm-up; the last is a tenth of it.
    warmup: steps of the linear warm-up, then a cosine.
    weight_decay: of kernels and embeddings, times the learning rate.
    clip: the largest norm of a gradient.
    seed: of the initialisation and of the order of rows.
  """

  steps: int
  batch_size: int
  learning_rate: float = 1e-3
  warmup: int = 100
  weight_decay: float = 0.1
  clip: float = 1.0
  seed: int = 0


class Trained(NamedTuple):
  """The end of a run."""

  params: PyTree
  losses: np.ndarray  # [S] float32, nats per token, before each step


def optimizer(recipe: Recipe) -> optax.GradientTransformation:
  """AdamW (Loshchilov and Hutter 2019) with clipping and a schedule."""
  if not 0 <= recipe.warmup < recipe.steps:
    raise ValueError(
      f"a warm-up of {recipe.warmup} steps in a run of {recipe.steps}: it must"
      " be shorter"
    )
  rate = optax.warmup_cosine_decay_schedule(
    0.0,
    recipe.learning_rate,
    recipe.warmup,
    recipe.steps,
    end_value=recipe.learning_rate / 10,
  )

  def decayed(params: PyTree) -> PyTree:
    is_matrix = lambda path, _: path[-1].key in ("kernel", "embedding")
    return jax.tree_util.tree_map_with_path(is_matrix, params)

  adam = optax.adamw(
    rate, b2=0.95, weight_decay=recipe.weight_decay, mask=decayed
  )
  return optax.chain(optax.clip_by_global_norm(recipe.clip), adam)


def train(
  config: DecoderConfig,
  recipe: Recipe,
  rows: Rows,
  *,
  params: PyTree | None = None,
  mesh: jax.sharding.Mesh | None = None,
  directory: str | None = None,
  save_every: float = 60.0,
  label: str | None = None,
) -> Trained:
  """Trains on packed rows, from `params` or from new ones.

  Args:
    config: of the decoder.
    recipe: of the run.
    rows: of `tda.data.packing.pack`.
    params: to start from; None draws them.
    mesh: batches are spread over its "data" axis, parameters over "model".
    directory: keeps the state; what a stopped run left there is taken up. It
      must belong to the same run, which the caller sees to.
    save_every: seconds between checkpoints, more where one takes long.
    label: of the progress bar; None shows none.

  Raises:
    ValueError: a loss that is not finite, naming the step.
  """
  _check(recipe, rows, mesh)
  state, step = _begun(config, recipe, params, mesh), 0
  losses = np.full(recipe.steps, np.nan, np.float32)
  record = lambda: {"state": state, "step": np.int32(step), "losses": losses}
  if directory is not None and checkpoints.exists(directory):
    found = checkpoints.load(directory, meshes.replicate(record(), mesh))
    state, step = found["state"], int(meshes.fetch(found["step"]))
    losses = np.array(meshes.fetch(found["losses"]))
  pace = checkpoints.Pace(save_every)
  waiting: list[tuple[int, jax.Array]] = []
  with tqdm.tqdm(
    total=recipe.steps, initial=step, desc=label, unit="step", disable=not label
  ) as bar:
    for batch in _batches(rows, recipe, step):
      state, loss = _step(config, recipe, state, meshes.spread(batch, mesh))
      _settle(waiting, losses, bar)  # of the step before: the device is busy
      waiting.append((step, loss))
      step += 1
      bar.update()
      if directory is not None and (pace.due() or step == recipe.steps):
        _settle(waiting, losses, bar)
        with pace.saving():
          checkpoints.save(directory, meshes.replicate(record(), mesh))
    _settle(waiting, losses, bar)
  return Trained(state.params, losses)


def surprisal(
  config: DecoderConfig,
  params: PyTree,
  rows: Rows,
  loop: streams.Loop = streams.Loop(),
) -> float:
  """−log p in nats, summed over the targets of all rows."""
  return float(surprisals(config, params, rows, loop).sum(dtype=float))


def surprisals(
  config: DecoderConfig,
  params: PyTree,
  rows: Rows,
  loop: streams.Loop = streams.Loop(),
) -> np.ndarray:
  """−log p in nats, summed over the targets of each row [N]."""
  aim = objective(config)

  def losses(params: PyTree, batch: streams.Batch):
    found = jax.vmap(aim.loss, (None, 0))(params, batch.rows)
    return found, jnp.isfinite(found)

  return streams.each(losses, params, rows, loop)


def _begun(
  config: DecoderConfig,
  recipe: Recipe,
  params: PyTree | None,
  mesh: jax.sharding.Mesh | None,
) -> State:
  """The first state, each part made where it is to lie."""
  update, tokens = optimizer(recipe), jnp.zeros(1, jnp.int32)
  draw = lambda key: Decoder(config).init(key, tokens)["params"]
  key = jax.random.key(recipe.seed)
  if params is not None:
    params = jax.tree.map(jnp.copy, params)  # a step takes what it is given
  if mesh is None:
    params = jax.jit(draw)(key) if params is None else params
    return State(params, update.init(params))
  where = sharding.shardings(jax.eval_shape(draw, key), mesh)
  if params is None:
    params = jax.jit(draw, out_shardings=where)(key)
  else:
    params = jax.device_put(params, where)
  return State(params, meshes.replicate(update.init(params), mesh))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def _step(
  config: DecoderConfig, recipe: Recipe, state: State, batch: PyTree
) -> tuple[State, jax.Array]:
  """The next state, and the mean loss over the batch's targets."""
  aim, update = objective(config), optimizer(recipe)

  def mean(params: PyTree) -> jax.Array:
    total = jax.vmap(aim.loss, (None, 0))(params, batch).sum()
    return total / jnp.maximum(batch["mask"].sum(), 1)

  loss, grads = jax.value_and_grad(mean)(state.params)
  updates, opt_state = update.update(grads, state.opt_state, state.params)
  return State(optax.apply_updates(state.params, updates), opt_state), loss


def _batches(rows: Rows, recipe: Recipe, begin: int) -> Iterator[Rows]:
  """The batches of the steps from `begin` on, read ahead by Grain."""
  grain = extras.package("grain", "training on rows", "lm")
  data = grain.MapDataset.source(Source(rows)).shuffle(seed=recipe.seed)
  data = data.repeat().batch(recipe.batch_size)
  options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
  steps = data.slice(slice(begin, recipe.steps))
  return iter(steps.to_iter_dataset(options))


def _settle(
  waiting: list[tuple[int, jax.Array]], losses: np.ndarray, bar: tqdm.tqdm
) -> None:
  """Writes down losses that were left on the device, and empties the list."""
  while waiting:
    step, loss = waiting.pop()
    losses[step] = meshes.fetch(loss)
    bar.set_postfix(loss=f"{losses[step]:.3f}", refresh=False)
    if not np.isfinite(losses[step]):
      raise ValueError(
        f"the loss is {losses[step]} before step {step}: take a lower learning"
        " rate or a longer warm-up"
      )


def _check(recipe: Recipe, rows: Rows, mesh: jax.sharding.Mesh | None) -> None:
  if not np.any(rows["mask"]):
    raise ValueError("the rows' mask hides every token: nothing to learn")
  devices = 1 if mesh is None else mesh.shape["data"]
  if recipe.batch_size < 1 or recipe.batch_size % devices:
    raise ValueError(
      f"batch_size={recipe.batch_size} must be a positive multiple of the"
      f" {devices} devices of the mesh's data axis"
    )
