"""EK-FAC scores and times beside kronfluence's: same weights, data and layers.

    pip install "tda-jax[peers]"
    python -m experiments.compare_kronfluence [--smoke]

Empirical and sampled Fisher, damping 0.1 of each layer's mean eigenvalue, on
scikit-learn's digits (an MLP and a CNN) and on the source text of Python's
standard library as bytes (a decoder, all linear layers). For the sampled
Fisher, the labels that kronfluence drew are given to this library as data
labels. Both run warm, in turns, at the fastest of `--batches`; the median of
`--rounds` is printed, and this library's compilation (first run minus a warm
one) apart. The plain gradient is each framework's own, at the same batches.

Scores here are divided by the number of training examples, kronfluence's are
not; the sign is the same: positive if leaving the example out raises the loss.

Goals: correlation of .9999; on the MLP and the CNN a third of kronfluence's
time; on the decoder ratios to a plain gradient no larger than kronfluence's.
"""

import gc
import pathlib
import statistics
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from tda import blocks, gradients, likelihoods, streams
from tda.attribution import influence
from tda.curvature import kronecker
from tda.inverse import spectral
from tda.likelihoods import Objective
from tda.models.cnn import CNN
from tda.models.decoder import Decoder
from tda.models.mlp import MLP
from tda.streams import Fold, Loop

NAMES = ["mlp", "cnn", "decoder"]
SMOKE = flags.DEFINE_bool("smoke", False, "Tiny sizes, one round.")
MODELS = flags.DEFINE_multi_enum("model", NAMES, NAMES, "Which to compare.")
ROUNDS = flags.DEFINE_integer("rounds", 3, "Timed rounds of each library.")
BATCHES = flags.DEFINE_multi_integer(
  "batches", [128, 512, 1437], "Batch sizes tried on digits; sequences: / 32."
)
LAYERS = flags.DEFINE_integer("layers", 4, "Blocks of the decoder.")
WIDTH = flags.DEFINE_integer("width", 256, "Width of the decoder.")
LENGTH = flags.DEFINE_integer("length", 128, "Tokens of a sequence.")
SEQUENCES = flags.DEFINE_integer("sequences", 96, "Training sequences.")

HEADS = 4
STAGES = ("covariances", "eigenbasis", "eigenvalues", "scores")


class Case(NamedTuple):
  objective: Objective
  params: Any
  train: dict[str, np.ndarray]
  queries: dict[str, np.ndarray]
  batches: list[int]
  torch_model: Callable[[], Any]


def case(name: str, peer: Any) -> Case:
  if name == "decoder":
    train, queries = _text()
    size = (16, 1) if SMOKE.value else (WIDTH.value, LAYERS.value)
    length = train["x"].shape[1]
    module = Decoder(
      256, *size, heads=HEADS, max_length=length, scan_layers=False
    )
    make = lambda params: peer.Decoder(params, HEADS)
    likelihood = likelihoods.token_categorical()
    target = lambda ex: (ex["y"], jnp.ones_like(ex["y"]))
    batches = [max(1, batch // 32) for batch in BATCHES.value]
  else:
    train, queries = _digits((64,) if name == "mlp" else (8, 8, 1))
    module = MLP() if name == "mlp" else CNN(downsampling="average")
    make = peer.MLP if name == "mlp" else peer.CNN
    likelihood, target = likelihoods.categorical(), lambda ex: ex["y"]
    batches = BATCHES.value
  params = module.init(jax.random.key(0), train["x"][0])["params"]
  apply = lambda params, ex: module.apply({"params": params}, ex["x"])
  host = jax.tree.map(np.asarray, params)
  batches = sorted({min(b, len(train["y"])) for b in batches})
  return Case(
    Objective(apply, likelihood, target),
    params,
    train,
    queries,
    batches[-1:] if SMOKE.value else batches,
    lambda: make(host),
  )


def _digits(shape: tuple[int, ...]) -> tuple[dict, dict]:
  from sklearn.datasets import load_digits

  x, y = load_digits(return_X_y=True)
  order = np.random.default_rng(0).permutation(len(x))
  x = (x[order] / 16).reshape(-1, *shape).astype(np.float32)
  rows = {"x": x, "y": y[order].astype(np.int32)}
  n, queries = (64, 5) if SMOKE.value else (1437, 100)
  cut = lambda a, b: {k: v[a:b] for k, v in rows.items()}
  return cut(0, n), cut(n, n + queries)


def _text() -> tuple[dict, dict]:
  """Sequences of bytes, each with the next bytes as labels."""
  folder = pathlib.Path(sysconfig.get_path("stdlib"))
  n, queries, length = SEQUENCES.value, 16, LENGTH.value
  if SMOKE.value:
    n, queries, length = 8, 3, 16
  text, need = b"", (n + queries) * (length + 1)
  for path in sorted(folder.glob("*.py")):
    text += path.read_bytes()
    if len(text) >= need:
      break
  tokens = np.frombuffer(text[:need], np.uint8).astype(np.int32)
  tokens = tokens.reshape(n + queries, length + 1)
  tokens = tokens[np.random.default_rng(0).permutation(len(tokens))]
  rows = {"x": tokens[:, :-1], "y": tokens[:, 1:]}
  cut = lambda a, b: {k: v[a:b] for k, v in rows.items()}
  return cut(0, n), cut(n, n + queries)


class Ours:
  """This library's stages on one case, each timed."""

  def __init__(self, given: Case, batch: int):
    objective = given.objective
    self.given, self.loop = given, Loop(batch)
    self.found = blocks.trace(
      objective.outputs,
      given.params,
      streams.example(given.train),
      select="*kernel",
    )
    one_pass = lambda statistic: gradients.total(
      self.found, gradients.backward_pass(self.found, objective, statistic)
    )
    self.moments = one_pass(kronecker.MOMENTS)
    self.squares = one_pass(kronecker.SQUARES)
    self.scorer = influence.scorer(self.found, objective, query_batch=128)
    self.plain = _plain_gradient(objective)

  def run(self, labels: np.ndarray | None = None) -> tuple[Any, dict]:
    """Scores [N, Q] without the factor 1/N, and seconds by stage."""
    params, train, queries = self.given[1:4]
    fitted = train if labels is None else {**train, "y": labels}
    marks = [time.perf_counter()]
    mark = lambda: marks.append(time.perf_counter())
    args = (params, None, None)
    moments, _ = streams.fold(self.moments, args, fitted, self.loop)
    jax.block_until_ready(moments)
    mark()
    basis, _ = kronecker.eigenbasis(moments)
    jax.block_until_ready(basis)
    mark()
    args = (params, basis, None)
    sums, count = streams.fold(self.squares, args, fitted, self.loop)
    values = {k: v / count for k, v in sums.items()}
    jax.block_until_ready(values)
    mark()
    curvature = kronecker.Curvature(
      basis, values, "ekfac", gradients.EMPIRICAL, int(count)
    )
    response = spectral.inverse(curvature, spectral.relative(0.1))
    scores = self.scorer(
      params, train, queries, {"ekfac": response}, loop=self.loop
    )["ekfac"]
    mark()
    return scores.values * scores.normaliser, dict(
      zip(STAGES, np.diff(marks).tolist(), strict=True)
    )

  def gradient_seconds(self) -> float:
    start = time.perf_counter()
    params, train = self.given.params, self.given.train
    jax.block_until_ready(streams.fold(self.plain, params, train, self.loop))
    return time.perf_counter() - start


def _plain_gradient(objective: Objective) -> Fold:
  """The summed loss's gradient of all parameters over a dataset."""

  def update(state, params, batch):
    def summed(params):
      losses = jax.vmap(objective.loss, (None, 0))(params, batch.rows)
      kept = losses if batch.lanes is None else losses * batch.lanes
      return kept.sum(), losses

    grads, losses = jax.grad(summed, has_aux=True)(params)
    return jax.tree.map(jnp.add, state, grads), jnp.isfinite(losses)

  zeros = lambda params: jax.tree.map(jnp.zeros_like, params)
  return Fold(zeros, update, lambda state: state)


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
  seconds = {k: statistics.median(r[k] for r in runs) for k in STAGES}
  return {**seconds, "total": statistics.median(sum(r.values()) for r in runs)}


def compare(name: str, given: Case, peer: Any, folder: str) -> None:
  """Prints what agrees and what it takes."""
  rounds = 1 if SMOKE.value else ROUNDS.value

  def theirs(batch, sampled=False):
    return peer.Peer(
      given.torch_model(),
      given.train,
      given.queries,
      folder=folder,
      batch=batch,
      sampled=sampled,
    )

  def fastest(make):
    """The candidate with the smallest warm total, and its first total."""
    best = None
    for batch in given.batches:
      candidate = make(batch)
      first, warm = (sum(candidate.run()[1].values()) for _ in range(2))
      if best is None or warm < best[0]:
        best = warm, first, batch, candidate
    return best

  gc.collect()
  gc.freeze()  # or the peer's garbage collection would walk this library too
  warm, first, batch, ours = fastest(lambda batch: Ours(given, batch))
  _, _, torch_batch, other = fastest(theirs)
  plain = given.torch_model()
  runs, other_runs, steps, torch_steps = [], [], [], []
  ours.gradient_seconds()
  peer.gradient_seconds(plain, given.train, torch_batch)
  for _ in range(rounds):
    scores, seconds = ours.run()
    runs.append(seconds)
    steps.append(ours.gradient_seconds())
    reference, seconds = other.run()
    other_runs.append(seconds)
    torch_steps.append(
      peer.gradient_seconds(plain, given.train, torch_batch)
    )
  print(f"\n{name}: batches of {batch}, kronfluence {torch_batch}")
  report("empirical", scores, reference)
  drawn = theirs(torch_batch, sampled=True)
  reference, _ = drawn.run()
  report("sampled", ours.run(drawn.sampled)[0], reference)
  print(f"  compilation {first - warm:.2f} s")
  step, torch_step = statistics.median(steps), statistics.median(torch_steps)
  print(f"  {'seconds':14} tda  /grad  kronfluence  /grad   tda/kronfluence")
  print(f"  {'gradient':12} {step:7.3f} {torch_step:17.3f}")
  mine, their = medians(runs), medians(other_runs)
  for stage in (*STAGES, "total"):
    print(
      f"  {stage:12} {mine[stage]:7.3f} {mine[stage] / step:6.2f}"
      f" {their[stage]:10.3f} {their[stage] / torch_step:8.2f}"
      f" {mine[stage] / their[stage]:12.3f}"
    )


def report(labels: str, scores: np.ndarray, reference: np.ndarray) -> None:
  correlation = np.corrcoef(scores.ravel(), reference.ravel())[0, 1]
  error = np.linalg.norm(scores - reference) / np.linalg.norm(reference)
  print(f"  {labels:10} correlation {correlation:.7f}, error {error:.1e}")


def main(_) -> None:
  try:
    from experiments import kronfluence_peer as peer
  except ImportError as error:
    raise SystemExit(
      f'{error}. The comparison needs kronfluence and torch: '
      'pip install "tda-jax[peers]"'
    ) from error
  warnings.filterwarnings("ignore", category=FutureWarning, module="kronf")
  logging.info("%d devices: %s", jax.device_count(), jax.devices()[0])
  for name in dict.fromkeys(MODELS.value):
    with tempfile.TemporaryDirectory() as folder:
      compare(name, case(name, peer), peer, folder)


if __name__ == "__main__":
  app.run(main)
