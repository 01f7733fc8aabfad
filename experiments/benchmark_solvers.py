"""What preconditioning and solving many queries at once save.

    python -m experiments.benchmark_solvers [--config=configs/digits_mlp.py]

Conjugate gradients with the exact Gauss-Newton Hessian of a trained model:

  iterations   to a residual of 1e-3, mean over queries, by preconditioner and
               damping (relative to the mean eigenvalue of each layer)
  together     time of an iteration for 32 queries at once, relative to 32
               times that of one query alone
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from experiments import launch
from tda import blocks, gradients, streams
from tda.curvature import fitting
from tda.evaluation import problem, stages
from tda.inverse import iterative, solvers, spectral
from tda.report import tables
from tda.streams import Batch

DAMPINGS = flags.DEFINE_multi_float(
  "dampings", [0.1, 1.0, 10.0, 100.0], "Relative to the mean eigenvalue."
)
QUERIES = flags.DEFINE_integer("queries", 32, "Solved at once.")
LIMIT = flags.DEFINE_integer("limit", 300, "The most iterations.")
ROUNDS = flags.DEFINE_integer("rounds", 5, "Timed rounds.")
PRECONDITIONERS = ("none", "diagonal", "kfac", "ekfac")


def main(_) -> None:
  task = problem.build(launch.setting())
  workdir = launch.workdir("benchmark_solvers", task.setting)
  params = stages.trained(task, workdir)
  data = task.dataset.train
  found = blocks.trace(task.objective.outputs, params, streams.example(data))
  fit = fitting.fitter(found, task.objective, labels="sampled")
  fits: dict[str, Any] = {"none": None}
  fits |= fit(params, data, key=task.key_for("labels"))
  b = _gradients(found, task, params)
  budget = solvers.Budget(LIMIT.value)
  make = solvers.maker(found, task.objective, "cg", budget=budget)

  def solver(name: str, damping: spectral.Damping) -> solvers.Solver:
    added = {k: damping.of(x) for k, x in fits["ekfac"].eigenvalues.items()}
    first = fits[name] and spectral.inverse(fits[name], damping)
    return make(params, data, added, first, label=f"{name} {damping.value:g}")

  rows = []
  for name in PRECONDITIONERS:
    cells = []
    for value in DAMPINGS.value:
      info = solver(name, spectral.relative(value)).solve(b)[1]
      cells.append(_iterations(info))
    rows.append([name, *cells])
  header = ["preconditioner", *(f"damping {d:g}" for d in DAMPINGS.value)]
  print("Iterations of conjugate gradients to a residual of 1e-3 (> not met)")
  print(tables.aligned(header, rows))
  ratio = together(solver("ekfac", spectral.relative(1.0)), b)
  size = jax.tree.leaves(b)[0].shape[0]
  print(
    f"\nan iteration of {size} queries at once takes {ratio:.3f} of {size} "
    "iterations of one"
  )


def together(solver: solvers.Solver, b: blocks.Blocks) -> float:
  """Median ratio of the time of an iteration, in interleaved rounds."""

  @jax.jit
  def iterate(operands, b):
    method = solver.build(operands)
    return iterative.advance(method, method.init(b), 10)

  one = jax.tree.map(lambda x: x[:1], b)
  calls: list[Callable] = [
    lambda: iterate(solver.operands, b),
    lambda: iterate(solver.operands, one),
  ]
  times = [[_seconds(call) for call in calls] for _ in range(ROUNDS.value + 1)]
  size = jax.tree.leaves(b)[0].shape[0]
  return statistics.median(all_ / (size * one) for all_, one in times[1:])


def _seconds(call: Callable) -> float:
  start = time.perf_counter()
  jax.block_until_ready(call())
  return time.perf_counter() - start


def _iterations(info: iterative.Info) -> str:
  met = np.asarray(info.status) == iterative.Status.CONVERGED
  mean = float(np.mean(np.asarray(info.iterations)))
  return f"{mean:.1f}" if met.all() else f">{mean:.1f}"


def _gradients(found: blocks.Trace, task: problem.Problem, params: Any) -> Any:
  rows = jax.tree.map(lambda x: x[: QUERIES.value], dict(task.queries))
  run = jax.jit(gradients.of_measurement(found, task.measurement))
  return run(params, Batch(rows, jnp.arange(len(rows["y"])), None))[0]


if __name__ == "__main__":
  app.run(main)
