"""The binary that trains a language model, as a user meets it."""

import functools
import json
import pathlib
import subprocess
import sys

import pytest

from tda.models import pretrained
from tda.report import losses

pytest.importorskip("grain")
pytest.importorskip("safetensors")
ROOT = pathlib.Path(__file__).parent.parent


def test_the_binary_trains_and_takes_up_what_it_left(tmp_path):
  command = [
    sys.executable,
    "-m",
    "experiments.train_lm",
    "--config=configs/stdlib_lm.py:smoke",
    "--config.pattern=a*.py",
    "--config.steps=12",
    f"--workdir={tmp_path}",
  ]
  run = functools.partial(
    subprocess.run,
    command,
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  done = run()
  assert done.returncode == 0, done.stderr[-2000:]
  results = json.loads((tmp_path / "metrics.json").read_text())
  assert 1 < results["held_out_bits_per_byte"] < 8.5
  assert results["filled"] > 0.9
  assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"
  model = pretrained.load(tmp_path / "model")
  assert model.family == "llama" and model.config.vocab == 257
  again = run()
  assert again.returncode == 0 and "12/12" in again.stderr
  metrics = json.loads((tmp_path / "metrics.json").read_text())
  assert {**metrics, "seconds": results["seconds"]} == results


def test_a_curve_needs_losses(tmp_path):
  with pytest.raises(ValueError, match=r"losses of shape \(0,\)"):
    losses.curve(tmp_path / "loss.png", [], 1.0)
