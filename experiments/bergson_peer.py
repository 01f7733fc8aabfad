"""bergson's side of `compare_peers`: a decoder, in one process on the CPU.

Its own functions in the order of its pipeline, the model frozen as it loads
them, but without what slows it down: the stages share one model, and gradients
of queries, their inverse and scores stay in memory. float32 except for the
eigendecomposition, which is always float64 there.

It attributes next-token losses, so that sequences have one token more here than
elsewhere, of which neither a loss nor a statistic is taken. Labels are those of
the data: it draws others anew in each pass and keeps none.
"""

import logging
import pathlib
import time
import types

import numpy as np
import torch
from bergson import (
  CollectorComputer,
  GradientProcessor,
  IndexConfig,
  InMemoryCollector,
  Scorer,
)
from bergson.config.config import HessianConfig, InversionConfig
from bergson.hessians.eigenvectors import eigendecompose_owned
from bergson.hessians.hessian_approximations import collect_hessians
from bergson.hessians.preconditioner import FactoredPreconditioner
from bergson.score.score_writer import InMemorySequenceScoreWriter
from datasets import Dataset
from torch import nn
from torch.nn import functional

from experiments import torch_models
from experiments.ekfac_stages import STAGES
from experiments.subjects import Rows, Subject


class Causal(torch_models.Decoder):
  """A decoder with what is asked of a language model of `transformers`."""

  device, dtype = torch.device("cpu"), torch.float32

  def __init__(self, params: torch_models.Params):
    super().__init__(params)
    one_more = functional.pad(self.positions.weight, (0, 0, 0, 1))
    self.positions = nn.Embedding.from_pretrained(one_more)

  @property
  def base_model(self):  # where it looks for layers; here with the head
    return self

  def forward(self, x):
    return types.SimpleNamespace(logits=super().forward(x))


MODELS = {"decoder": Causal}


class Peer:
  """Stages of EK-FAC on one model and data set, each timed."""

  def __init__(self, model, subject: Subject, folder: str, *, batch: int):
    logging.disable(logging.INFO)  # or every pass is logged to stdout
    self.model = model.requires_grad_(False)
    model.tokens.requires_grad_(True)
    self.train, self.queries = map(sequences, (subject.train, subject.queries))
    self.batch = batch
    self.config = IndexConfig(f"{folder}/bergson", include_bias=True)

  def run(self) -> tuple[np.ndarray, dict[str, float]]:
    """Scores [N, Q] without a factor 1/N, and seconds by stage."""
    path = self.config.partial_run_path
    path.mkdir(exist_ok=True)
    fit = {
      "model": self.model,
      "data": self.train,
      "index_cfg": self.config,
      "hessian_cfg": HessianConfig("kfac", use_dataset_labels=True),
      "batches": in_turn(self.train, self.batch),
    }
    marks = [time.perf_counter()]
    mark = lambda: marks.append(time.perf_counter())
    moments = collect_hessians(**fit)
    mark()
    bases = _eigenbases(moments, path)
    mark()
    collect_hessians(
      **fit,
      ev_correction=True,
      eigenvectors=bases,
      num_documents=len(self.train),
    )
    mark()
    scores = self._score(path)
    mark()
    seconds = np.diff(marks).tolist()
    return scores.numpy(), dict(zip(STAGES, seconds, strict=True))

  def _score(self, path: pathlib.Path) -> torch.Tensor:
    gradients = self._collect(self.queries).gradients
    inverse = FactoredPreconditioner.from_shards(
      path,
      rank=0,
      device="cpu",
      inversion_cfg=InversionConfig("damped_inverse", damping_factor=0.1),
      ev_correction=True,
    )
    scorer = Scorer(
      inverse.apply(gradients),
      list(gradients),
      InMemorySequenceScoreWriter(len(self.train), len(self.queries)),
      self.model.device,
      self.model.dtype,
    )
    return self._collect(self.train, scorer).scores

  def _collect(self, data: Dataset, scorer: Scorer | None = None):
    collector = InMemoryCollector(
      model=self.model,
      data=data,
      cfg=self.config,
      processor=GradientProcessor(include_bias=True),
      scorer=scorer,
    )
    CollectorComputer(
      self.model,
      data,
      collector=collector,
      batches=in_turn(data, self.batch),
      cfg=self.config,
    ).run_with_collector_hooks()
    return collector


def _eigenbases(moments, path: pathlib.Path) -> tuple[dict, dict]:
  """Of inputs and of gradients, also written under `path`."""
  count = next(iter(moments.num_positions.values()))
  sides = (
    ("activation", moments.A_cov_dict, moments.A_shapes),
    ("gradient", moments.S_cov_dict, moments.S_shapes),
  )
  inputs, outputs = (
    eigendecompose_owned(
      sums, shapes, None, count, f"{path}/eigen_{side}_sharded", torch.float32
    )[0]
    for side, sums, shapes in sides
  )
  return inputs, outputs


def sequences(rows: Rows) -> Dataset:
  """Inputs and last label of each row, up to the last that its mask keeps."""
  kept = rows.get("mask", np.ones_like(rows["y"])) > 0
  found: dict[str, list] = {"input_ids": [], "labels": [], "length": []}
  for x, y, keep in zip(rows["x"], rows["y"], kept, strict=True):
    last = int(np.flatnonzero(keep).max()) + 1
    found["input_ids"].append([*x[:last].tolist(), int(y[last - 1])])
    found["labels"].append([-100, *np.where(keep, y, -100)[:last].tolist()])
    found["length"].append(last + 1)
  return Dataset.from_dict(found)


def in_turn(data: Dataset, batch: int) -> list[list[int]]:
  """Batches of places."""
  rows = torch.arange(len(data)).split(batch)
  return [indices.tolist() for indices in rows]
