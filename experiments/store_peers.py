"""The gradient stores of bergson and LogIX beside this one: part "peers" of
`benchmark_store`.

Same weights (a decoder of 10 M parameters without biases), same rows of text,
same layers and number of directions, float32 on disk, which is their default;
this library also in bfloat16, which is its own. Of each, all warm and in turns,
at the fastest of some batches:

    build   gradients of all rows to disk
    search  the first 100 rows of a store of 256 MiB, of the same random numbers
            for all, by dot product with queries whose gradients are there;
            "cold" with the system's cache of files dropped, nan where the user
            may not
    query   gradients of queries, and the search

The plain gradient is that of each framework, at the batch that is best for its
builds. A search here reads blocks, checks what it reads and finds both ends of
the ranking; bergson maps the whole store into memory, and neither peer checks
it.

Goals: builds 1.5 times as fast as the faster peer's, and searches and queries
as fast. On two CPU cores, with the environment that the README has for them,
builds are .96 times as fast, queries .89, searches .54 and cold ones 1.12. A
build takes .46 of a plain gradient here and .80 in the peers, but torch's
gradient takes .56 of the time of XLA's. A search takes .12 s, as it checks what
it reads, .07 s in bergson and 1.22 s in LogIX; in bfloat16 .07 s here.
"""

import contextlib
import functools
import gc
import importlib
import importlib.util
import io
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments import own_store, store_retrieval, subjects, timing
from experiments.own_store import Given
from tda.data.packing import Rows
from tda.models.config import DecoderConfig
from tda.report import tables

MODULES = ("torch", "bergson", "logix", "einops")
INSTALL = """
    pip install "tda-jax[peers]"
    pip install --no-deps --ignore-requires-python logix-ai einops
(logix-ai says that it is for Python below 3.11, and works with this one)"""
BATCHES = (2, 8, 16)
STORE = 2**28  # bytes, in float32
FIRST = 100  # rows that a search finds
STAGES = ("gradient", "build", "search", "cold", "query")


class Setting(NamedTuple):
  """What is compared; see the flags of `benchmark_store`."""

  dimension: int
  sites: str
  rounds: int
  length: int
  sequences: int
  queries: int
  smoke: bool


def missing() -> list[str]:
  """What the comparison needs that is not installed."""
  return [x for x in MODULES if importlib.util.find_spec(x) is None]


def check(setting: Setting) -> None:
  """Refuses what cannot be compared.

  Raises:
    ValueError: a peer that is not installed, sites that they do not have, or
      too many directions.
  """
  if lacking := missing():
    raise ValueError(f"--part=peers needs {', '.join(lacking)}:{INSTALL}")
  if setting.sites not in own_store.KEYWORDS:
    raise ValueError(
      f"sites={setting.sites!r}: all libraries store gradients of"
      f" {list(own_store.KEYWORDS)} alone"
    )
  decoder_config(setting)


def measure(setting: Setting, folder: Path) -> dict[str, Any]:
  """Prints costs and retrieval, and returns them.

  Raises:
    ValueError: as `check` does, before anything is measured.
  """
  check(setting)
  peers = {
    name: importlib.import_module(f"experiments.{name}_store").Side
    for name in ("bergson", "logix")
  }
  gc.collect()
  gc.freeze()  # or the peers' garbage collection would walk this library too
  costs = compared(setting, peers, folder / "costs")
  with quiet():
    found = store_retrieval.compared(
      peers, folder / "facts", setting.dimension, smoke=setting.smoke
    )
  print(store_retrieval.table(found))
  return {"costs": costs, "retrieval": [x._asdict() for x in found]}


def compared(
  setting: Setting, peers: Mapping[str, Any], folder: Path
) -> dict[str, dict[str, float]]:
  """Figures by library, and how many times as fast as the peers this one is."""
  given, rows, queries = subject(setting)
  sides, first = chosen(setting, peers, given, rows, folder)
  columns = sides["tda"].columns
  size = STORE // 2**10 if setting.smoke else STORE
  rng = np.random.default_rng(0)
  draw = lambda n: rng.standard_normal((n, columns), np.float32)
  values = draw(max(FIRST, size // (4 * columns)))
  wanted = draw(setting.queries)
  runs: dict[tuple[str, str], Callable[[], Any]] = {}
  firsts = {}
  with quiet():
    for name, side in sides.items():
      side.fill(values)
      firsts[name] = side.search("filled", wanted, FIRST)[1]
      runs |= {(name, k): x for k, x in stages(side, wanted, queries).items()}
      if name in peers:
        runs[name, "gradient"] = plain(given, rows, side.batch)
    runs["tda", "gradient"] = sides["tda"].gradient
    seconds = timing.interleaved(setting.rounds, runs)
    cold = {(name, "cold"): runs[name, "search"] for name in sides}
    if timing.dropped():
      seconds |= timing.interleaved(setting.rounds, cold, timing.dropped)
    else:
      seconds |= dict.fromkeys(cold, math.nan)
  seconds["tda bfloat16", "gradient"] = seconds["tda", "gradient"]
  found: dict[str, dict[str, float]] = {}
  for name, side in sides.items():
    times = {stage: seconds[name, stage] for stage in STAGES}
    found[name] = {
      "batch": side.batch,
      **times,
      "build/gradient": times["build"] / times["gradient"],
      "tokens a second": rows["x"].size / times["build"],
      "same first rows": overlap(firsts[name], firsts["tda"]),
    }
  parameters = sum(x.size for x in jax.tree.leaves(given.params))
  print(
    f"\npeers: {parameters:,} parameters, {rows['x'].size} tokens,"
    f" {setting.sites} sites, {setting.dimension} directions of each side;"
    f" {len(wanted)} queries of {len(values)} rows of {columns} numbers"
  )
  report(found)
  print(f"compilation {first - found['tda']['build']:.1f} s")
  ratios = {
    stage: min(found[peer][stage] for peer in peers) / found["tda"][stage]
    for stage in STAGES
  }
  said = ", ".join(f"{stage} {x:.2f}" for stage, x in ratios.items())
  print(f"times as fast as the faster peer: {said}\n")
  return {**found, "times as fast": ratios}


def report(found: Mapping[str, Mapping[str, float]]) -> None:
  """Prints seconds and what follows from them by library."""
  names = list(found["tda"])
  digits = dict.fromkeys(names, ".3f") | {"batch": ".0f"}
  digits |= {"build/gradient": ".2f", "tokens a second": ",.0f"}
  body = [
    [library, *(f"{figures[name]:{digits[name]}}" for name in names)]
    for library, figures in found.items()
  ]
  header = ["seconds", *names]
  print(tables.aligned(header, body, [False] + [True] * len(names)))


def stages(
  side: Any, wanted: np.ndarray, queries: Rows
) -> dict[str, Callable[[], Any]]:
  """What is timed of one library."""
  search = lambda asked: side.search("filled", asked, FIRST)
  return {
    "build": side.build,
    "search": lambda: search(wanted),
    "query": lambda: search(side.ask(queries)),
  }


def decoder_config(setting: Setting) -> DecoderConfig:
  sizes = {"width": 320, "layers": 8, "max_length": setting.length}
  if setting.smoke:
    sizes = {"width": 32, "layers": 2, "max_length": 32}
  return own_store.config(256, setting.dimension, **sizes)


def subject(setting: Setting) -> tuple[Given, Rows, Rows]:
  """A decoder at its first weights, and rows of text."""
  config = decoder_config(setting)
  found = subjects.decoder(config, setting.sequences, setting.queries)
  masked = lambda rows: {**rows, "mask": np.ones_like(rows["x"])}
  given = Given(config, found.params, setting.sites, setting.dimension)
  return given, masked(found.train), masked(found.queries)


def chosen(
  setting: Setting,
  peers: Mapping[str, Any],
  given: Given,
  rows: Rows,
  folder: Path,
) -> tuple[dict[str, Any], float]:
  """Each library at its fastest batch, and the seconds of its first build."""
  batches = BATCHES[:1] if setting.smoke else BATCHES

  def sides(name, make, batches, **options):
    for batch in batches:
      path = folder / name / str(batch)
      path.mkdir(parents=True, exist_ok=True)
      yield make(given, rows, path, batch=batch, **options)

  found, firsts = {}, {}
  for name, make in {"tda": own_store.Side, **peers}.items():
    with quiet():
      several = list(sides(name, make, batches))
      builds = [functools.partial(timing.timed, x.build) for x in several]
      best, firsts[name] = timing.fastest(builds)
    found[name] = several[best]
  same = [found["tda"].batch]
  (narrow,) = sides("bfloat16", own_store.Side, same, dtype="bfloat16")
  return {"tda": found.pop("tda"), "tda bfloat16": narrow, **found}, firsts[
    "tda"
  ]


def plain(given: Given, rows: Rows, batch: int) -> Callable[[], float]:
  """torch's plain gradient."""
  models = importlib.import_module("experiments.torch_models")
  model = models.Decoder(given.weights)
  return functools.partial(models.gradient_seconds, model, rows, batch)


def overlap(found: np.ndarray, others: np.ndarray) -> float:
  """Share of the first rows of each query that are among the others."""
  pairs = zip(found, others, strict=True)
  return float(np.mean([np.isin(a, b).mean() for a, b in pairs]))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
  """Keeps the peers' progress bars and messages to itself."""
  nowhere = io.StringIO()
  with contextlib.redirect_stdout(nowhere):
    with contextlib.redirect_stderr(nowhere):
      yield
