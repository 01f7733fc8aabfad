"""Training of a decoder: it learns, goes on after a kill, and on a mesh."""

import functools

import jax
import numpy as np
import pytest
from language_models import VOCAB, draw, tiny
from language_models import tokens as random_tokens

from tda import checkpoints, meshes, streams
from tda.data import packing
from tda.models import decoder, sharding, training
from tda.models.training import Recipe

pytest.importorskip("grain")
RECIPE = Recipe(steps=12, batch_size=4, learning_rate=0.02, warmup=2)
CONFIG = tiny("llama", width=16, layers=1, scan_layers=False)


@pytest.fixture(scope="module")
def rows():
  """Documents that count upwards from a random start."""
  starts = random_tokens(40)
  documents = [(start + np.arange(9)) % VOCAB for start in starts]
  return packing.pack(documents, 16, seed=0)


@pytest.fixture(scope="module")
def trained(rows):
  return training.train(CONFIG, RECIPE, rows)


def test_it_learns(rows, trained):
  assert trained.losses.shape == (12,)
  assert trained.losses[-1] < 0.7 * trained.losses[0]
  total = training.surprisal(CONFIG, trained.params, rows, streams.Loop(7))
  assert 0.5 * trained.losses[-1] < total / rows["mask"].sum()
  assert total / rows["mask"].sum() < trained.losses[-4:].max()


class Killed(Exception):
  pass


def test_a_stopped_run_goes_on(rows, trained, tmp_path, monkeypatch):
  saves = []
  save = checkpoints.save

  def save_twice(directory, tree):
    save(directory, tree)
    saves.append(int(tree["step"]))
    if saves == [1, 2, 3]:
      raise Killed

  monkeypatch.setattr(checkpoints, "save", save_twice)
  run = functools.partial(
    training.train, CONFIG, RECIPE, rows, directory=str(tmp_path)
  )
  with pytest.raises(Killed):
    run(save_every=0)
  again = run()
  assert saves == [1, 2, 3, 12]
  np.testing.assert_array_equal(again.losses, trained.losses)
  jax.tree.map(np.testing.assert_array_equal, again.params, trained.params)


def test_a_mesh_changes_nothing(rows, trained):
  mesh = meshes.mesh(data=4, model=2)
  spread = training.train(CONFIG, RECIPE, rows, mesh=mesh)
  np.testing.assert_allclose(spread.losses, trained.losses, rtol=1e-3)
  kernel = spread.params["blocks_0"]["mlp_in"]["kernel"]
  assert kernel.sharding.shard_shape(kernel.shape) == (16, 6)


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "gpt_neox"])
def test_parameters_are_cut_where_it_helps(family):
  mesh = meshes.mesh(data=4, model=2)
  shapes = decoder.shapes(tiny(family))
  placed = sharding.shardings(shapes, mesh)
  cut = jax.tree.map(lambda s, x: s.shard_shape(x.shape), placed, shapes)
  attention = cut["blocks"]["attention"]
  heads = tiny(family).heads
  assert attention["query"]["kernel"][:3] == (2, 8, heads // 2)
  assert attention["output"]["kernel"][:2] == (2, heads // 2)
  layers = cut["blocks"].get("experts", cut["blocks"])
  hidden = tiny(family).hidden
  assert layers["mlp_in"]["kernel"][-2:] == (8, hidden // 2)
  assert layers["mlp_out"]["kernel"][-2:] == (hidden // 2, 8)
  assert cut["tokens"]["embedding"] == (13, 8)  # 13 is odd


def test_refuses(rows):
  with pytest.raises(ValueError, match="a warm-up of 5 steps in a run of 5"):
    training.optimizer(RECIPE._replace(steps=5, warmup=5))
  with pytest.raises(ValueError, match=r"batch_size=6 must be .* 4 devices"):
    mesh = meshes.mesh(data=4, model=2)
    training.train(CONFIG, RECIPE._replace(batch_size=6), rows, mesh=mesh)
  hidden = {**rows, "mask": np.zeros_like(rows["mask"])}
  with pytest.raises(ValueError, match="hides every token"):
    training.train(CONFIG, RECIPE, hidden)
  broken = jax.tree.map(lambda x: x * np.nan, draw(CONFIG))
  with pytest.raises(ValueError, match="loss is nan before step 0"):
    training.train(CONFIG, RECIPE, rows, params=broken)
  assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(broken))
