"""What the performance binaries measure: small models, at their first weights.

Digits come from scikit-learn; text is the source of Python's standard library,
as bytes, in sequences that do not overlap.
"""

import pathlib
import sysconfig
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tda import likelihoods
from tda.data import bundled
from tda.likelihoods import Likelihood, Objective
from tda.models.cnn import CNN
from tda.models.config import DecoderConfig
from tda.models.decoder import Decoder
from tda.models.mlp import MLP

Rows = dict[str, np.ndarray]  # {"x", "y"}: inputs, labels or next bytes


class Subject(NamedTuple):
  """A model with its data."""

  objective: Objective
  params: Any
  train: Rows
  queries: Rows


def classifier(name: str, examples: int, queries: int) -> Subject:
  """An MLP 64-128-128-10, or a CNN with two convolutions, of digits."""
  data = bundled.digits(train_size=examples, test_size=queries)
  module: Any = MLP() if name == "mlp" else CNN(downsampling="average")
  target = lambda example: example["y"]
  return _subject(
    module, likelihoods.categorical(), target, data.train, data.test
  )


def decoder(config: DecoderConfig, examples: int, queries: int) -> Subject:
  """A decoder of bytes, the loss summed over a sequence."""
  tokens = _text(examples + queries, config.max_length + 1)
  train, test = (
    {"x": part[:, :-1], "y": part[:, 1:]}
    for part in (tokens[:examples], tokens[examples:])
  )
  target = lambda example: (example["y"], jnp.ones_like(example["y"]))
  likelihood = likelihoods.token_categorical()
  return _subject(Decoder(config), likelihood, target, train, test)


def _subject(
  module: Any, likelihood: Likelihood, target: Any, train: Rows, queries: Rows
) -> Subject:
  params = module.init(jax.random.key(0), train["x"][0])["params"]
  apply = lambda params, ex: module.apply({"params": params}, ex["x"])
  return Subject(Objective(apply, likelihood, target), params, train, queries)


def _text(sequences: int, length: int) -> np.ndarray:
  """Bytes [sequences, length], the sequences in random order."""
  folder = pathlib.Path(sysconfig.get_path("stdlib"))
  text, need = b"", sequences * length
  for path in sorted(folder.glob("*.py")):
    text += path.read_bytes()
    if len(text) >= need:
      break
  if len(text) < need:
    raise ValueError(
      f"{sequences} sequences of {length} bytes are more than the "
      f"{len(text)} bytes of source in {folder}; ask for fewer"
    )
  tokens = np.frombuffer(text[:need], np.uint8).reshape(sequences, length)
  return np.random.default_rng(0).permutation(tokens).astype(np.int32)
