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

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from experiments import subjects, timing
from experiments.subjects import Subject
from experiments.timing import Step
from tda import blocks, gradients, planning, streams
from tda.attribution import products
from tda.curvature import kronecker
from tda.models.config import DecoderConfig

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


def subject(name: str) -> Subject:
  if not name.startswith("decoder"):
    examples = 32 if SMOKE.value else 1437 if name == "mlp" else 512
    return subjects.classifier(name, examples, 1)
  width, layers, length, examples = 256, 6, 256, BATCH.value
  if SMOKE.value:
    width, layers, length, examples = 32, 2, 32, 2
  config = DecoderConfig(
    256,
    width,
    layers,
    max_length=length,
    scan_layers=name == "decoder_scanned",
    scan_unroll=UNROLL.value,
  )
  return subjects.decoder(config, examples, 1)


def steps(given: Subject) -> dict[str, Step]:
  """The plain gradient first, then what is compared with it."""
  objective, params = given.objective, given.params
  rows = jax.tree.map(jnp.asarray, given.train)
  size = len(rows["x"])
  batch = streams.Batch(rows, jnp.arange(size), None)
  trace = lambda: blocks.trace(
    objective.outputs, params, streams.example(rows), select="*kernel"
  )
  found = trace()
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
      one_pass = gradients.backward_pass(trace(), objective, statistic)
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
    "scores of 16": captured(products.DOT, directions, planning.dots(QUERIES)),
    "self-influence": captured(products.SELF, pairs, planning.squares),
    "vmap(grad), 16": Step(materialised, (params, batch, directions), None),
  }


def main(_) -> None:
  logging.info("%d devices: %s", jax.device_count(), jax.devices()[0])
  table = {}
  for model in dict.fromkeys(MODELS.value):
    table[model] = timing.measure(
      steps(subject(model)),
      rounds=2 if SMOKE.value else ROUNDS.value,
      compilations=1 if SMOKE.value else 2,
    )
    timing.report(model, table[model])
  if OUTPUT.value:
    timing.write(OUTPUT.value, table)


if __name__ == "__main__":
  app.run(main)
