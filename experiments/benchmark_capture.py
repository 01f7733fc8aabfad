"""Time and memory of the passes against a plain gradient of the same batch.

    python -m experiments.benchmark_capture [--smoke]

For a digits-size MLP, a small CNN and a decoder of 5 M parameters (linear
sites, 256 tokens, scanned and unrolled), every pass over the data is compared
with the plain gradient of the summed loss in interleaved rounds:

  limit     operations of the pass / of the plain gradient (tda.planning)
  ratio     time of the pass / of the plain gradient, median over rounds
  memory    temporary bytes of the pass / of the plain gradient
  compile   tracing and compilation, relative to the plain gradient's

Goals: ratio / limit and memory of captured passes at most 1.3 and 1.5, scores
faster than `vmap(grad)` followed by the product, and compilation of the
decoder's scoring step at most 2.
"""

import json
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from tda import blocks, gradients, likelihoods, planning, streams
from tda.attribution import influence
from tda.curvature import kronecker
from tda.likelihoods import Objective
from tda.models.cnn import CNN
from tda.models.decoder import Decoder
from tda.models.mlp import MLP

SMOKE = flags.DEFINE_bool("smoke", False, "Tiny sizes, two rounds.")
MODELS = flags.DEFINE_multi_enum(
  "model",
  ["mlp", "cnn", "decoder_scanned", "decoder_unrolled"],
  ["mlp", "cnn", "decoder_scanned", "decoder_unrolled"],
  "Which models to measure.",
)
ROUNDS = flags.DEFINE_integer("rounds", 7, "Interleaved rounds.")
BATCH = flags.DEFINE_integer("decoder_batch", 8, "Sequences of a batch.")
UNROLL = flags.DEFINE_integer(
  "scan_unroll", 1, "Layers per iteration of the scanned decoder's loop."
)
OUTPUT = flags.DEFINE_string("output", None, "Where to write the table: JSON.")

QUERIES = 16
CALL_SECONDS = 0.1  # a round calls fast functions until this much has passed


class Setting(NamedTuple):
  objective: Objective
  params: Any
  rows: dict[str, jax.Array]
  select: str | None  # blocks


class Step(NamedTuple):
  run: Callable[..., Any]
  args: tuple[Any, ...]
  limit: float | None  # operations relative to a plain gradient's


class Measured(NamedTuple):
  seconds: float
  limit: float | None
  ratio: float
  memory: float
  compilation: float


def setting(name: str) -> Setting:
  key, rng = jax.random.key(0), np.random.default_rng(0)
  if name in ("mlp", "cnn"):
    module = MLP() if name == "mlp" else CNN()
    shape = (64,) if name == "mlp" else (8, 8, 1)
    n = 32 if SMOKE.value else 1437 if name == "mlp" else 512
    rows = {"x": rng.normal(size=(n, *shape)), "y": rng.integers(0, 10, n)}
    likelihood, target = likelihoods.categorical(), lambda ex: ex["y"]
  else:
    size = {"width": 32, "layers": 2} if SMOKE.value else {}
    length, n = (32, 2) if SMOKE.value else (256, BATCH.value)
    scanned = name == "decoder_scanned"
    module = Decoder(
      256,
      max_length=length,
      scan_layers=scanned,
      scan_unroll=UNROLL.value,
      **size,
    )
    rows = {key: rng.integers(0, 256, (n, length)) for key in "xy"}
    likelihood = likelihoods.token_categorical()
    target = lambda ex: (ex["y"], jnp.ones_like(ex["y"]))
  rows = {
    k: jnp.asarray(x, jnp.float32 if x.dtype == np.float64 else jnp.int32)
    for k, x in rows.items()
  }
  params = module.init(key, rows["x"][0])["params"]
  apply = lambda params, ex: module.apply({"params": params}, ex["x"])
  objective = Objective(apply, likelihood, target)
  select = "*kernel" if name.startswith("decoder") else None
  return Setting(objective, params, rows, select)


def steps(given: Setting) -> dict[str, Step]:
  """The plain gradient first, then what is compared with it."""
  objective, params, rows, select = given
  found = blocks.trace(
    objective.outputs, params, streams.example(rows), select=select
  )
  size = len(rows["x"])
  batch = streams.Batch(rows, jnp.arange(size), None)
  rng = np.random.default_rng(1)

  def noise(block, *shape):
    values = rng.normal(size=(*block.stack, *shape)) / np.sqrt(shape[-1])
    return jnp.asarray(values, jnp.float32)

  basis, weights, directions = {}, {}, {}
  for name, block in found.blocks.items():
    groups, outputs, inputs = block.shape
    basis[name] = kronecker.Basis(
      noise(block, groups, inputs, inputs),
      noise(block, groups, outputs, outputs),
    )
    weights[name] = noise(block, *block.shape)
    directions[name] = noise(block, QUERIES, *block.shape)
  pairs = {name: (basis[name], weights[name]) for name in weights}

  def plain(params, batch):
    total = lambda p: jax.vmap(objective.loss, (None, 0))(p, batch.rows).sum()
    return jax.grad(total)(params)

  def captured(statistic, operands, cost):
    def run(params, batch, operands):
      # Traced here, since that is part of a step's tracing time.
      found = blocks.trace(
        objective.outputs, params, streams.example(batch.rows), select=select
      )
      one_pass = gradients.backward_pass(found, objective, statistic)
      return one_pass(params, batch, operands)[0]

    return Step(run, (params, batch, operands), planning.limit(found, cost))

  def materialised(params, batch, directions):
    grads, _ = gradients.of_measurement(found, objective.loss)(params, batch)
    flat = lambda x: x.reshape(x.shape[0], -1)
    total = jnp.zeros((size, QUERIES))
    for name, block in found.blocks.items():
      queries = jnp.moveaxis(directions[name], len(block.stack), 0)
      total += flat(grads[name]) @ flat(queries).T
    return total

  return {
    "plain gradient": Step(plain, (params, batch), None),
    "covariances": captured(kronecker.MOMENTS, None, planning.moments),
    "eigenvalues": captured(kronecker.SQUARES, basis, planning.squares),
    "scores of 16": captured(
      influence.DOT, directions, planning.dots(QUERIES)
    ),
    "self-influence": captured(influence.SELF, pairs, planning.squares),
    "vmap(grad), 16": Step(materialised, (params, batch, directions), None),
  }


def measure(given: Setting) -> dict[str, Measured]:
  """Every step, relative to the first."""
  rounds = 2 if SMOKE.value else ROUNDS.value
  many = steps(given)
  compilation: dict[str, list[float]] = {name: [] for name in many}
  compiled = {}
  for _ in range(1 if SMOKE.value else 2):
    for name, step in many.items():
      jax.clear_caches()
      start = time.perf_counter()
      compiled[name] = jax.jit(step.run).lower(*step.args).compile()
      compilation[name].append(time.perf_counter() - start)
  calls = {}
  for name, step in many.items():  # warms up
    jax.block_until_ready(compiled[name](*step.args))
    once = _seconds(compiled[name], step.args, 1)
    calls[name] = max(1, int(CALL_SECONDS / once))
  taken = np.asarray(
    [
      [_seconds(compiled[k], step.args, calls[k]) for k, step in many.items()]
      for _ in range(rounds)
    ]
  )
  memory = [
    compiled[name].memory_analysis().temp_size_in_bytes for name in many
  ]
  compiling = [min(compilation[name]) for name in many]
  return {
    name: Measured(
      float(np.median(taken[:, i])),
      step.limit,
      float(np.median(taken[:, i] / taken[:, 0])),
      memory[i] / memory[0],
      compiling[i] / compiling[0],
    )
    for i, (name, step) in enumerate(many.items())
  }


def _seconds(run: Callable, args: tuple[Any, ...], calls: int) -> float:
  start = time.perf_counter()
  for _ in range(calls):
    result = run(*args)
  jax.block_until_ready(result)
  return (time.perf_counter() - start) / calls


def report(model: str, measured: dict[str, Measured]) -> None:
  print(f"\n{model:18} seconds   limit   ratio  ratio/limit  memory  compile")
  for name, row in measured.items():
    limit = f"{row.limit:7.2f}" if row.limit else " " * 7
    excess = f"{row.ratio / row.limit:11.2f}" if row.limit else " " * 11
    print(
      f"{name:16} {row.seconds:9.4f} {limit} {row.ratio:7.2f} {excess}"
      f" {row.memory:8.2f} {row.compilation:8.2f}"
    )


def main(_) -> None:
  logging.info("%d devices: %s", jax.device_count(), jax.devices()[0])
  table = {}
  for model in dict.fromkeys(MODELS.value):
    table[model] = measure(setting(model))
    report(model, table[model])
  if OUTPUT.value:
    rows = jax.tree.map(
      Measured._asdict, table, is_leaf=lambda x: isinstance(x, Measured)
    )
    with open(OUTPUT.value, "w") as file:
      json.dump(rows, file, indent=2)


if __name__ == "__main__":
  app.run(main)
