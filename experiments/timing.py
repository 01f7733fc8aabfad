"""Steps timed beside a plain gradient, for the performance binaries."""

import json
import os
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

Key = TypeVar("Key", bound=Hashable)
WARM = 3  # rounds that a choice goes by
CALL_SECONDS = 0.1  # a round calls fast functions until this much has passed


class Step(NamedTuple):
  """What is timed, compiled for these arguments."""

  run: Callable[..., Any]
  args: tuple[Any, ...]
  limit: float | None  # operations relative to a plain gradient's


class Measured(NamedTuple):
  """A step: seconds of a call, and what is relative to the first step."""

  seconds: float
  limit: float | None  # operations
  ratio: float  # time, median over the rounds
  memory: float  # temporary bytes
  compilation: float  # tracing included


def measure(
  many: Mapping[str, Step], *, rounds: int, compilations: int = 2
) -> dict[str, Measured]:
  """Every step, relative to the first, in interleaved rounds."""
  compilation: dict[str, list[float]] = {name: [] for name in many}
  compiled = {}
  for _ in range(compilations):
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
  analyses: list[Any] = [compiled[name].memory_analysis() for name in many]
  memory = [analysis.temp_size_in_bytes for analysis in analyses]
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


def timed(run: Callable[[], object]) -> float:
  """Seconds of a call."""
  start = time.perf_counter()
  run()
  return time.perf_counter() - start


def interleaved(
  rounds: int,
  runs: Mapping[Key, Callable[[], object]],
  before: Callable[[], object] = lambda: None,
) -> dict[Key, float]:
  """Median seconds of each, once warm, `before` each of them not counted."""

  def one(run):
    before()
    return timed(run)

  for run in runs.values():
    run()
  taken = [{k: one(run) for k, run in runs.items()} for _ in range(rounds)]
  return {k: statistics.median(each[k] for each in taken) for k in runs}


def dropped() -> bool:
  """Empties the system's cache of files, if this user may."""
  os.sync()
  try:
    Path("/proc/sys/vm/drop_caches").write_text("1")
  except OSError:
    return False
  return True


def fastest(runs: Sequence[Callable[[], float]]) -> tuple[int, float]:
  """Which run says that it took the fewest seconds, warm, and its first."""
  firsts = [run() for run in runs]
  if len(runs) == 1:
    return 0, firsts[0]
  rounds = [[run() for run in runs] for _ in range(WARM)]
  warm = np.min(rounds, axis=0)
  best = int(warm.argmin())
  return best, firsts[best]


def report(model: str, measured: Mapping[str, Measured]) -> None:
  """Prints the table of a model."""
  print(f"\n{model:18} seconds   limit   ratio  ratio/limit  memory  compile")
  for name, row in measured.items():
    limit = f"{row.limit:7.2f}" if row.limit else " " * 7
    excess = f"{row.ratio / row.limit:11.2f}" if row.limit else " " * 11
    print(
      f"{name:16} {row.seconds:9.4f} {limit} {row.ratio:7.2f} {excess}"
      f" {row.memory:8.2f} {row.compilation:8.2f}"
    )


def write(path: str, table: Mapping[str, Mapping[str, Measured]]) -> None:
  """All tables as JSON."""
  rows = jax.tree.map(
    Measured._asdict, dict(table), is_leaf=lambda x: isinstance(x, Measured)
  )
  with open(path, "w") as file:
    json.dump(rows, file, indent=2)
