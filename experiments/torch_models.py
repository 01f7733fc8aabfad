"""The networks of `experiments.subjects` in torch, from the same weights."""

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from experiments.subjects import Rows

Params = Mapping[str, Any]  # numpy arrays in the layout of flax


class MLP(nn.Module):
  def __init__(self, params: Params):
    super().__init__()
    layers = [params[f"layers_{i}"] for i in range(len(params))]
    self.layers = nn.ModuleList(linear(layer) for layer in layers)

  def forward(self, x):
    x = x.flatten(1)
    for layer in self.layers[:-1]:
      x = torch.relu(layer(x))
    return self.layers[-1](x)


class CNN(nn.Module):
  """`tda.models.cnn.CNN` with average pooling."""

  def __init__(self, params: Params):
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
  def __init__(self, params: Params, heads: int):
    super().__init__()
    attention = params["attention"]
    width = params["mlp_in"]["kernel"].shape[0]
    project = lambda name: linear(attention[name], width)
    self.query, self.key = project("query"), project("key")
    self.value, self.output = project("value"), project("output")
    self.mlp_in, self.mlp_out = (
      linear(params[name]) for name in ("mlp_in", "mlp_out")
    )
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
  def __init__(self, params: Params, heads: int = 4):
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


MODELS = {"mlp": MLP, "cnn": CNN, "decoder": Decoder}


def linear(params: Params, inputs: int | None = None) -> nn.Linear:
  kernel = np.asarray(params["kernel"])
  kernel = kernel.reshape(inputs or kernel.shape[0], -1)
  layer = nn.Linear(*kernel.shape, bias="bias" in params)
  layer.weight.data = tensor(kernel.T)
  if "bias" in params:
    layer.bias.data = tensor(np.ravel(params["bias"]))
  return layer


def convolution(params: Params) -> nn.Conv2d:
  kernel = np.asarray(params["kernel"])
  height, width, inputs, outputs = kernel.shape
  layer = nn.Conv2d(inputs, outputs, (height, width), padding="same")
  layer.weight.data = tensor(kernel.transpose(3, 2, 0, 1))
  if layer.bias is not None:
    layer.bias.data = tensor(params["bias"])
  return layer


def norm(params: Params) -> nn.LayerNorm:
  layer = nn.LayerNorm(len(params["scale"]), eps=1e-6)
  layer.weight.data = tensor(params["scale"])
  layer.bias.data = tensor(params["bias"])
  return layer


def tensor(x: Any) -> torch.Tensor:
  return torch.tensor(np.ascontiguousarray(x))


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
  """Summed over examples and positions."""
  return functional.cross_entropy(
    logits.flatten(0, -2), labels.flatten(), reduction="sum"
  )


def gradient_seconds(model: nn.Module, train: Rows, batch: int) -> float:
  """Seconds of the plain gradient of all training examples."""
  x, y = torch.as_tensor(train["x"]), torch.as_tensor(train["y"]).long()
  model.requires_grad_(True)
  start = time.perf_counter()
  for inputs, labels in zip(x.split(batch), y.split(batch), strict=True):
    model.zero_grad(set_to_none=True)
    cross_entropy(model(inputs), labels).backward()
  return time.perf_counter() - start
