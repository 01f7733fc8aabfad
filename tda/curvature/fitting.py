"""Fitting a Kronecker-factored curvature to a dataset, start to finish."""

import functools
import os
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tda import checkpoints, gradients, meshes, streams
from tda.blocks import Blocks, Trace
from tda.curvature import kronecker
from tda.curvature import labels as labels_lib
from tda.curvature.kronecker import Basis, Curvature
from tda.curvature.labels import Labels
from tda.likelihoods import Objective
from tda.streams import Loop

METHODS = ("kfac", "ekfac", "diagonal")


def fitter(
  found: Trace,
  objective: Objective,
  *,
  methods: Sequence[str] = METHODS,
  labels: str | Labels = "empirical",
  widest: int | None = None,
) -> Callable[..., dict[str, Curvature]]:
  """Fits of one or several curvatures with the fewest passes over the data.

  Args:
    found: trace of `objective.outputs`.
    objective: model and likelihood.
    methods: of "kfac" (one pass), "ekfac" (two) and "diagonal" (one).
    labels: "empirical", "exact", "sampled" or "sampled:K".
    widest: cuts the eigenvectors of wider sides, as `kronecker.eigenbasis`.

  Returns:
    fit(params, data, *, others=(), scales=None, key=None, loop=Loop()) ->
    {method: Curvature}. Data is a pytree of arrays with leading axis N; the key
    is for sampled labels, of which each pass draws its own; each pass, and each
    side of the eigenbasis, saves in a folder of its own. With other parameters
    the curvature is the mean over all of them, in one basis; given scales
    (`kronecker.eigenbasis`), which are not for the diagonal, K-FAC's and
    EK-FAC's are of scaled coordinates. A second call compiles nothing again.
  """
  unknown = set(methods) - set(METHODS)
  if unknown or not methods:
    raise ValueError(
      f"unknown curvature {sorted(unknown)}; choose of {list(METHODS)}"
    )
  labels = labels_lib.parse(labels)

  def fold(statistic):
    run = gradients.backward_pass(found, objective, statistic, labels)
    return gradients.total(found, run)

  moments_fold = fold(kronecker.MOMENTS)
  squares_fold = fold(kronecker.SQUARES)

  def fit(params, data, *, others=(), scales=None, key=None, loop=Loop()):
    if labels.kind == "sampled" and key is None:
      raise ValueError("sampled labels are drawn at random: give a key")
    keys = [None] * 3 if key is None else jax.random.split(key, 3)
    fits = {}

    def summed(fold, name, operand, key):
      """Over the data at all parameters, and how many rows that were."""
      add = lambda x, y: jax.tree.map(jnp.add, x, y)
      total = None
      for i, point in enumerate((params, *others)):
        drawn = key if key is None or not i else jax.random.fold_in(key, i)
        stage = loop.stage(f"{name} {i + 1}" if i else name)
        found = streams.fold(fold, (point, operand, drawn), data, stage)
        total = add(total, found) if i else found
      return total

    def spectrum(name, basis, key):
      sums, count = summed(squares_fold, name, basis, key)
      values, finite = jax.jit(_means)(sums, count)
      bad = [k for k in values if not finite[k]]
      if bad:
        raise ValueError(
          f"the squared gradients of {bad} are not finite: a gradient "
          "overflowed. Fit in float32, or leave them out with `select`"
        )
      return values, int(count)

    if "kfac" in methods or "ekfac" in methods:
      moments, total = summed(moments_fold, "covariances", None, keys[0])
      total = int(total)
      stage = loop.stage("eigenbasis")
      keep = functools.partial(_kept, stage)
      basis, sides = kronecker.eigenbasis(
        moments, scales, widest, keep=keep, label=stage.label
      )
    if "kfac" in methods:
      values = kronecker.kfac_eigenvalues(moments, sides, total)
      fits["kfac"] = Curvature(basis, values, "kfac", labels, total)
    if "ekfac" in methods:
      values, total = spectrum("eigenvalues", basis, keys[1])
      fits["ekfac"] = Curvature(basis, values, "ekfac", labels, total)
    if "diagonal" in methods:
      values, total = spectrum("diagonal", None, keys[2])
      plain = {name: Basis(None, None) for name in found.blocks}
      fits["diagonal"] = Curvature(plain, values, "diagonal", labels, total)
    return {name: fits[name] for name in methods}

  return fit


def _kept(loop: Loop, name: str, like: Any, compute: Callable) -> Any:
  """What is in the loop's directory, or is computed and saved there."""
  if loop.directory is None:
    return compute()
  folder = os.path.join(loop.directory, urllib.parse.quote(name, safe=""))
  if checkpoints.exists(folder):
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)
    return checkpoints.load(folder, meshes.replicate(zeros, loop.mesh))
  found = compute()
  checkpoints.save(folder, meshes.replicate(found, loop.mesh))
  return found


def _means(
  sums: Mapping[str, jax.Array], count: jax.Array
) -> tuple[Blocks, dict[str, jax.Array]]:
  """Sums divided by the count, and whether each block's are finite."""
  means = {k: x / count for k, x in sums.items()}
  return means, {k: jnp.isfinite(x).all() for k, x in means.items()}
