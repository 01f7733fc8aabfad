"""The binaries as a user meets them: results, second runs, wrong flags."""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent


def run(binary, *flags):
  command = [sys.executable, "-m", f"experiments.{binary}", *flags]
  return subprocess.run(
    command, cwd=ROOT, capture_output=True, text=True, check=False
  )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  folder = tmp_path_factory.mktemp("lds")
  config = f"--config={ROOT}/configs/digits_mlp.py:smoke"
  flags = (
    config,
    f"--workdir={folder}",
    "--config.sweep_labels=()",
    "--config.methods=('random','ekfac')",
  )
  done = run("lds", *flags)
  assert done.returncode == 0, done.stderr[-2000:]
  return folder, flags, done


def test_lds_writes_metrics_figures_and_a_table(finished):
  folder, _, done = finished
  metrics = json.loads((folder / "metrics.json").read_text())
  assert set(metrics["lds"]) == {"random", "ekfac"}
  assert all(set(x) == {"mean", "low", "high"} for x in metrics["lds"].values())
  for interval in metrics["lds"].values():
    assert -1 <= interval["low"] <= interval["mean"] <= interval["high"] <= 1
  assert 0 <= metrics["noise_ceiling"] <= 1
  assert {"train", "scores", "bank", "figures"} <= set(metrics["seconds"])
  assert "EK-FAC" in done.stdout and "noise ceiling" in done.stdout
  assert "retrain" in done.stderr  # the progress bar
  for name in ("lds", "predicted_vs_actual", "influential_images"):
    assert (folder / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
  report = (folder / "report.html").read_text()
  assert report.count("data:image/png") == 3 and "noise ceiling" in report
  assert "retrain_seeds" in report and "Linear datamodelling score" in report
  config = json.loads((folder / "config.json").read_text())
  assert config["dataset"] == "digits"


def test_a_second_run_redoes_nothing(finished):
  folder, flags, done = finished
  before = {p: p.stat().st_mtime_ns for p in folder.glob("*.npz")}
  again = run("lds", *flags)
  assert again.returncode == 0, again.stderr[-2000:]
  assert {p: p.stat().st_mtime_ns for p in folder.glob("*.npz")} == before
  table = lambda text: [x for x in text.splitlines() if "[" in x]
  assert table(again.stdout) == table(done.stdout)
  assert "retrain" not in again.stderr


@pytest.mark.parametrize(
  ("flag", "message"),
  [
    ("--seed=7", "seed: 0 there, 7 here"),
    ("--config.methods=('ekfax',)", "methods"),
  ],
)
def test_a_workdir_of_another_config_is_refused(finished, flag, message):
  _, flags, _ = finished
  refused = run("lds", *flags, flag)
  assert refused.returncode != 0
  assert "holds a run of another config" in refused.stderr
  assert message in refused.stderr


def test_wrong_flags_say_what_to_do(tmp_path):
  workdir = f"--workdir={tmp_path}"
  missing = run("lds", workdir)
  assert missing.returncode != 0 and "--config=configs/" in missing.stderr
  config = f"--config={ROOT}/configs/fashion_mnist.py:smoke"
  no_data = run("lds", config, workdir)
  assert no_data.returncode != 0 and "data_dir" in no_data.stderr
