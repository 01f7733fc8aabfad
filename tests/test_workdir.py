"""A run's folder: stages are computed once, another config is refused."""

import json

import numpy as np
import pytest

from tda.evaluation.workdir import Workdir


def test_a_finished_stage_is_not_run_again(tmp_path):
  calls = []

  def compute():
    calls.append(1)
    return {"x": np.arange(3.0)}

  for _ in range(2):
    found = Workdir(tmp_path, {"seed": 0}).stage("score", compute)
    np.testing.assert_array_equal(found["x"], np.arange(3.0))
  assert len(calls) == 1
  assert Workdir(tmp_path, {"seed": 0}).metrics()["seconds"]["score"] >= 0


def test_reading_again_keeps_the_seconds_of_the_run(tmp_path):
  workdir = Workdir(tmp_path, {"seed": 0})
  workdir.record("seconds", {"train": 100.0})
  with workdir.timed("train"):
    pass
  with workdir.timed("fit"):
    pass
  seconds = workdir.metrics()["seconds"]
  assert seconds["train"] == 100 and seconds["fit"] < 100


def test_a_stage_that_fails_leaves_nothing_behind(tmp_path):
  workdir = Workdir(tmp_path, {"seed": 0})

  def fail():
    raise ValueError("diverged")

  with pytest.raises(ValueError, match="diverged"):
    workdir.stage("score", fail)
  assert "seconds" not in workdir.metrics()
  assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json"]


def test_another_config_is_refused_and_nothing_is_lost(tmp_path):
  Workdir(tmp_path, {"seed": 0, "epochs": 3}).record("lds", {"ekfac": 0.5})
  with pytest.raises(ValueError, match=r"epochs: 3 there, 4 here"):
    Workdir(tmp_path, {"seed": 0, "epochs": 4})
  kept = json.loads((tmp_path / "config.json").read_text())
  assert kept == {"seed": 0, "epochs": 3}
  assert Workdir(tmp_path, kept).metrics() == {"lds": {"ekfac": 0.5}}


def test_recorded_mappings_join(tmp_path):
  workdir = Workdir(tmp_path, {})
  workdir.record("seconds", {"train": 1.0})
  workdir.record("seconds", {"bank": 2.0})
  workdir.record("noise_ceiling", 0.9)
  assert workdir.metrics() == {
    "seconds": {"train": 1.0, "bank": 2.0},
    "noise_ceiling": 0.9,
  }


def test_what_is_said_is_printed_and_kept(tmp_path, capsys):
  workdir = Workdir(tmp_path, {"seed": 0})
  workdir.say("one")
  workdir.say("two")
  assert capsys.readouterr().out == "one\ntwo\n"
  assert workdir.said == ["one", "two"] and workdir.config == {"seed": 0}


def test_config_tuples_survive_the_round_trip(tmp_path):
  Workdir(tmp_path, {"features": (8, 8)})
  Workdir(tmp_path, {"features": (8, 8)})
