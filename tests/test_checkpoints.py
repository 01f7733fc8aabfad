"""Checkpoints and parts: what is read back, and what a kill can leave."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tda import checkpoints, meshes, parts


def tree(scale=1):
  return {
    "sums": [scale * jnp.arange(16.0).reshape(8, 2)],
    "half": scale * jnp.ones(3, jnp.bfloat16),
    "seen": jnp.asarray(7 * scale, jnp.int32),
    "none": None,
  }


def assert_same(found, expected):
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
    assert a.dtype == b.dtype


def test_the_newest_is_read_back(tmp_path):
  folder = str(tmp_path / "a" / "b")
  assert not checkpoints.exists(folder)
  for scale in (1, 2, 3):
    checkpoints.save(folder, tree(scale))
  assert checkpoints.exists(folder)
  assert_same(checkpoints.load(folder, tree()), tree(3))
  assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == [
    "2",
    "2.json",
  ]


@pytest.mark.parametrize("devices", [(8, 2), (2, 8), (8, None), (None, 8)])
def test_a_checkpoint_moves_between_device_counts(tmp_path, devices):
  def placed(count):
    if count is None:
      return tree()
    rows = NamedSharding(meshes.mesh(count), P("data"))
    return {**tree(), "sums": [jax.device_put(tree()["sums"][0], rows)]}

  before, after = map(placed, devices)
  checkpoints.save(str(tmp_path), before)
  found = checkpoints.load(str(tmp_path), after)
  assert_same(found, tree())
  assert found["sums"][0].sharding == after["sums"][0].sharding
  assert not found["half"].committed  # free to join arrays on any mesh


def test_a_kill_leaves_the_one_before(tmp_path, monkeypatch):
  """While it is written, and when the old one was not yet deleted."""
  folder = str(tmp_path)
  checkpoints.save(folder, tree(1))

  def killed(path, tree):
    (path.parent / f"{path.name}.orbax-checkpoint-tmp").mkdir()
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(checkpoints.ocp, "save", killed)
    with pytest.raises(KeyboardInterrupt):
      checkpoints.save(folder, tree(2))
  assert_same(checkpoints.load(folder, tree()), tree(1))
  shutil.copytree(tmp_path / "0", tmp_path / "old")
  checkpoints.save(folder, tree(3))
  (tmp_path / "old").rename(tmp_path / "0")
  assert_same(checkpoints.load(folder, tree()), tree(3))


@pytest.mark.parametrize(
  ("like", "message"),
  [
    ({"extra": jnp.ones(2)}, r"\['extra'\]: None there, float32\[2\] here"),
    ({"half": jnp.ones(3)}, r"bfloat16\[3\] there, float32\[3\] here"),
    ({"sums": [jnp.ones((2, 8))]}, r"float32\[8, 2\] there"),
    ({"seen": None}, r"\['seen'\]: int32\[\] there, None here"),
  ],
)
def test_a_checkpoint_of_something_else_is_refused(tmp_path, like, message):
  checkpoints.save(str(tmp_path), tree())
  with pytest.raises(ValueError, match=message):
    checkpoints.load(str(tmp_path), {**tree(), **like})


def test_a_missing_checkpoint_is_said_to_be(tmp_path):
  with pytest.raises(ValueError, match=r"no checkpoint in .*nothing"):
    checkpoints.load(str(tmp_path / "nothing"), tree())


def test_parts_come_back_in_order(tmp_path):
  store = parts.opened(tmp_path, {"seed": 1})
  for start in (20, 3):
    store.save(
      np.arange(start, start + 2), [np.full((2, 2), start), np.ones(2)]
    )
  found = list(parts.opened(tmp_path, {"seed": 1}).load())
  assert [list(positions) for positions, _ in found] == [[3, 4], [20, 21]]
  np.testing.assert_array_equal(found[1][1][0], np.full((2, 2), 20))
  assert not list(parts.opened(None, {}).load())


def test_parts_of_another_computation_are_refused(tmp_path):
  parts.opened(tmp_path, {"seed": 1, "lr": 0.1})
  with pytest.raises(ValueError, match="results of other lr and steps:"):
    parts.opened(tmp_path, {"seed": 1, "lr": 0.2, "steps": 3})


def test_a_part_appears_when_it_is_whole(tmp_path):
  with (
    pytest.raises(KeyboardInterrupt),
    parts.replacing(tmp_path / "x") as file,
  ):
    file.write(b"half")
    raise KeyboardInterrupt
  assert not list(tmp_path.iterdir())


def test_saving_keeps_to_a_tenth_of_the_time(monkeypatch):
  now = 0.0
  monkeypatch.setattr(checkpoints.time, "monotonic", lambda: now)
  pace = checkpoints.Pace(60)
  now = 59
  assert not pace.due()
  now = 61
  assert pace.due()
  with pace.saving():
    now += 1
  now += 59
  assert not pace.due()
  now += 2
  assert pace.due()
  with pace.saving():
    now += 20
  now += 179
  assert not pace.due()
  now += 2
  assert pace.due()
