"""Settings become data, model, training and measurements."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tda import runs
from tda.attribution import methods
from tda.evaluation import along, problem, settings, stages
from tda.evaluation.settings import Setting
from tda.evaluation.workdir import Workdir
from tda.inverse import spectral

SETTING = Setting(
  name="test",
  dataset="digits",
  train_size=64,
  test_size=8,
  features=(8,),
  epochs=2,
  batch_size=16,
  num_queries=5,
  methods=("gradient_dot", "diagonal", "ekfac"),
  sweep_labels=("empirical", "sampled"),
  sweep_dampings=("0.01 relative",),
  subsets=3,
  retrain_seeds=2,
)


def test_unknown_fields_are_named():
  with pytest.raises(ValueError, match=r"unknown settings \['epoch'\]"):
    settings.from_config({"name": "x", "dataset": "digits", "epoch": 3})


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("likelihood", "poisson"),
    ("measurement", "accuracy"),
    ("optimizer", "lion"),
    ("dataset", "cifar"),
    ("model", "vit"),
  ],
)
def test_unknown_choices_list_what_there_is(field, value):
  setting = dataclasses.replace(SETTING, **{field: value})
  with pytest.raises(ValueError, match=rf"unknown {field} '{value}'; choose"):
    problem.build(setting)


def test_measure_is_the_loss_and_whether_the_query_is_right():
  task = problem.build(SETTING)
  params = task.train(jnp.ones(64), task.key_for("attributed model"))
  measured = task.measure(params)
  outputs = jax.vmap(task.objective.outputs, (None, 0))(params, task.queries)
  logits = np.asarray(outputs, np.float64)
  right = logits.argmax(axis=1) == task.queries["y"]
  picked = logits[np.arange(5), task.queries["y"]]
  expected = np.log(np.exp(logits).sum(axis=1)) - picked
  np.testing.assert_allclose(measured["value"], expected, rtol=1e-5)
  np.testing.assert_array_equal(measured["correct"], right)


def test_keys_differ_by_use_and_by_seed():
  task = problem.build(SETTING)
  other = problem.build(dataclasses.replace(SETTING, seed=1))
  keys = [task.key_for("bank"), task.key_for("knab"), other.key_for("bank")]
  data = {np.asarray(jax.random.key_data(key)).tobytes() for key in keys}
  assert len(data) == 3


def test_the_damping_of_the_training_is_one_over_its_steps():
  """64 examples in batches of 16 for 2 epochs are 8 steps of .03 / (1 - .9)."""
  task = problem.build(SETTING)
  found = task.damping("training")
  assert found.kind == "absolute"
  assert found.value == pytest.approx(1 / (8 * 0.3))
  assert task.damping("0.2 relative") == spectral.relative(0.2)
  adamw = problem.build(dataclasses.replace(SETTING, optimizer="adamw"))
  with pytest.raises(ValueError, match=r"'training' is for sgd.*'adamw'"):
    adamw.damping("training")


def test_sweep_rows_are_named_and_do_not_replace_the_main_ones(tmp_path):
  task = problem.build(SETTING)
  workdir = Workdir(tmp_path, dataclasses.asdict(SETTING))
  params = stages.trained(task, workdir)
  rows = stages.attributed(task, workdir)
  assert set(rows) == {
    "gradient_dot",
    "diagonal",
    "ekfac",
    "diagonal@0.01 relative",
    "ekfac@0.01 relative",
    "diagonal@0.01 relative, sampled",
    "ekfac@0.01 relative, sampled",
  }
  assert rows["ekfac"].damping == "0.1 relative"
  assert rows["ekfac@0.01 relative, sampled"][1:3] == (
    "sampled",
    "0.01 relative",
  )
  assert rows["gradient_dot"][1:3] == ("", "")
  different = np.abs(rows["ekfac"].scores - rows["ekfac@0.01 relative"].scores)
  assert different.max() > 0
  again = stages.attributed(task, workdir)
  for name, row in rows.items():
    np.testing.assert_array_equal(row.scores, again[name].scores)
  restored = stages.trained(task, workdir)
  jax.tree.map(np.testing.assert_array_equal, restored, params)


ALONG = dataclasses.replace(
  SETTING,
  methods=("gradient_dot", *(m for m in along.METHODS if m != "less")),
  checkpoints=4,
  segments=2,
  sweep_labels=(),
  sweep_dampings=(),
)


def test_methods_that_look_at_the_run_have_rows_and_its_last_state(tmp_path):
  setting = ALONG
  task = problem.build(setting)
  workdir = Workdir(tmp_path, dataclasses.asdict(setting))
  params = stages.trained(task, workdir)
  rows = stages.attributed(task, workdir)
  assert set(rows) == set(setting.methods)
  assert rows["source"].labels == "sampled" and rows["tracin"].labels == ""
  for row in rows.values():
    assert row.scores.shape == (64, 5) and np.isfinite(row.scores).all()
  different = np.abs(rows["source"].scores - rows["fast_source"].scores)
  assert 0 < different.max() < np.abs(rows["source"].scores).max()
  train = lambda w: task.train(w, task.key_for("attributed model"))
  slope = jax.jvp(
    lambda w: task.measure(train(w))["value"],
    (jnp.ones(64),),
    (jnp.zeros(64).at[7].set(1.0),),
  )[1]
  unrolled = rows["unrolled"].scores[7]
  np.testing.assert_allclose(unrolled, -slope, rtol=1e-3, atol=1e-5)
  points = along.passed(task, 0, workdir)
  assert [point.step for point in points] == [2, 4, 6, 8]
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
  jax.tree.map(close, points[-1].params, params)
  # 64 examples in batches of 16: momentum has not built up in eight steps.
  assert 0 < points[-1].rate < 8 * 0.03 / (1 - 0.9)


def test_an_ensemble_has_the_mean_of_its_members_scores(tmp_path):
  setting = dataclasses.replace(
    SETTING,
    methods=("gradient_dot", "ekfac", "tracin", "less", "trak"),
    optimizer="adamw",
    sweep_labels=(),
    sweep_dampings=(),
    ensemble=2,
    trak_dimension=8,
  )
  task = problem.build(setting)
  workdir = Workdir(tmp_path, dataclasses.asdict(setting))
  rows = stages.attributed(task, workdir)
  assert {*rows} == {
    f"{m}{of}" for m in setting.methods for of in ("", " of 2")
  }
  one, two = (stages.trained(task, workdir, i) for i in (0, 1))
  assert float(abs(one["layers_0"]["bias"] - two["layers_0"]["bias"]).max()) > 0
  found = [
    methods.attribute(
      task.objective,
      params,
      task.dataset.train,
      dict(task.queries),
      methods=["gradient_dot"],
    )["gradient_dot"].values
    for params in (one, two)
  ]
  np.testing.assert_allclose(
    rows["gradient_dot of 2"].scores,
    np.mean(found, axis=0),
    rtol=1e-4,
    atol=1e-9,
  )
  assert rows["gradient_dot of 2"].models == 2 and rows["tracin"].models == 1
  for row in rows.values():
    assert row.scores.shape == (64, 5) and np.isfinite(row.scores).all()


def test_a_second_stage_follows_and_is_never_left_out(tmp_path):
  setting = dataclasses.replace(
    ALONG,
    methods=("ekfac", "tracin", "source", "unrolled"),
    second_stage="rotated",
    second_size=24,
    second_epochs=3,
  )
  task = problem.build(setting)
  assert [len(stage.data["y"]) for stage in task.stages] == [40, 24]
  train = runs.trainer(task.init, task.stages)
  key, half = jax.random.key(5), (jnp.arange(40) % 2).astype(jnp.float32)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
  for weights in (jnp.ones(40), half):
    want = train([weights, jnp.ones(24)], key)
    jax.tree.map(close, task.train(weights, key), want)
    if weights is half:
      jax.tree.map(close, task.trained_on(20)(weights, key), want)
  workdir = Workdir(tmp_path, dataclasses.asdict(setting))
  rows = stages.attributed(task, workdir)
  steps = [(p.step, p.stage) for p in along.passed(task, 0, workdir)]
  first, second = (2, 3, 4, 6), (8, 9, 10, 12)
  assert steps == [*((k, 0) for k in first), *((k, 1) for k in second)]
  slope = jax.jvp(
    lambda w: task.measure(task.train(w, task.run_key()))["value"],
    (jnp.ones(40),),
    (jnp.zeros(40).at[7].set(1.0),),
  )[1]
  unrolled = rows["unrolled"].scores[7]
  np.testing.assert_allclose(unrolled, -slope, rtol=1e-3, atol=1e-5)
  assert all(row.scores.shape == (40, 5) for row in rows.values())


def test_repetitions_of_the_attributed_run(tmp_path):
  setting = dataclasses.replace(
    SETTING, masked=True, same_seed=True, subset_fraction=0.9
  )
  task = problem.build(setting)
  bank = stages.retrained(task, Workdir(tmp_path, dataclasses.asdict(setting)))
  assert bank["value"].shape == (3, 1, 5)
  params = task.train(jnp.asarray(bank["weights"][1]), task.run_key())
  np.testing.assert_allclose(
    bank["value"][1, 0], task.measure(params)["value"], rtol=1e-4
  )


def test_a_language_model_is_right_where_every_token_of_the_answer_is(tmp_path):
  setting = dataclasses.replace(
    SETTING,
    dataset="planted",
    train_size=28,
    test_size=0,
    likelihood="tokens",
    model="decoder",
    features=(32,),
    methods=("bm25",),
  )
  task = problem.build(setting)
  params, queries = task.init(jax.random.key(0)), task.queries
  outputs = jax.vmap(task.objective.outputs, (None, 0))(params, queries)
  log_p = np.asarray(jax.nn.log_softmax(outputs), np.float64)
  asked = queries["mask"] > 0
  picked = np.take_along_axis(log_p, queries["y"][..., None], 2)[..., 0]
  said = dict(task.queries) | {"y": log_p.argmax(axis=2)}
  half = {k: np.concatenate([queries[k], said[k]]) for k in queries}
  half["y"][0][asked[0]] = said["y"][0][asked[0]]  # right but for one token
  half["y"][0][np.argmax(asked[0])] += 1
  measured = task.measure.func(half, params)
  np.testing.assert_array_equal(measured["correct"], [0, 0, 1, 1])
  np.testing.assert_allclose(
    measured["value"][1], -picked[1][asked[1]].sum(), rtol=1e-5
  )
  scores = stages.attributed(task, Workdir(str(tmp_path), {}))["bm25"].scores
  assert task.relevant[scores[:, 0].argmax(), 0]
  with pytest.raises(ValueError, match="digits has none"):
    problem.build(dataclasses.replace(SETTING, methods=("bm25",)))


def test_texts_have_their_own_likelihood_and_no_margin():
  for wrong, message in (
    ({"likelihood": "tokens"}, "'tokens' for digits"),
    ({"dataset": "planted", "train_size": 14, "test_size": 0}, "for planted"),
    (
      {
        "dataset": "planted",
        "train_size": 14,
        "test_size": 0,
        "likelihood": "tokens",
        "measurement": "margin",
      },
      "measurement='margin' for planted",
    ),
  ):
    with pytest.raises(ValueError, match=message):
      problem.build(dataclasses.replace(SETTING, **wrong))
