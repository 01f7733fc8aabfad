"""EK-FAC scores and times beside its peers': same weights, data and layers.

    pip install "tda-jax[peers]"
    python -m experiments.compare_peers [--smoke]
    python -m experiments.compare_peers --model=decoder --width=320 --layers=8 \
      --length=256 --sequences=64 --batches=256 --rounds=1  # 10 M

kronfluence is compared on all models, bergson on the decoder. Empirical and,
with kronfluence, sampled Fisher, damping 0.1 of each layer's mean eigenvalue,
on scikit-learn's digits (an MLP and a CNN) and on the source text of Python's
standard library as bytes (a decoder, all linear layers). For the sampled
Fisher, the labels that kronfluence drew are given to this library as data
labels. All run warm, in turns, each at the fastest of `--batches`; the median
of `--rounds` is printed, and this library's compilation (first run minus a warm
one) apart. The plain gradient is each framework's own, at the same batches.

Scores here are divided by the number of training examples, the peers' are not;
the sign is the same: positive if leaving the example out raises the loss.

Goals: correlation of .9999; on the MLP and the CNN a third of kronfluence's
time; on the decoder ratios to a plain gradient no larger than the better
peer's. At 10 M parameters, as above with --nosampled, the whole takes 5.0 plain
gradients here, 6.7 with kronfluence and 6.8 with bergson, and every stage fewer
than with either; scores correlate by .9999998 and .9999973. XLA's gradient
takes 1.7 times as long as torch's on a CPU: 40, 30 and 33 seconds on two cores.
"""

import functools
import gc
import importlib
import statistics
import tempfile
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import app, flags, logging

from experiments import subjects, timing
from experiments.ekfac_stages import STAGES, Stages
from experiments.subjects import Subject
from tda.evaluation import pbrf
from tda.models import layouts
from tda.models.config import DecoderConfig

NAMES = ["mlp", "cnn", "decoder"]
PEERS = ["kronfluence", "bergson"]
SMOKE = flags.DEFINE_bool("smoke", False, "Tiny sizes, one round.")
MODELS = flags.DEFINE_multi_enum("model", NAMES, NAMES, "Which to compare.")
CHOSEN = flags.DEFINE_multi_enum("peer", PEERS, PEERS, "Beside which to run.")
SAMPLED = flags.DEFINE_bool("sampled", True, "Compare sampled labels too.")
ROUNDS = flags.DEFINE_integer("rounds", 3, "Timed rounds of each library.")
BATCHES = flags.DEFINE_multi_integer(
  "batches", [128, 512, 1437], "Batch sizes tried on digits; sequences: / 32."
)
LAYERS = flags.DEFINE_integer("layers", 4, "Blocks of the decoder.")
WIDTH = flags.DEFINE_integer("width", 192, "Width of the decoder.")
LENGTH = flags.DEFINE_integer("length", 128, "Tokens of a sequence.")
SEQUENCES = flags.DEFINE_integer("sequences", 256, "Training sequences.")
SCANNED = flags.DEFINE_bool("scanned", False, "Scan over the layers.")


class Library(NamedTuple):
  run: Callable[[], tuple[np.ndarray, dict[str, float]]]  # scores, seconds
  gradient: Callable[[], float]  # seconds of a plain one
  batch: int


def case(name: str) -> tuple[Subject, list[int]]:
  """What is compared, and the batch sizes that are tried."""
  if name == "decoder":
    width, layers, length = WIDTH.value, LAYERS.value, LENGTH.value
    examples, queries = SEQUENCES.value, 16
    if SMOKE.value:
      width, layers, length, examples, queries = 16, 1, 16, 8, 3
    subject = subjects.decoder(
      DecoderConfig(
        256, width, layers, max_length=length, scan_layers=SCANNED.value
      ),
      examples,
      queries,
    )
    batches = [max(1, batch // 32) for batch in BATCHES.value]
  else:
    sizes = (64, 5) if SMOKE.value else (1437, 100)
    subject, batches = subjects.classifier(name, *sizes), BATCHES.value
  batches = sorted({min(b, len(subject.train["y"])) for b in batches})
  return subject, batches[-1:] if SMOKE.value else batches


def compare(name: str, peers: Mapping[str, Any], folder: str) -> None:
  """Prints what agrees and what it takes."""
  subject, batches = case(name)
  peers = {key: peer for key, peer in peers.items() if name in peer.MODELS}
  weights = subject.params
  if "blocks" in weights:
    weights = layouts.unstack(weights)
  weights = jax.tree.map(np.asarray, weights)

  def theirs(peer, batch, **options):
    model = peer.MODELS[name](weights)
    return peer.Peer(model, subject, folder, batch=batch, **options)

  def library(peer):
    best, _ = fastest(functools.partial(theirs, peer), batches)
    plain = peer.torch_models.MODELS[name](weights)
    gradient = functools.partial(
      peer.torch_models.gradient_seconds, plain, subject.train, best.batch
    )
    return Library(best.run, gradient, best.batch)

  gc.collect()
  gc.freeze()  # or the peers' garbage collection would walk this library too
  ours, first = fastest(lambda b: Stages(subject, b), batches)
  libraries = {"tda": Library(ours.run, ours.gradient_seconds, ours.batch)}
  libraries.update({key: library(peer) for key, peer in peers.items()})
  for each in libraries.values():
    each.gradient()  # warm
  runs: dict[str, list] = {key: [] for key in libraries}
  scores = {}
  for _ in range(1 if SMOKE.value else ROUNDS.value):
    for key, each in libraries.items():
      scores[key], seconds = each.run()
      runs[key].append({**seconds, "gradient": each.gradient()})
  count = sum(leaf.size for leaf in jax.tree.leaves(subject.params))
  print(f"\n{name} of {count:,} parameters, batches of", end=" ")
  print(", ".join(f"{each.batch} ({k})" for k, each in libraries.items()))
  for key in peers:
    agreement(f"{key}, empirical", scores["tda"], scores[key])
  if "kronfluence" in peers and SAMPLED.value:
    batch = libraries["kronfluence"].batch
    drawn = theirs(peers["kronfluence"], batch, sampled=True)
    reference, _ = drawn.run()
    labels = drawn.sampled
    agreement("kronfluence, sampled", ours.run(labels)[0], reference)
  times = {key: medians(each) for key, each in runs.items()}
  print(f"  compilation {first - times['tda']['total']:.2f} s")
  report(times)


def fastest(make: Callable, batches: list[int]) -> tuple[Any, float]:
  """The candidate with the smallest warm total, and its first total."""
  candidates = [make(batch) for batch in batches]
  total = lambda candidate: sum(candidate.run()[1].values())
  best, first = timing.fastest(
    [functools.partial(total, candidate) for candidate in candidates]
  )
  return candidates[best], first


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
  """Of each stage, and of the stages' total."""
  seconds = {k: statistics.median(run[k] for run in runs) for k in runs[0]}
  totals = [sum(run[stage] for stage in STAGES) for run in runs]
  return {**seconds, "total": statistics.median(totals)}


def agreement(which: str, scores: np.ndarray, reference: np.ndarray) -> None:
  """Correlation of all scores; of their ranks by query, the mean."""
  pearson = np.corrcoef(scores.ravel(), reference.ravel())[0, 1]
  error = np.linalg.norm(scores - reference) / np.linalg.norm(reference)
  spearman = pbrf.correlations(scores, reference)["spearman"].mean()
  print(
    f"  {which:22} correlation {pearson:.7f}, of ranks {spearman:.5f},"
    f" error {error:.1e}"
  )


def report(times: Mapping[str, dict[str, float]]) -> None:
  """Seconds, and each library's relative to its own plain gradient."""
  print("  seconds (/gradient)" + "".join(f"{key:>20}" for key in times))
  for stage in ("gradient", *STAGES, "total"):
    cells = (
      f"{seconds[stage]:11.3f} ({seconds[stage] / seconds['gradient']:6.2f})"
      for seconds in times.values()
    )
    print(f"  {stage:19}" + "".join(cells))


def imported(peer: str) -> Any:
  try:
    return importlib.import_module(f"experiments.{peer}_peer")
  except ImportError as error:
    raise SystemExit(
      f"{error}. The comparison needs {peer} and torch: "
      'pip install "tda-jax[peers]", or choose another --peer'
    ) from error


def main(_) -> None:
  peers = {peer: imported(peer) for peer in dict.fromkeys(CHOSEN.value)}
  warnings.filterwarnings("ignore", category=FutureWarning, module="kronf")
  logging.info("%d devices: %s", jax.device_count(), jax.devices()[0])
  for name in dict.fromkeys(MODELS.value):
    with tempfile.TemporaryDirectory() as folder:
      compare(name, peers, folder)


if __name__ == "__main__":
  app.run(main)
