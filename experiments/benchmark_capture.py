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
from absl import app, flags, logging

from experiments import subjects, timing
from experiments.passes import Passes
from experiments.subjects import Subject
from experiments.timing import Step
from tda import gradients, planning
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
  of = Passes(given.objective, given.params, given.train, "*kernel")
  directions = of.directions(QUERIES)
  weights = {k: of.noise(x, *x.shape) for k, x in of.found.blocks.items()}
  pairs = {name: (of.basis[name], weights[name]) for name in weights}

  def materialised(params, batch, directions):
    run = gradients.of_measurement(of.found, of.objective.loss)
    grads, _ = run(params, batch)
    flat = lambda x: x.reshape(x.shape[0], -1)
    total = jnp.zeros((of.size, QUERIES))
    for name, block in of.found.blocks.items():
      queries = jnp.moveaxis(directions[name], len(block.stack), 0)
      total += flat(grads[name]) @ flat(queries).T
    return total

  dots = planning.dots(QUERIES)
  return {
    "plain gradient": of.plain(),
    "covariances": of.captured(kronecker.MOMENTS, None, planning.moments),
    "eigenvalues": of.captured(kronecker.SQUARES, of.basis, planning.squares),
    "scores of 16": of.captured(products.DOT, directions, dots),
    "self-influence": of.captured(products.SELF, pairs, planning.squares),
    "vmap(grad), 16": Step(
      materialised, (of.params, of.batch, directions), None
    ),
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
