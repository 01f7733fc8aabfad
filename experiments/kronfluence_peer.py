"""kronfluence's side of `compare_peers`.

Options are the ones it is fastest with on a CPU: float32 throughout (also the
eigendecomposition, by default float64), whole batches indexed at once, no
progress bars, labels drawn once.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from kronfluence.utils.dataset import DataLoaderKwargs

from experiments import torch_models
from experiments.subjects import Rows, Subject

MODELS = torch_models.MODELS


class Labelled(Task):
  """Cross entropy, summed; the label sampled for an example is drawn once."""

  def __init__(self, labels: np.ndarray, seed: int):
    self.generator = torch.Generator().manual_seed(seed)
    self.sampled = torch.full(labels.shape, -1)

  def compute_train_loss(self, batch, model, sample=False):
    logits = model(batch["x"])
    labels = self._drawn(batch, logits.detach()) if sample else batch["y"]
    return torch_models.cross_entropy(logits, labels)

  def compute_measurement(self, batch, model):
    return self.compute_train_loss(batch, model)

  def _drawn(self, batch, logits):
    index = batch["index"]
    if (self.sampled[index] < 0).any():
      chances = logits.softmax(-1).flatten(0, -2)
      drawn = torch.multinomial(chances, 1, generator=self.generator)
      self.sampled[index] = drawn.reshape(batch["y"].shape)
    return self.sampled[index]


class Table(torch.utils.data.Dataset):
  """Rows that are indexed a batch at a time."""

  def __init__(self, rows: Rows):
    self.columns = {k: torch.as_tensor(v) for k, v in rows.items()}
    self.columns["y"] = self.columns["y"].long()
    self.columns["index"] = torch.arange(len(rows["y"]))

  def __len__(self):
    return len(self.columns["index"])

  def __getitem__(self, i):
    return {k: v[i] for k, v in self.columns.items()}

  def __getitems__(self, index):
    first, last = index[0], index[-1]
    whole = slice(first, last + 1)
    return self[whole if last - first + 1 == len(index) else index]


class Peer:
  """Stages of EK-FAC on one model and data set, each timed."""

  def __init__(
    self, model, subject: Subject, folder: str, *, batch: int, sampled=False
  ):
    self.task = Labelled(subject.train["y"], seed=0)
    self.train, self.queries = Table(subject.train), Table(subject.queries)
    self.analyzer = Analyzer(
      "comparison",
      prepare_model(model, self.task),
      self.task,
      cpu=True,
      log_level=50,
      disable_tqdm=True,
      output_dir=folder,
    )
    loading = DataLoaderKwargs(collate_fn=lambda rows: rows)
    self.analyzer.set_dataloader_kwargs(loading)
    self.batch = batch
    self.arguments = FactorArguments(
      use_empirical_fisher=not sampled, eigendecomposition_dtype=torch.float32
    )

  def run(self) -> tuple[np.ndarray, dict[str, float]]:
    """Scores [N, Q] without a factor 1/N, and seconds by stage."""
    common = {"factor_args": self.arguments, "overwrite_output_dir": True}
    fit = {"dataset": self.train, "per_device_batch_size": self.batch}
    stages: dict[str, Callable[[], Any]] = {
      "covariances": lambda: self.analyzer.fit_covariance_matrices(
        "factors", **fit, **common
      ),
      "eigenbasis": lambda: self.analyzer.perform_eigendecomposition(
        "factors", **common
      ),
      "eigenvalues": lambda: self.analyzer.fit_lambda_matrices(
        "factors", **fit, **common
      ),
      "scores": self._score,
    }
    seconds = {}
    for name, stage in stages.items():
      start = time.perf_counter()
      scores = stage()
      seconds[name] = time.perf_counter() - start
    return scores["all_modules"].numpy().T, seconds

  def _score(self):
    self.analyzer.compute_pairwise_scores(
      "scores",
      "factors",
      self.queries,
      self.train,
      per_device_query_batch_size=len(self.queries),
      per_device_train_batch_size=self.batch,
      score_args=ScoreArguments(damping_factor=None),
      overwrite_output_dir=True,
    )
    return self.analyzer.load_pairwise_scores("scores")

  @property
  def sampled(self) -> np.ndarray:
    """The labels drawn for the training examples."""
    return self.task.sampled.numpy().astype(np.int32)
