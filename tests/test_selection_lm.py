"""Choosing documents for a kind of text, by a model of pairs of letters."""

import jax
import numpy as np
import pytest

pytest.importorskip("ml_collections")

from configs import selection_lm
from experiments import selection_task as task
from tda.data.text import Tokenizer
from tda.evaluation.workdir import Workdir
from tda.likelihoods import Objective, token_categorical

LETTERS = "abcdef"
BY = Tokenizer(7, lambda text: [*map(LETTERS.index, text.split())], str, 6)
OBJECTIVE = Objective(
  lambda params, row: params["table"][row["x"]] @ params["head"],
  token_categorical("mean"),
  lambda row: (row["y"], row["mask"]),
)


def init(key):
  keys = jax.random.split(key)
  shapes = {"table": (7, 4), "head": (4, 7)}
  return {
    name: 0.3 * jax.random.normal(k, shape)
    for k, (name, shape) in zip(keys, shapes.items(), strict=True)
  }


def setting(**fields):
  config = selection_lm.get_config("smoke")
  config.update(sites="all", length=10, learning_rate=0.03, ask=6, validation=4)
  config.update(tune_learning_rate=0.03, fractions=(0.25, 0.5), dimension=8)
  config.update(fields)
  return config


def texts():
  """Forty documents of the first three letters, and of the last three."""
  rng = np.random.default_rng(0)
  draw = lambda letters: " ".join(rng.choice([*letters], 12))
  kinds = {"first": LETTERS[:3], "last": LETTERS[3:]}
  return {f"{k}/{i}": draw(x) for k, x in kinds.items() for i in range(40)}


def test_documents_are_held_out_and_cut_to_rows():
  draw = task.split(setting(), texts(), BY, seed=3)
  assert draw.own.sum(axis=0).tolist() == [34, 34]
  assert {len(x["x"]) for x in (draw.train, draw.test)} == {68, 4}
  assert not {*draw.texts} & {*draw.asked} and len(draw.asked) == 8
  assert draw.validation["x"].shape == (8, 10)
  first = draw.validation["x"] < 3
  assert (first.all(axis=1) == [True, False] * 4).all()
  assert (draw.train["x"].max(axis=1) < 3).tolist() == draw.own[:, 0].tolist()
  assert draw.train["mask"].all()
  with pytest.raises(ValueError, match="validation=6 of ask=6"):
    task.split(setting(validation=6), texts(), BY, 0)
  alone = {k: x for k, x in texts().items() if k[0] == "f"}
  with pytest.raises(ValueError, match="of 1 kind"):
    task.split(setting(), alone, BY, 0)


def test_subtasks_are_means_over_their_target():
  means = task.subtasks(setting(subtasks=2), 2)
  half = [[0.5, 0, 0.5, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0.5, 0, 0.5, 0]]
  np.testing.assert_array_equal(means, half + [[0, *x[:-1]] for x in half])
  with pytest.raises(ValueError, match=r"validation=4 .* subtasks=3"):
    task.subtasks(setting(subtasks=3), 2)


def test_what_shares_no_letter_with_the_target_is_not_chosen(tmp_path):
  config = setting()
  draw = task.split(config, texts(), BY, 0)
  one = task.subject(config, draw, OBJECTIVE, init)
  found = task.compared(config, one, draw, 0, Workdir(tmp_path, {}))
  assert {*found} == {
    *task.METHODS,
    *task.REFERENCES,
    *(f"share {name}" for name in task.METHODS),
  }
  shape = len(config.fractions), 2
  for name in ("less", "gradient_cosine", "gradient_dot", "bm25", "own_kind"):
    assert found[f"share {name}"].shape == shape
    np.testing.assert_array_equal(found[f"share {name}"][0], 1)
    change = (found[name] - found["random"])[0]
    assert (np.diagonal(change) < 0).all()
    assert change[0, 1] > 0 and change[1, 0] > 0
  for name in task.REFERENCES:
    assert found[name].shape == (*shape, 2)
    assert (found[name] == found[name][0, 0]).all()
  assert (found["all_documents"] < found["no_training"]).all()
