"""What EK-FAC costs on language models, in plain gradients.

    python -m experiments.benchmark_lm [--smoke]
    python -m experiments.benchmark_lm --model=small --model=FILE.gguf

For a decoder of about 10 M parameters ("small", random weights, bytes) and for
a GGUF file's (SmolLM2-135M), in interleaved rounds with the plain gradient of
the same tokens: both passes of the fit, and the scan of the corpus for 64
queries held whole and held at rank 64. Columns are those of
`experiments.benchmark_capture`, memory without the factors, the bases and the
queries themselves. Sites are the MLPs.

Goals: ratio / limit and memory at most 1.3. On two CPU cores:

                  covariances  eigenvalues  scan, whole  rank 64  memory, most
  small, 8 rows           .60          .70         1.00      .98          1.21
  small, 32 rows          .56          .68          .81      .79          1.01
  SmolLM2, 4 rows         .66          .74          .71      .71           .90

(--batch=8, --batch=32, and --model=FILE.gguf --batch=4 --queries=8).
"""

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from experiments import timing
from experiments.passes import Passes
from experiments.timing import Step
from tda import planning, segments
from tda.attribution import products
from tda.curvature import kronecker
from tda.models import config as configs
from tda.models import decoder, gguf
from tda.models.config import DecoderConfig

SMOKE = flags.DEFINE_bool("smoke", False, "Tiny sizes, two rounds.")
MODELS = flags.DEFINE_multi_string(
  "model", ["small"], '"small", or the path of a GGUF file.'
)
ROUNDS = flags.DEFINE_integer("rounds", 5, "Interleaved rounds.")
BATCH = flags.DEFINE_integer("batch", 8, "Sequences of a batch.")
LENGTH = flags.DEFINE_integer("length", 256, "Tokens of a sequence.")
QUERIES = flags.DEFINE_integer("queries", 64, "Queries of a scan.")
RANK = flags.DEFINE_integer("rank", 64, "Of the queries of the second scan.")
OUTPUT = flags.DEFINE_string("output", None, "Where to write the table: JSON.")


def load(name: str) -> tuple[DecoderConfig, dict]:
  """A model and its parameters."""
  if name != "small":
    found = gguf.load(name)
    return found.config, found.params
  sizes = {"width": 320, "layers": 8, "heads": 5, "mlp_width": 864}
  if SMOKE.value:
    sizes = {"width": 32, "layers": 2, "heads": 2, "mlp_width": 64}
  config = configs.like("llama", 257, max_length=LENGTH.value, **sizes)
  tokens = jnp.zeros(1, jnp.int32)
  init = jax.jit(decoder.Decoder(config).init)
  return config, init(jax.random.key(0), tokens)["params"]


def steps(config: DecoderConfig, params: dict) -> dict[str, Step]:
  """The plain gradient first, then what is compared with it."""
  rng = np.random.default_rng(0)
  shape = (BATCH.value, LENGTH.value)
  draw = lambda: rng.integers(0, config.vocab, shape, np.int32)
  rows = {"x": draw(), "y": draw(), "mask": np.ones(shape, np.int32)}
  of = Passes(decoder.objective(config), params, rows, decoder.SITES["mlp"])
  few, rank = QUERIES.value, RANK.value
  low = {}
  for name, block in of.found.blocks.items():
    groups, outputs, inputs = block.shape
    low[name] = segments.LowRank(
      of.noise(block, few, groups, outputs, rank),
      of.noise(block, few, groups, inputs, rank),
    )
  cost = planning.low_rank_dots(few, rank, BATCH.value)
  whole, dots = of.directions(few), planning.dots(few)
  return {
    "plain gradient": of.plain(),
    "covariances": of.captured(kronecker.MOMENTS, None, planning.moments),
    "eigenvalues": of.captured(kronecker.SQUARES, of.basis, planning.squares),
    "scan, whole": of.captured(products.DOT, whole, dots),
    f"scan, rank {rank}": of.captured(products.DOT, low, cost),
  }


def main(_) -> None:
  print(f"{jax.devices()[0].device_kind}, {jax.device_count()} device(s)")
  table = {}
  for name in dict.fromkeys(MODELS.value):
    config, params = load(name)
    size = sum(x.size for x in jax.tree.leaves(params))
    tokens = BATCH.value * LENGTH.value
    print(f"\n{name}: {size / 1e6:.1f} M parameters, {tokens} tokens a batch")
    rounds = 2 if SMOKE.value else ROUNDS.value
    many = steps(config, params)
    table[name] = timing.measure(many, rounds=rounds, compilations=1)
    timing.report(name[-18:], table[name])
    rates = ", ".join(
      f"{k} {tokens / row.seconds:,.0f}" for k, row in table[name].items()
    )
    print(f"tokens a second: {rates}")
  if OUTPUT.value:
    timing.write(OUTPUT.value, table)


if __name__ == "__main__":
  app.run(main)
