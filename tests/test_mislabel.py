"""Curves against definitions, subjects against what they promise."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import metrics

from tda import blocks, lora, streams
from tda.evaluation import mislabel
from tda.evaluation.mislabel import Setting

SMALL = Setting(
  "small",
  train_size=64,
  tune_size=48,
  pretrain_size=96,
  validation_size=16,
  test_size=16,
  features=(8,),
  epochs=3,
  tune_epochs=3,
  batch_size=16,
)


def test_a_curve_counts_what_is_found():
  suspicion = jnp.array([0.1, 0.9, 0.5, 0.7])
  flipped = jnp.array([False, True, True, False])
  found = mislabel.curve(suspicion, flipped)
  np.testing.assert_allclose(found, [0, 0.5, 0.5, 1, 1])
  assert float(mislabel.auc(found)) == pytest.approx(0.625)
  assert float(mislabel.at(found, 0.5)) == 0.5
  assert float(mislabel.at(found, 0.625)) == pytest.approx(0.75)


def test_equally_suspect_examples_come_in_random_order():
  rng = np.random.default_rng(0)
  suspicion = rng.integers(0, 3, size=20).astype(float)
  flipped = rng.random(20) < 0.4
  found = mislabel.curve(jnp.asarray(suspicion), jnp.asarray(flipped))
  drawn = []
  for _ in range(400):
    order = np.lexsort((rng.random(20), -suspicion))
    drawn.append(np.cumsum(flipped[order]) / flipped.sum())
  error = np.std(drawn, axis=0, ddof=1) / np.sqrt(len(drawn))
  miss = np.abs(np.mean(drawn, axis=0) - np.asarray(found)[1:])
  assert (miss <= 4.5 * error + 1e-6).all()


@pytest.mark.parametrize("seed", range(3))
def test_the_area_is_that_of_the_roc_curve(seed):
  """Area = p/2 + (1 − p) ROC-AUC, whatever the ties."""
  rng = np.random.default_rng(seed)
  flipped = rng.random(50) < 0.3
  suspicion = np.round(rng.normal(size=50) + flipped, 1)
  found = mislabel.curve(jnp.asarray(suspicion), jnp.asarray(flipped))
  share = flipped.mean()
  roc = metrics.roc_auc_score(flipped, suspicion)
  want = share / 2 + (1 - share) * roc
  np.testing.assert_allclose(float(mislabel.auc(found)), want, rtol=1e-5)


def test_perfect_and_blind_orders_have_the_areas_they_should():
  flipped = jnp.arange(10) < 2
  area = lambda s: float(mislabel.auc(mislabel.curve(s, flipped)))
  assert area(-jnp.arange(10.0)) == pytest.approx(0.9)
  assert area(jnp.zeros(10)) == pytest.approx(0.5)


def test_shapes_that_differ_are_refused():
  with pytest.raises(ValueError, match=r"\(3,\) and flipped \(4,\)"):
    mislabel.curve(jnp.zeros(3), jnp.zeros(4, bool))


@pytest.mark.parametrize("kind", mislabel.SUBJECTS)
def test_draws_have_the_noise_and_the_classes_they_promise(kind):
  subject = mislabel.subject(SMALL, kind)
  one, two = subject.draw(0), subject.draw(1)
  shapes = lambda draw: jax.tree.map(np.shape, draw)
  assert shapes(one) == shapes(two)
  size = SMALL.train_size if kind == "full" else SMALL.tune_size
  assert one.flipped.sum() == round(0.2 * size)
  classes = 10 if kind == "full" else 5
  for part in (one.train, one.validation, one.test):
    assert 0 <= part["y"].min() and part["y"].max() < classes
  rows = lambda part: {x.tobytes() for x in part["x"]}
  assert not rows(one.train) & (rows(one.validation) | rows(one.test))
  assert bool(one.pretrain) == (kind == "lora")
  again = subject.draw(0)
  np.testing.assert_array_equal(one.flipped, again.flipped)


def test_tuning_moves_the_adapters_and_not_the_base():
  subject = mislabel.subject(SMALL, "lora")
  draw, key = subject.draw(0), jax.random.key(0)
  base = subject.base(draw.pretrain, key)
  weights = jnp.ones(len(draw.flipped))
  params = subject.fit(draw.train, weights, base, key)
  jax.tree.map(np.testing.assert_array_equal, params["base"], base)
  assert any(adapter.b.any() for adapter in params["adapters"].values())
  example = streams.example(draw.train)
  outputs = subject.objective.outputs
  found = blocks.trace(outputs, params, example, select=subject.select)
  assert subject.select == lora.ADAPTERS
  assert {b.kind for b in found.blocks.values()} == {"matrix"}
  tracked = sum(b.size for b in found.blocks.values())
  assert tracked == sum(x.size for x in jax.tree.leaves(params["adapters"]))


def test_weights_say_what_is_trained_on():
  subject = mislabel.subject(SMALL, "full")
  draw, key = subject.draw(0), jax.random.key(0)
  kept = jnp.arange(64) < 32
  half = subject.fit(draw.train, kept.astype(float), None, key)
  spoilt = {**draw.train, "x": np.where(
    np.asarray(kept)[:, None, None, None], draw.train["x"], np.nan
  )}  # fmt: skip
  other = subject.fit(spoilt, kept.astype(float), None, key)
  jax.tree.map(np.testing.assert_array_equal, half, other)
  whole = subject.fit(draw.train, jnp.ones(64), None, key)
  assert not np.array_equal(jax.tree.leaves(whole)[0], jax.tree.leaves(half)[0])


def test_configs_are_checked():
  fields = dataclasses.asdict(SMALL)
  assert mislabel.from_config({**fields, "features": [8]}) == SMALL
  with pytest.raises(ValueError, match=r"unknown settings \['depth'\]"):
    mislabel.from_config({**fields, "depth": 3})
  with pytest.raises(ValueError, match=r"unknown subjects \['half'\]"):
    mislabel.from_config({**fields, "subjects": ("half",)})
  with pytest.raises(ValueError, match="train_size or tune_size"):
    mislabel.subject(dataclasses.replace(SMALL, train_size=10**6), "full").draw(
      0
    )
