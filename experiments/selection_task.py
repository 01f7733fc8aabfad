"""What `selection_lm` does with one seed: split, warm up, choose, train on.

Notation: N candidates, K kinds, each the target once, T targets, F fractions.
"""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial
from ml_collections import ConfigDict

from experiments import influence_kinds
from tda import blocks, runs, streams, trajectory
from tda.attribution import logra
from tda.attribution.logra import Logger
from tda.blocks import Trace
from tda.data import packing, retrieval, text
from tda.data.packing import Rows
from tda.data.text import Tokenizer
from tda.evaluation import retraining, selection, stored
from tda.evaluation.workdir import Arrays, Workdir
from tda.likelihoods import Objective
from tda.models import decoder
from tda.runs import Checkpoint
from tda.trajectory import Init

METHODS = (*stored.ALONG, "bm25", "random", "own_kind")
REFERENCES = ("all_documents", "no_training")


class Draw(NamedTuple):
  """One seed's split; what is held out takes turns by kind."""

  kinds: list[str]  # [K]
  texts: list[str]  # of the candidates [N]
  own: np.ndarray  # bool [N, K], of which kind they are
  train: Rows  # their rows
  asked: list[str]  # of the validation documents
  validation: Rows
  test: Rows


class Subject(NamedTuple):
  """What all seeds share, so that they share their compilations."""

  objective: Objective
  init: Init
  found: Trace
  log: Logger
  fits: Mapping[float, Callable]  # (start, data, weights, key), by fraction
  measure: Callable  # (test, params) -> losses by kind [K]


def subject(
  setting: ConfigDict, draw: Draw, objective: Objective, init: Init
) -> Subject:
  """A model's runs; of a draw only the shapes matter."""
  shapes = jax.eval_shape(init, jax.random.key(0))
  select = decoder.SITES[setting.sites]
  example = streams.example(draw.train)
  found = blocks.trace(objective.outputs, shapes, example, select=select)
  log = logra.logger(
    objective,
    shapes,
    draw.train,
    key=jax.random.key(setting.seed),
    dimension=setting.dimension,
    select=select,
  )
  n, kinds = draw.own.shape
  most = selection.count(n, max(setting.fractions))

  def fit(size):
    options = trajectory.resized(most, size, setting.batch_size, 1)
    adam = falling(setting.tune_learning_rate, trajectory.steps(**options))

    def train(start, data, weights, key):
      to_start = lambda key: start
      run = trajectory.trainer(objective.loss, to_start, adam, data, **options)
      return run(weights, key)

    return train

  def measure(test, params):
    losses = jax.vmap(objective.loss, (None, 0))(params, test)
    return losses.reshape(-1, kinds).mean(axis=0)

  fits = {f: fit(selection.count(n, f)) for f in (*setting.fractions, 1.0)}
  return Subject(objective, jax.jit(init), found, log, fits, measure)


def falling(rate: float, steps: int) -> optax.GradientTransformation:
  """Adam with its defaults, the learning rate falling to 0."""
  return optax.adam(optax.linear_schedule(rate, 0, steps))


def split(
  setting: ConfigDict, texts: Mapping[str, str], by: Tokenizer, seed: int
) -> Draw:
  """As many documents of every kind held out, and the candidates."""
  if not 0 < setting.validation < setting.ask:
    raise ValueError(
      f"validation={setting.validation} of ask={setting.ask} documents: leave"
      " some of these for the test"
    )
  held = influence_kinds.drawn([*texts], setting.ask, seed)
  kinds = [*dict.fromkeys(map(influence_kinds.of, held))]
  if len(kinds) < 2:
    raise ValueError(
      f"documents of {len(kinds)} kind: give --config.documents a folder with"
      " a folder of each kind"
    )
  names = sorted({*texts} - {*held})
  own = np.array([influence_kinds.of(name) for name in names])[:, None] == kinds
  cut, length = setting.validation * len(kinds), setting.length

  def rows(texts):
    starts = [x[: length + 1] for x in text.encode(texts, by)]
    parts = [packing.pack([x], length) for x in starts]
    return {name: np.concatenate([x[name] for x in parts]) for name in parts[0]}

  said, asked, test = (
    [texts[name] for name in some] for some in (names, held[:cut], held[cut:])
  )
  return Draw(kinds, said, own, rows(said), asked, rows(asked), rows(test))


def subtasks(setting: ConfigDict, kinds: int) -> np.ndarray:
  """Means over parts of each target's validation documents [T S, V T]."""
  parts, each = setting.subtasks, setting.validation // setting.subtasks
  if each * parts != setting.validation:
    raise ValueError(
      f"validation={setting.validation} documents are not to be divided into"
      f" subtasks={parts} of the same size"
    )
  groups_SxV = np.repeat(np.eye(parts), each, axis=1) / each
  means = np.einsum("sv,tk->tsvk", groups_SxV, np.eye(kinds))
  return means.reshape(kinds * parts, -1)


def warmed(
  setting: ConfigDict, one: Subject, draw: Draw, key: jax.Array, folder: str
) -> tuple[list[Checkpoint], list[float]]:
  """Checkpoints of a run on a random share, and the mean rate up to each."""
  run_key, share_key = jax.random.split(key)
  n = len(draw.texts)
  weights = retraining.subsets(share_key, n, 1, setting.share)
  size = round(setting.share * n)
  total = trajectory.steps(size, setting.batch_size, setting.epochs)
  ends = np.rint(np.linspace(0, total, setting.checkpoints + 1)).astype(int)
  stage = runs.Stage(
    one.objective.loss,
    draw.train,
    falling(setting.learning_rate, total),
    setting.epochs,
    setting.batch_size,
    size,
  )
  points = runs.checkpoints(
    one.init,
    [stage],
    [*weights],
    run_key,
    ends[1:].tolist(),
    directory=folder,
    label="warm-up",
  )
  rates = setting.learning_rate * (1 - np.arange(total) / total)
  return points, [float(x.mean()) for x in np.split(rates, ends[1:-1])]


def scored(
  setting: ConfigDict,
  one: Subject,
  draw: Draw,
  points: list[Checkpoint],
  rates: list[float],
  key: jax.Array,
  folder: str,
) -> Arrays:
  """What every method thinks of the candidates [N, T]."""
  n, kinds = draw.own.shape
  means = subtasks(setting, kinds)
  found = stored.along(
    folder,
    one.log,
    one.found,
    points,
    draw.train,
    draw.validation,
    means,
    rates=rates,
    loop=streams.Loop(32, "scores"),
  )
  words, _ = text.words([*draw.texts, *draw.asked])
  found["bm25"] = retrieval.bm25(words[:n], words[n:]) @ means.T
  best = {k: x.reshape(n, kinds, -1).max(axis=2) for k, x in found.items()}
  chance = np.asarray(jax.random.uniform(key, draw.own.shape))
  return best | {"random": chance, "own_kind": draw.own + chance}


def compared(
  setting: ConfigDict, one: Subject, draw: Draw, seed: int, workdir: Workdir
) -> Arrays:
  """Test losses by kind [F, T, K] of `METHODS` and `REFERENCES`, and as "share
  METHOD" what part of the chosen documents is of the target kind [F, T]."""
  warm_key, chance_key, key = jax.random.split(jax.random.key(seed), 3)
  points, rates = warmed(
    setting, one, draw, warm_key, workdir.folder(f"warm_up_{seed}")
  )
  folder = workdir.folder(f"stores_{seed}")
  scores = scored(setting, one, draw, points, rates, chance_key, folder)
  columns = jnp.concatenate([scores[name].T for name in METHODS])
  start, train, test = jax.tree.map(
    jnp.asarray, (points[-1].params, draw.train, draw.test)
  )
  measure = Partial(one.measure, test)

  def trained(fraction, masks):
    return retraining.bank(
      Partial(one.fits[fraction], start, train),
      measure,
      masks,
      key[None],
      directory=workdir.folder(f"bank_{seed}_{fraction:g}"),
      label=f"seed {seed}, {fraction:.0%} of the documents",
    )[:, 0]

  n, kinds = draw.own.shape
  losses, shares = [], []
  for fraction in setting.fractions:
    keep = functools.partial(selection.keep, fraction=fraction)
    masks = np.asarray(jax.vmap(keep)(-columns)).reshape(-1, kinds, n)
    losses.append(trained(fraction, masks.reshape(-1, n)))
    inside = np.einsum("mtn,nt->mt", masks, draw.own)
    shares.append(inside / masks.sum(axis=2))
  results: Arrays = {}
  for i, name in enumerate(METHODS):
    results[name] = np.stack([np.split(x, len(METHODS))[i] for x in losses])
    results[f"share {name}"] = np.stack([x[i] for x in shares])
  whole = trained(1.0, np.ones((1, n)))[0]
  for name, x in zip(REFERENCES, (whole, measure(start)), strict=True):
    results[name] = np.broadcast_to(x, results["random"].shape)
  return results
