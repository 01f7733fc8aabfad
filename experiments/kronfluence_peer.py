"""The peer's side of `compare_kronfluence`: the same models in torch.

Options are the ones it is fastest with on a CPU: float32 throughout (also the
eigendecomposition, by default float64), whole batches indexed at once, no
progress bars, labels drawn once.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from kronfluence.utils.dataset import DataLoaderKwargs
from torch import nn
from torch.nn import functional

Rows = Mapping[str, np.ndarray]


class MLP(nn.Module):
  def __init__(self, params: Mapping[str, Any]):
    super().__init__()
    layers = [params[f"layers_{i}"] for i in range(len(params))]
    self.layers = nn.ModuleList(linear(layer) for layer in layers)

  def forward(self, x):
    for layer in self.layers[:-1]:
      x = torch.relu(layer(x))
    return self.layers[-1](x)


class CNN(nn.Module):
  """`tda.models.cnn.CNN` with average pooling."""

  def __init__(self, params: Mapping[str, Any]):
    super().__init__()
    convolutions = [v for k, v in params.items() if k.startswith("conv")]
    self.convolutions = nn.ModuleList(map(convolution, convolutions))
    self.dense, self.head = linear(params["dense"]), linear(params["head"])

  def forward(self, x):
    x = x.permute(0, 3, 1, 2)
    for conv in self.convolutions:
      x = functional.avg_pool2d(torch.relu(conv(x)), 2)
    x = x.permute(0, 2, 3, 1).flatten(1)
    return self.head(torch.relu(self.dense(x)))


class Block(nn.Module):
  def __init__(self, params: Mapping[str, Any], heads: int):
    super().__init__()
    attention = params["attention"]
    width = params["mlp_in"]["kernel"].shape[0]
    project = lambda name: linear(attention[name], width)
    self.query, self.key = project("query"), project("key")
    self.value, self.output = project("value"), project("output")
    self.mlp_in, self.mlp_out = (linear(params[k]) for k in MLP_NAMES)
    self.norm_attention = norm(params["norm_attention"])
    self.norm_mlp = norm(params["norm_mlp"])
    self.heads = heads

  def forward(self, x):
    h = self.norm_attention(x)
    split = lambda y: y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
    q, k, v = (split(f(h)) for f in (self.query, self.key, self.value))
    h = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    x = x + self.output(h.transpose(1, 2).flatten(2))
    h = functional.gelu(self.mlp_in(self.norm_mlp(x)), approximate="tanh")
    return x + self.mlp_out(h)


class Decoder(nn.Module):
  def __init__(self, params: Mapping[str, Any], heads: int):
    super().__init__()
    count = sum(name.startswith("blocks_") for name in params)
    blocks = [params[f"blocks_{i}"] for i in range(count)]
    self.blocks = nn.ModuleList(Block(block, heads) for block in blocks)
    embedding = lambda p: nn.Embedding.from_pretrained(tensor(p["embedding"]))
    self.tokens = embedding(params["tokens"])
    self.positions = embedding(params["positions"])
    self.norm, self.head = norm(params["norm"]), linear(params["head"])

  def forward(self, x):
    x = self.tokens(x) + self.positions(torch.arange(x.shape[1]))
    for block in self.blocks:
      x = block(x)
    return self.head(self.norm(x))


MLP_NAMES = ("mlp_in", "mlp_out")


class Labelled(Task):
  """Cross entropy, summed; the label sampled for an example is drawn once."""

  def __init__(self, labels: np.ndarray, seed: int):
    self.generator = torch.Generator().manual_seed(seed)
    self.sampled = torch.full(labels.shape, -1)

  def compute_train_loss(self, batch, model, sample=False):
    logits = model(batch["x"])
    labels = self._drawn(batch, logits.detach()) if sample else batch["y"]
    return functional.cross_entropy(
      logits.flatten(0, -2), labels.flatten(), reduction="sum"
    )

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
    self, model, train: Rows, queries: Rows, *, folder, batch, sampled=False
  ):
    self.task = Labelled(train["y"], seed=0)
    self.train, self.queries = Table(train), Table(queries)
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


def gradient_seconds(model: nn.Module, train: Rows, batch: int) -> float:
  """Seconds of the plain gradient of all training examples."""
  table, task = Table(train), Labelled(train["y"], seed=0)
  model.requires_grad_(True)
  start = time.perf_counter()
  for first in range(0, len(table), batch):
    model.zero_grad(set_to_none=True)
    rows = table[slice(first, first + batch)]
    task.compute_train_loss(rows, model).backward()
  return time.perf_counter() - start


def linear(params: Mapping[str, Any], inputs: int | None = None) -> nn.Linear:
  kernel = np.asarray(params["kernel"])
  kernel = kernel.reshape(inputs or kernel.shape[0], -1)
  layer = nn.Linear(*kernel.shape, bias="bias" in params)
  layer.weight.data = tensor(kernel.T)
  if "bias" in params:
    layer.bias.data = tensor(np.ravel(params["bias"]))
  return layer


def convolution(params: Mapping[str, Any]) -> nn.Conv2d:
  kernel = np.asarray(params["kernel"])  # height, width, inputs, outputs
  layer = nn.Conv2d(*kernel.shape[2:], kernel.shape[:2], padding="same")
  layer.weight.data = tensor(kernel.transpose(3, 2, 0, 1))
  layer.bias.data = tensor(params["bias"])
  return layer


def norm(params: Mapping[str, Any]) -> nn.LayerNorm:
  layer = nn.LayerNorm(len(params["scale"]), eps=1e-6)
  layer.weight.data = tensor(params["scale"])
  layer.bias.data = tensor(params["bias"])
  return layer


def tensor(x: Any) -> torch.Tensor:
  return torch.tensor(np.ascontiguousarray(x))
