"""Packed rows: every token predicted once, nothing across documents."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from language_models import VOCAB, draw, tiny

from tda.data import packing
from tda.models import decoder


def documents(sizes, seed=0):
  rng = np.random.default_rng(seed)
  return [rng.integers(0, VOCAB, size, np.int32) for size in sizes]


def predictions(rows):
  """(document, token before, token) of every kept position."""
  kept = rows["mask"] > 0
  columns = [rows[name][kept] for name in ("documents", "x", "y")]
  return sorted(map(tuple, np.stack(columns, 1).tolist()))


@pytest.mark.parametrize("seed", [None, 0, 1, 2])
@pytest.mark.parametrize("length", [3, 8, 64])
def test_every_token_is_predicted_once(length, seed):
  given = documents([2, 17, 3, 9, 8, 10, 5, 2, 2, 33])
  rows = packing.pack(given, length, seed=seed, vocab=VOCAB)
  expected = sorted(
    (i, int(a), int(b))
    for i, x in enumerate(given)
    for a, b in itertools.pairwise(x)
  )
  assert predictions(rows) == expected
  assert {x.shape for x in rows.values()} == {(len(rows["x"]), length)}
  assert {x.dtype for x in rows.values()} == {np.dtype("i4")}
  kept = rows["mask"] > 0
  np.testing.assert_array_equal(rows["documents"] >= 0, kept)
  np.testing.assert_array_equal(kept & (rows["segments"] == 0), False)


def test_one_row_as_it_is():
  a, b = np.array([1, 2, 3]), np.array([4, 5])
  rows = packing.pack([a, b], 7)
  assert {name: x[0].tolist() for name, x in rows.items()} == {
    "x": [1, 2, 3, 4, 5, 0, 0],
    "y": [2, 3, 4, 5, 0, 0, 0],
    "segments": [1, 1, 1, 2, 2, 0, 0],
    "documents": [0, 0, -1, 1, -1, -1, -1],
    "mask": [1, 1, 0, 1, 0, 0, 0],
  }


def test_order_is_of_the_seed_and_rows_are_full():
  given = documents(np.random.default_rng(0).integers(2, 40, 300))
  one, same, other = (packing.pack(given, 63, seed=s) for s in (0, 0, 1))
  assert all(np.array_equal(one[k], same[k]) for k in one)
  assert not np.array_equal(one["x"][:50], other["x"][:50])
  tokens = sum(map(len, given))
  assert len(one["x"]) <= 1.05 * tokens / 64
  assert packing.filled(one) == (tokens - 300) / one["x"].size


def test_chosen_targets():
  given = documents([9, 4])
  targets = [np.arange(9) >= 6, np.array([1, 0, 0, 1])]
  rows = packing.pack(given, 4, targets=targets)
  # The first piece of the first document predicts nothing and is left out.
  assert predictions(rows) == sorted(
    (i, int(given[i][t - 1]), int(given[i][t]))
    for i, t in [(0, 6), (0, 7), (0, 8), (1, 3)]
  )
  row = packing.completion([1, 2, 3], [4, 5], 6)
  assert row["mask"].tolist() == [0, 0, 1, 1, 0, 0]
  assert row["y"][row["mask"] > 0].tolist() == [4, 5]


def test_losses_are_those_of_the_documents_alone():
  """Sum over a packed row = sum over its documents, each told apart."""
  config = tiny("llama")
  aim, params = decoder.objective(config), draw(config)
  given = documents([5, 4, 7])
  rows = packing.pack(given, 15, seed=0)
  assert len(rows["x"]) == 1
  row = {name: jnp.asarray(x[0]) for name, x in rows.items()}

  def alone(tokens):
    logits = decoder.Decoder(config).apply({"params": params}, tokens[:-1])
    log_p = jax.nn.log_softmax(logits)
    return -log_p[np.arange(len(tokens) - 1), tokens[1:]].sum()

  losses = [alone(tokens) for tokens in given]
  total = aim.loss(params, row)
  np.testing.assert_allclose(total, sum(losses), rtol=1e-5)
  log_p = jax.nn.log_softmax(aim.outputs(params, row))
  nll = -jnp.take_along_axis(log_p, row["y"][:, None], 1)[:, 0]
  owner = jnp.where(row["documents"] < 0, len(given), row["documents"])
  by_document = jax.ops.segment_sum(nll, owner, len(given) + 1)[:-1]
  np.testing.assert_allclose(by_document, jnp.stack(losses), rtol=1e-5)
  mean = decoder.objective(config, "mean").loss(params, row)
  np.testing.assert_allclose(mean, total / 13, rtol=1e-6)


def test_rows_are_a_source_for_grain():
  grain = pytest.importorskip("grain")
  rows = packing.pack(documents([5, 4, 7, 6, 8]), 6, seed=0)
  source = packing.Source(rows)
  assert len(source) == len(rows["x"])
  batches = grain.MapDataset.source(source).shuffle(seed=1).batch(2)
  seen = np.concatenate([batches[i]["x"] for i in range(len(batches))])
  assert sorted(seen.tolist()) == sorted(rows["x"].tolist())


@pytest.mark.parametrize(
  ("given", "options", "message"),
  [
    ([], {}, "0 documents"),
    ([[1, 2]], {"length": 0}, "rows of 0 positions"),
    ([[1, 2], [3]], {}, "in 1 documents, the first of them at 1.*Leave them"),
    ([[1, 2]], {"targets": [[1, 0]]}, "`targets` hide all"),
    ([[1, 2]], {"targets": [[1]]}, "one each"),
    ([[1, 20]], {"vocab": 13}, "from 1 to 20 for a vocabulary of 13"),
  ],
)
def test_refuses(given, options, message):
  given = [np.asarray(x, np.int32) for x in given]
  with pytest.raises(ValueError, match=message):
    packing.pack(given, **{"length": 4, **options})


def test_refuses_long_completions():
  with pytest.raises(ValueError, match=r"3 and an answer of 2 .* at most 4"):
    packing.completion([1, 2, 3], [4, 5], 3)


def test_tokens_come_back_from_rows_of_one_document():
  given = documents([2, 9, 5])
  rows = [packing.completion(one[:1], one[1:], 8) for one in given]
  joined = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
  for found, one in zip(packing.tokens(joined), given, strict=True):
    np.testing.assert_array_equal(found, one)
  with pytest.raises(ValueError, match="row 0 holds several documents"):
    packing.tokens(packing.pack(documents([3, 3]), 8))


def test_trimmed_rows_have_the_same_losses():
  config = tiny("llama")
  params = draw(config)
  rows = packing.pack(documents([9, 7, 7]), 10)
  short = packing.trimmed(rows)
  assert rows["x"].shape[1] == 10
  assert {x.shape[1] for x in short.values()} == {9}
  losses = jax.vmap(decoder.objective(config).loss, (None, 0))
  np.testing.assert_allclose(
    losses(params, short), losses(params, rows), rtol=1e-5
  )
