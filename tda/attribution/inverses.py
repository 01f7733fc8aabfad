"""Damped inverses of a curvature, by their names.

Each turns the gradients of queries into responses (C + δ)⁻¹ ∇m. Those that are
made of the same passes over the data share them.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tda.attribution.responses import Operator
from tda.blocks import Trace
from tda.curvature import fitting, operators
from tda.curvature.kronecker import Curvature
from tda.curvature.labels import Labels
from tda.inverse import datainf, gfim, krylov, solvers, spectral
from tda.inverse.solvers import Budget
from tda.inverse.spectral import Damping
from tda.likelihoods import Objective, PyTree
from tda.streams import Loop

FITTED = (*fitting.METHODS, "hyperinf")
"""Of a curvature fitted to gradients at chosen labels."""
EXACT = (*solvers.METHODS, "arnoldi")
"""Of the exact Gauss-Newton Hessian."""
NAMES = (*FITTED, "datainf", *EXACT)


class Problem(NamedTuple):
  """What the inverses are of.

  Attributes:
    found: trace of `objective.outputs`.
    objective: model and likelihood.
    params: trained parameters.
    train: pytree of arrays with leading axis N.
    labels: of the fitted curvatures.
    dampings: each of them for each inverse.
    labels_key: for sampled labels, or None.
    key: for minibatches and starts, or None.
    budget: of solvers.
    loop: how to run over the data.
  """

  found: Trace
  objective: Objective
  params: PyTree
  train: PyTree
  labels: str | Labels
  dampings: Sequence[Damping]
  labels_key: jax.Array | None
  key: jax.Array | None
  budget: Budget
  loop: Loop

  def entry(self, name: str, damping: Damping) -> str:
    """The name of a method's scores."""
    return name if len(self.dampings) == 1 else f"{name}@{damping}"


def responses(problem: Problem, names: Sequence[str]) -> dict[str, Operator]:
  """{entry: response} of the methods among `NAMES`; others are passed over."""
  found: dict[str, Operator] = {}
  chosen = lambda family: [name for name in names if name in family]
  if spectra := chosen(fitting.METHODS):
    found |= _spectral(problem, spectra)
  if "hyperinf" in names:
    found |= _hyperinf(problem)
  if "datainf" in names:
    found |= _datainf(problem)
  if chosen(EXACT):
    fits = _preconditioners(problem)
    for name in chosen(solvers.METHODS):
      found |= _solvers(problem, name, fits)
    if "arnoldi" in names:
      found |= _arnoldi(problem, fits["ekfac"])
  return found


def _spectral(problem: Problem, names: list[str]) -> dict[str, Operator]:
  fits = _fit(problem, names, problem.labels, problem.loop)
  return {
    problem.entry(name, damping): spectral.inverse(curvature, damping)
    for name, curvature in fits.items()
    for damping in problem.dampings
  }


def _fit(problem, names, labels, loop) -> dict[str, Curvature]:
  fit = fitting.fitter(
    problem.found, problem.objective, methods=names, labels=labels
  )
  key = problem.labels_key
  return fit(problem.params, problem.train, key=key, loop=loop)


def _hyperinf(problem: Problem) -> dict[str, Operator]:
  fit = gfim.fitter(problem.found, problem.objective, labels=problem.labels)
  loop, key = problem.loop.stage("GFIM"), problem.labels_key
  fisher = fit(problem.params, problem.train, key=key, loop=loop)
  return {
    problem.entry("hyperinf", damping): gfim.inverse(fisher, damping)[0]
    for damping in problem.dampings
  }


def _datainf(problem: Problem) -> dict[str, Operator]:
  fit = datainf.fitter(problem.found, problem.objective)
  return {
    problem.entry("datainf", damping): fit(
      problem.params, problem.train, damping, loop=problem.loop
    )
    for damping in problem.dampings
  }


def _preconditioners(problem: Problem) -> dict[str, Curvature]:
  """Near the exact Gauss-Newton Hessian, in as few backward passes."""
  name = problem.budget.preconditioner
  if name not in (*fitting.METHODS, "none"):
    raise ValueError(
      f"unknown preconditioner {name!r}; choose of {[*fitting.METHODS, 'none']}"
    )
  names = [*dict.fromkeys(["ekfac", name])]
  loop = problem.loop.stage("preconditioner")
  return _fit(problem, [n for n in names if n != "none"], "sampled", loop)


def _solvers(
  problem: Problem, name: str, fits: dict[str, Curvature]
) -> dict[str, Operator]:
  first = fits.get(problem.budget.preconditioner)
  if name != "cg":
    first = fits["ekfac"]
  make = solvers.maker(
    problem.found, problem.objective, name, budget=problem.budget
  )
  label = problem.loop.label
  found: dict[str, Operator] = {}
  for damping in problem.dampings:
    entry = problem.entry(name, damping)
    found[entry] = make(
      problem.params,
      problem.train,
      {k: damping.of(x) for k, x in fits["ekfac"].eigenvalues.items()},
      first and spectral.inverse(first, damping),
      key=problem.key,
      mesh=problem.loop.mesh,
      named=damping,
      label=label and f"{label} {entry}",
    )
  return found


def _arnoldi(problem: Problem, first: Curvature) -> dict[str, Operator]:
  """One space for all dampings; a relative one is of the mean over layers."""
  if problem.key is None:
    raise ValueError("arnoldi starts at random: give a key")
  values = first.eigenvalues
  size = sum(x.size for x in values.values())
  rank = min(problem.budget.rank, size)
  steps = min(2 * rank, size)
  names = list(values)
  draw = lambda name, key: jax.random.normal(key, (1, *values[name].shape))
  keys = jax.random.split(problem.key, len(names))
  start = dict(zip(names, map(draw, names, keys), strict=True))

  @jax.jit
  def leading(params, data, start):
    product = operators.curvature(
      problem.found,
      problem.objective,
      params,
      data,
      microbatch=problem.budget.microbatch,
    )
    return krylov.lanczos(product, start, steps, rank)

  data = jax.tree.map(jnp.asarray, problem.train)
  spectrum = leading(problem.params, data, start)
  found: dict[str, Operator] = {}
  for damping in problem.dampings:
    total = sum(
      float(jnp.broadcast_to(damping.of(x), x.shape).sum())
      for x in values.values()
    )
    found[problem.entry("arnoldi", damping)] = dataclasses.replace(
      krylov.low_rank(spectrum, total / size),
      damping=damping,
      labels=Labels("exact"),
    )
  return found
