"""LogIX's side of `store_peers`: its log of LoGra gradients, on the CPU.

Its hooks, its writer, its reader and its influence function, in the order of
its examples. A log is float32, its default and the only type beside half
precision that it can write; a search reads row after row, each a piece of a
file, and multiplies them element by element with every query. Directions are
its own (uniform numbers) unless given, as the weights of its LoRA layers.
"""

import logging
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import yaml
from logix import LogIX
from logix.lora.modules import LoraLinear
from logix.utils import flatten_log

from experiments import torch_models
from experiments.own_store import Directions, Given
from tda.data.packing import Rows

READ = 64  # rows that are read together


class Side:
  """LogIX's gradient log."""

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
    logging.disable(logging.INFO)  # or its modules are logged to stdout
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    self.folder, self.batch, self.rows = Path(folder), batch, rows
    self.dimension, self.keyword = given.dimension, given.keyword
    self.model = torch_models.Decoder(given.weights)
    torch.manual_seed(draw)  # of its directions
    first = self._anew("directions")
    first.add_lora()
    self.modules = list(first.logger.modules_to_name.values())
    with torch.no_grad():
      for name, (inputs, outputs) in (directions or {}).items():
        layer = self.model.get_submodule(name)
        assert isinstance(layer, LoraLinear)
        layer.logix_lora_A.weight.copy_(torch.tensor(inputs))
        layer.logix_lora_C.weight.copy_(torch.tensor(outputs.T))

  def build(self, statistics: tuple[str, ...] = ()) -> None:
    """Stores the rows' gradients anew."""
    self.log = self._anew("built")
    self.log.setup({"grad": ["log", *statistics]})
    self.log.save()
    for _ in self._pass(self.log, self.rows):
      pass
    self.log.finalize()

  def fill(self, values: np.ndarray) -> None:
    """Stores numbers [N, F] in place of gradients, under "filled"."""
    log = self._anew("filled")
    for i, part in enumerate(np.array_split(values, -(-len(values) // READ))):
      log([f"{i} {j}" for j in range(len(part))], save=True)
      log.binfo.log = self._split(part)
      log.logger.update(save=True)
    log.finalize()

  def ask(self, queries: Rows) -> np.ndarray:
    """Gradients [Q, F]."""
    log = self._anew("asked")
    log.setup({"grad": ["log"]})
    return torch.cat(list(self._pass(log, queries))).numpy()

  def search(
    self, which: str, asked: np.ndarray, k: int
  ) -> tuple[np.ndarray, np.ndarray]:
    """Scores and numbers [Q, k] of the first rows by dot product."""
    log = self._project(which)
    found = log.compute_influence_all(
      self._asked(asked),
      log.build_log_dataloader(READ, flatten=True),
      precondition=False,
    )
    scores, rows = torch.topk(found["influence"], k)
    return scores.numpy(), rows.numpy()

  def scores(self, asked: np.ndarray) -> dict[str, np.ndarray]:
    """Scores [N, Q] of the rows, by this library's name of the method."""
    self.build(("covariance",))  # with its Hessian
    found = {}
    for name, mode, whitened in (
      ("logra", "dot", True),
      ("relatif", "cosine", True),
      ("dot", "dot", False),
    ):
      result = self.log.compute_influence_all(
        self._asked(asked),
        self.log.build_log_dataloader(READ),
        mode=mode,
        precondition=whitened,
      )
      found[name] = result["influence"].numpy().T
    return found

  def _pass(self, log: LogIX, rows: Rows) -> Iterator[torch.Tensor]:
    """Gradients by batch [B, F], which are stored if `log` saves."""
    x = torch.as_tensor(rows["x"]).long()
    y = torch.as_tensor(np.where(rows["mask"] > 0, rows["y"], -100)).long()
    path = [(name, "grad") for name in self.modules]
    for index in torch.arange(len(x)).split(self.batch):
      self.model.zero_grad()
      with log([str(i) for i in index.tolist()]):
        logits = self.model(x[index])
        torch_models.cross_entropy(logits, y[index]).backward()
      yield flatten_log(log.get_log()[1], path)
    log.logger.clear(module=False, buffer=False)  # or its hooks stay

  def _anew(self, which: str) -> LogIX:
    """A project in an empty folder."""
    shutil.rmtree(self.folder / which, ignore_errors=True)
    return self._project(which)

  def _project(self, which: str) -> LogIX:
    config = self.folder / "logix.yaml"
    settings = {"root_dir": str(self.folder), "lora": {"rank": self.dimension}}
    config.write_text(yaml.dump(settings))
    found = LogIX(which, config=str(config))
    found.watch(self.model, name_filter=[self.keyword])
    return found

  def _split(self, values: np.ndarray) -> dict:
    parts = torch.as_tensor(values).chunk(len(self.modules), dim=1)
    shape = -1, self.dimension, self.dimension
    pairs = zip(self.modules, parts, strict=True)
    return {name: {"grad": x.reshape(shape)} for name, x in pairs}

  def _asked(self, values: np.ndarray) -> tuple[list[str], dict]:
    return [str(i) for i in range(len(values))], self._split(values)
