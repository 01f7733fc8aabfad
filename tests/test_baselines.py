"""Baselines by their definitions, and all methods by their names."""

import functools

import jax
import language_models
import numpy as np
import oracles
import pytest
from oracles import N

from tda import blocks, meshes, streams
from tda.attribution import baselines, influence, methods
from tda.curvature import fitting
from tda.data import packing
from tda.inverse import spectral
from tda.models import decoder
from tda.scores import CHANGE, SIMILARITY
from tda.streams import Loop

Q = 4
DAMPINGS = (spectral.relative(0.1), spectral.relative(0.01))


@pytest.fixture(autouse=True, scope="module")
def float64():
  with jax.enable_x64(True):
    yield


@functools.cache
def problem(name="pooled"):
  p = oracles.problem(name)
  return p, {"x": p.data["x"][:Q] + 1, "y": p.data["y"][:Q]}


ONE_PASS = (
  "random",
  "representation",
  "gradient_dot",
  "gradient_cosine",
  "diagonal",
  "kfac",
  "ekfac",
)


@functools.cache
def attributed():
  """Every method in one call, and how many batches were handed out."""
  p, queries = problem()
  with pytest.MonkeyPatch.context() as patch:
    batches, spread = [], meshes.spread
    patch.setattr(meshes, "spread", lambda *a: batches.append(a) or spread(*a))
    scores = methods.attribute(
      p.objective,
      p.params,
      p.data,
      queries,
      methods=ONE_PASS,
      dampings=DAMPINGS,
      key=jax.random.key(0),
    )
  return scores, len(batches)


def unit(rows):
  return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_gradient_cosine_is_of_whole_gradients():
  p, queries = problem()
  train, query = (
    np.concatenate(list(oracles.flat(oracles.gradients(p, d)).values()), axis=1)
    for d in (p.data, queries)
  )
  found = attributed()[0]
  np.testing.assert_allclose(
    found["gradient_cosine"].values, unit(train) @ unit(query).T, rtol=1e-9
  )
  np.testing.assert_allclose(
    found["gradient_dot"].values, train @ query.T / N, rtol=1e-9, atol=1e-12
  )


def test_representations_are_the_mean_inputs_of_the_last_matrix():
  p, queries = problem()
  features = lambda x: np.tanh(x @ np.asarray(p.params["in"]["w"])).mean(axis=1)
  last = attributed()[0]["representation"].values
  expected = unit(features(p.data["x"])) @ unit(features(queries["x"])).T
  np.testing.assert_allclose(last, expected, rtol=1e-9)
  found = blocks.trace(
    p.objective.outputs, p.params, streams.example(p.data), select="in/*"
  )
  first = baselines.representation(
    found, p.objective, p.params, p.data, queries
  )
  mean = lambda data: unit(data["x"].mean(axis=1))
  expected = mean(p.data) @ mean(queries).T
  np.testing.assert_allclose(first.values, expected, rtol=1e-9)


def test_representations_need_a_matrix_and_like_queries():
  p, queries = problem("mixed")
  scale = blocks.trace(
    p.objective.outputs, p.params, streams.example(p.data), select="scale"
  )
  with pytest.raises(ValueError, match=r"none is tracked among \['scale'\]"):
    baselines.representation(scale, p.objective, p.params, p.data, p.data)
  with pytest.raises(ValueError, match="queries: the batch has structure"):
    baselines.representation(
      p.found, p.objective, p.params, p.data, {"x": queries["x"]}
    )


def test_random_scores_are_standard_normal():
  train, queries = {"x": np.zeros((200, 1))}, {"x": np.zeros((50, 1))}
  error = 1 / np.sqrt(200 * 50)
  drawn = [
    baselines.random(jax.random.key(seed), train, queries).values
    for seed in range(3)
  ]
  for values in drawn:
    assert values.shape == (200, 50) and values.dtype == np.float32
    assert abs(values.mean()) < 5 * error
    assert abs(np.mean(values**2) - 1) < 5 * np.sqrt(2) * error
  assert abs(np.mean(drawn[0] * drawn[1])) < 5 * error


def test_names_units_and_order():
  scores, _ = attributed()
  assert list(scores) == [
    *ONE_PASS[:4],
    *(f"{m}@{d}" for m in ("diagonal", "kfac", "ekfac") for d in DAMPINGS),
  ]
  changes = {k for k, s in scores.items() if s.unit == CHANGE}
  assert changes == set(list(scores)[4:]) | {"gradient_dot"}
  for name, found in scores.items():
    assert found.values.shape == (N, Q) and found.method == name
    assert found.normaliser == (N if name in changes else 1)
    assert found.unit in (CHANGE, SIMILARITY)


def test_products_of_gradients_share_one_pass():
  """Moments, squares twice, scores, and representations of both sides."""
  assert attributed()[1] == 6
  scores, _ = attributed()
  p, queries = problem()
  ekfac = fitting.fitter(p.found, p.objective, methods=("ekfac",))
  curvature = ekfac(p.params, p.data)["ekfac"]
  score = influence.scorer(p.found, p.objective)
  response = spectral.inverse(curvature, DAMPINGS[1])
  alone = score(p.params, p.data, queries, {"alone": response})["alone"]
  together = scores["ekfac@0.01 relative"]
  np.testing.assert_allclose(together.values, alone.values, rtol=1e-9)
  assert together.damping == DAMPINGS[1] == alone.damping
  assert together.labels == alone.labels


def test_a_plain_loss_is_enough():
  p, _ = problem()
  options = {"select": "out/*", "loop": Loop(4)}
  found, same = (
    methods.attribute(
      objective, p.params, p.data, p.data, methods=["gradient_dot"], **options
    )["gradient_dot"]
    for objective in (p.objective.loss, p.objective)
  )
  np.testing.assert_allclose(found.values, same.values, rtol=1e-9, atol=1e-12)
  assert found.coverage == 15 / 31


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"methods": ["ekfac", "shampoo"]}, r"\['shampoo'\]; choose of \['random'"),
    ({"methods": []}, r"unknown methods \[\]; choose of"),
    ({"labels": "true"}, "labels 'true': choose"),
    ({"labels": "sampled"}, "give a key"),
    ({"methods": ["random"]}, "give a key"),
    ({"dampings": []}, r"must differ; got \[\]"),
    ({"dampings": [DAMPINGS[0]] * 2}, r"must differ; got"),
    ({"select": "encoder/*"}, r"matches none of the blocks \['in/w'"),
  ],
)
def test_bad_choices_are_refused(options, message):
  p, queries = problem()
  with pytest.raises(ValueError, match=message):
    methods.attribute(p.objective, p.params, p.data, queries, **options)


def test_representations_leave_padding_out():
  config = language_models.tiny("llama")
  params = language_models.draw(config)
  objective = decoder.objective(config)
  pairs = [([3, 1, 4], [1, 5]), ([9, 2], [6])]
  rows = [packing.completion(*pair, 8) for pair in pairs]
  data = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
  other = data | {"x": np.where(data["segments"] > 0, data["x"], 7)}
  found = blocks.trace(objective.outputs, params, streams.example(data))
  first, second = (
    baselines.representation(found, objective, params, x, x).values
    for x in (data, other)
  )
  assert (data["x"] != other["x"]).any()
  np.testing.assert_allclose(first, second, atol=1e-6)
