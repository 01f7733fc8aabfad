"""Planted facts, retrained by the hundred: who taught the model this?

Question: of documents that state a fact, say it otherwise, or only look like
it, does influence rank those first without which the model would not know it?
The data of `configs/planted_lm.py` with words for tokens, one document an
example, so that LDS and removal curves can be had of a language model.

  python -m experiments.lds --config=configs/planted_words.py
  python -m experiments.counterfactual --config=configs/planted_words.py
  (--config=configs/planted_words.py:smoke for a small run)

Hardware: two CPU cores. Time and numbers: see `experiments/README.md`.
"""

from ml_collections import ConfigDict

from configs import defaults


def get_config(size: str = "full") -> ConfigDict:
  config = defaults.new(
    "planted_words",
    dataset="planted",
    likelihood="tokens",
    model="decoder",
    features=(64, 64),
    optimizer="adamw",
    epochs=10,
    batch_size=16,
    learning_rate=2e-3,
    weight_decay=1e-2,
    num_queries=24,
    methods=(
      "random",
      "bm25",
      "representation",
      "gradient_dot",
      "gradient_cosine",
      "tracin",
      "trackstar",
      "ekfac",
      "cg",
      "source",
    ),
    labels="sampled",
    sweep_labels=("sampled",),
    sweep_dampings=("0.01 relative", "0.1 relative", "1 relative"),
    fit_batch_size=112,
    solver_iterations=16,
    subsets=50,
    retrain_seeds=2,
    removal_ks=(0, 2, 4, 8),
    removal_queries=12,
    removal_seeds=2,
  )
  config = defaults.sized(config, size)
  if size == "smoke":
    config.update(train_size=56, test_size=0, features=(32, 32), batch_size=16)
    config.update(num_queries=4, removal_ks=(0, 4), removal_queries=2)
    config.methods = ("bm25", "gradient_dot", "ekfac")
    config.sweep_dampings = ()
  return config
