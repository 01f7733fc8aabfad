"""bergson's side of `store_peers`: its index, in one process on the CPU.

Its own functions in the order of its pipeline (build, query, and the Hessian of
TrackStar), the model frozen as it loads them, but all share one model instead
of loading it for each. An index is float32, as it is for any model of float32;
a search maps it into memory and multiplies. Directions are its own unless
given, which fill its cache of them.
"""

import logging
import os
import shutil
from pathlib import Path

import datasets
import numpy as np
import torch
from bergson import (
  Attributor,
  Builder,
  CollectorComputer,
  GradientProcessor,
  IndexConfig,
  InMemoryCollector,
  PreprocessConfig,
  collect_gradients,
)
from bergson.hessians.autocorrelation import AutocorrelationCollector

from experiments.bergson_peer import Causal, in_turn, sequences
from experiments.own_store import Directions, Given
from tda.data.packing import Rows


class Side:
  """bergson's gradient index."""

  def __init__(
    self,
    given: Given,
    rows: Rows,
    folder: str | Path,
    *,
    batch: int,
    directions: Directions | None = None,
    draw: int = 0,
  ):
    logging.disable(logging.INFO)  # or every pass is logged to stdout
    datasets.disable_progress_bars()
    self.folder, self.batch = Path(folder), batch
    self.data, self.given_directions = sequences(rows), directions
    self.model = Causal(given.weights).requires_grad_(False)
    self.model.tokens.requires_grad_(True)
    self.dimension, self.draw = given.dimension, draw
    self.modules = [
      name
      for name, module in self.model.named_modules()
      if isinstance(module, torch.nn.Linear) and given.keyword in name
    ]
    self.processor = self._processor()

  def build(self) -> None:
    """Stores the rows' gradients anew."""
    config = self._config("built")
    collect_gradients(
      self.model,
      self.data,
      self.processor,
      config,
      batches=in_turn(self.data, self.batch),
      target_modules=set(self.modules),
    )
    os.rename(config.partial_run_path, config.run_path)

  def fill(self, values: np.ndarray) -> None:
    """Stores numbers [N, F] in place of gradients, under "filled"."""
    path = Path(self._config("filled").run_path)
    sizes = dict.fromkeys(self.modules, self.dimension**2)
    empty = datasets.Dataset.from_dict({"length": [0] * len(values)})
    builder = Builder(
      empty, sizes, torch.float32, PreprocessConfig(), path=path
    )
    builder(list(range(len(values))), self._split(values))
    builder.teardown()
    self.processor.save(path)

  def ask(self, queries: Rows) -> np.ndarray:
    """Gradients [Q, F]."""
    data = sequences(queries)
    collector = InMemoryCollector(
      model=self.model,
      data=data,
      cfg=self._config("asked"),
      processor=self.processor,
      target_modules=set(self.modules),
    )
    self._run(collector, data, "asked")
    found = [collector.gradients[name] for name in self.modules]
    return torch.cat(found, dim=1).numpy()

  def search(
    self, which: str, asked: np.ndarray, k: int
  ) -> tuple[np.ndarray, np.ndarray]:
    """Scores and numbers [Q, k] of the first rows by dot product."""
    index = Attributor(self.folder / which)
    scores, rows = index.search(self._split(asked), k)
    return scores.numpy(), rows.numpy()

  def scores(self, asked: np.ndarray) -> dict[str, np.ndarray]:
    """Scores [N, Q] of what was built, by this library's name of the method."""
    hessian = self.folder / "hessian"
    collector = AutocorrelationCollector(
      model=self.model,
      data=self.data,
      path=str(hessian),
      processor=self._processor(),
      target_modules=set(self.modules),
    )
    self._run(collector, self.data, "hessian")
    found = {}
    for name, unit, path in (
      ("cosine", True, None),
      ("dot", False, None),
      ("trackstar unmixed", True, hessian),
      ("logra", False, hessian),
    ):
      index = Attributor(
        self.folder / "built", unit_norm=unit, hessian_path=path
      )
      # A copy, of which it takes the norm out in place.
      values, rows = index.search(self._split(asked.copy()), None)
      by_row = torch.zeros_like(values).scatter_(1, rows, values)
      found[name] = by_row.numpy().T
    return found

  def _processor(self) -> GradientProcessor:
    found = GradientProcessor(
      projection_dim=self.dimension, projection_seed=self.draw
    )
    for name, sides in (self.given_directions or {}).items():
      for role, x in zip(("right", "left"), sides, strict=True):
        key = name, role, torch.device("cpu")
        found._projection_matrices[key] = torch.tensor(x)
    return found

  def _config(self, which: str) -> IndexConfig:
    """Of an empty folder."""
    found = IndexConfig(str(self.folder / which), projection_dim=self.dimension)
    for path in (Path(found.run_path), found.partial_run_path):
      shutil.rmtree(path, ignore_errors=True)
    found.partial_run_path.mkdir(parents=True)
    return found

  def _run(self, collector, data: datasets.Dataset, which: str) -> None:
    CollectorComputer(
      self.model,
      data,
      collector=collector,
      batches=in_turn(data, self.batch),
      cfg=self._config(which),
    ).run_with_collector_hooks()

  def _split(self, values: np.ndarray) -> dict[str, torch.Tensor]:
    parts = torch.as_tensor(values).chunk(len(self.modules), dim=1)
    return dict(zip(self.modules, parts, strict=True))
