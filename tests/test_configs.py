"""Every config file is a setting that its binary can run."""

import dataclasses
import importlib
import pathlib

import pytest

import configs
from tda.attribution import inverses
from tda.data import registry
from tda.evaluation import along, mislabel, problem, settings

NOISY = ("mislabel", "selection")  # of another kind of setting
LANGUAGE = (
  "stdlib_lm",
  "planted_lm",
  "maths_lm",
  "mixed_lm",
  "selection_lm",
  "store",
)  # of a third
SETS = ("along", "solvers", "projections")  # of other sizes than full and smoke


def test_config_along_the_run_has_every_size():
  module = importlib.import_module("configs.along")
  for size in module.SIZES:
    plain, adamw = (
      settings.from_config(module.get_config(name).to_dict())
      for name in (size, f"{size}_adamw")
    )
    assert (plain.optimizer, adamw.optimizer) == ("sgd", "adamw")
    assert plain.dataset in registry.NAMES
    assert "training" in plain.sweep_dampings
    assert "training" not in adamw.sweep_dampings
    assert (
      f"  {size} " in module.__doc__
      or f"`{size}`" in module.__doc__
      or (size == "smoke")
    )


CONFIGS = sorted(
  path.stem
  for path in pathlib.Path(configs.__path__[0]).glob("*.py")
  if path.stem not in ("__init__", "defaults", *NOISY, *LANGUAGE, *SETS)
)


@pytest.mark.parametrize("name", NOISY)
@pytest.mark.parametrize("size", ["digits", "mnist5k", "smoke"])
def test_config_of_noisy_labels(name, size):
  module = importlib.import_module(f"configs.{name}")
  setting = mislabel.from_config(module.get_config(size).to_dict())
  assert (setting.name, setting.noise) == (size, 0.2)
  assert setting.dataset in registry.NAMES
  assert setting.damping in setting.dampings
  with pytest.raises(ValueError, match="unknown size 'full'"):
    module.get_config("full")


@pytest.mark.parametrize(
  ("name", "size", "methods"),
  [
    ("solvers", "digits", inverses.NAMES),
    ("solvers", "mnist5k", inverses.NAMES),
    ("solvers", "smoke", inverses.NAMES),
    ("along", "noisy", {*along.METHODS, "trak"} - {"less"}),
    ("along", "rotated_adamw", {*along.METHODS, "trak"} - {"unrolled"}),
    ("along", "cnn", {*along.METHODS, "trak"} - {"less", "unrolled"}),
    ("along", "few_adamw", {*along.METHODS, "trak"}),
    ("along", "smoke", {*along.METHODS, "trak"} - {"less"}),
  ],
)
def test_config_of_many_methods_names_them_all(name, size, methods):
  module = importlib.import_module(f"configs.{name}")
  setting = settings.from_config(module.get_config(size).to_dict())
  assert setting.name == f"{name}_{size}"
  assert set(methods) <= set(setting.methods)
  small = {"train_size": 256, "second_size": min(setting.second_size, 100)}
  task = problem.build(dataclasses.replace(setting, **small))
  dampings = [task.damping(text) for text in setting.sweep_dampings]
  assert len(set(dampings)) == len(dampings)
  with pytest.raises(ValueError, match="unknown size 'full'"):
    module.get_config("full")


@pytest.mark.parametrize("name", CONFIGS)
def test_config_is_a_setting_of_a_known_set(name):
  module = importlib.import_module(f"configs.{name}")
  full, smoke = (
    settings.from_config(module.get_config(size).to_dict())
    for size in ("full", "smoke")
  )
  assert (full.name, smoke.name) == (name, f"{name}_smoke")
  assert full.dataset in registry.NAMES
  regression = full.dataset in ("diabetes", "parkinsons", "concrete")
  language = "tokens" if full.dataset == "planted" else "categorical"
  assert full.likelihood == ("gaussian" if regression else language)
  for size in (full, smoke):
    assert size.removal_ks[0] == 0
    assert size.removal_queries <= size.num_queries
  assert smoke.subsets * smoke.retrain_seeds < 20
  assert f"--config=configs/{name}.py" in module.__doc__
  with pytest.raises(ValueError, match=r"'tiny'.*full.*smoke"):
    module.get_config("tiny")
