# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # From a model to a report
#
# A small language model is looked at, half of its weights are set to zero by Wanda, and the others are trained a
# little. In the end its perplexity is known dense, pruned and fine-tuned, and the model is saved. No GPU is needed.
# With `ipywidgets` installed, bars show how far it is.

# %%
import logging
import warnings

from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from wanda_lightning import CausalLM, PruningTrainer, TextDataModule, WandaPruning, inspect_model

MODEL = "HuggingFaceTB/SmolLM2-135M"  # a name on the hub, a folder or a .gguf file

# What others say on every start is left out.
logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
warnings.filterwarnings("ignore", module="lightning|rich|tqdm")
disable_progress_bar()

# %% [markdown]
# ## What would be pruned
#
# The linears of the decoder layers, told from the config alone. Embeddings, norms and the head stay as they are.

# %%
for kind in inspect_model(MODEL).kinds:
    print(f"{kind.name:20} {kind.count} of {kind.shape[0]} x {kind.shape[1]}")

# %% [markdown]
# ## Pruning
#
# Calibration and evaluation take text that comes with Python; `TextDataModule("my_text.txt")` takes yours, and
# `TextDataModule("c4", evaluation="wikitext2")` what papers take. The model is evaluated before and after.

# %%
module = CausalLM(MODEL)
data = TextDataModule(num_samples=32, sequence_length=256, max_evaluation_windows=24, batch_size=2)
trainer = PruningTrainer(
    callbacks=[WandaPruning(sparsity=0.5, output_dir="results/notebook")],
    max_steps=16,
    gradient_clip_val=1.0,
    logger=False,
    enable_checkpointing=False,
    enable_model_summary=False,
)
report = trainer.prune(module, data)
report.evaluations

# %% [markdown]
# ## Fine-tuning
#
# `fit` does not prune again. The zeros stay exactly zero, whatever the optimizer does.

# %%
trainer.fit(module, data)
trainer.validate(module, data)
trainer.save_pretrained(module)

# %% [markdown]
# ## The report
#
# Read back from the weights. `results/notebook/report.html` shows it with maps of errors, layer by layer.

# %%
report

# %% [markdown]
# ## The saved model
#
# It is an ordinary one, with zeros, as a look at its files shows.

# %%
weights = inspect_model("results/notebook/model").weights
print(f"{weights.sparsity:.1%} of the pruned linears are zero, and the model loads whole: {weights.check.loads_whole}")

tokenizer = AutoTokenizer.from_pretrained("results/notebook/model")
model = AutoModelForCausalLM.from_pretrained("results/notebook/model")
prompt = tokenizer("The capital of France is", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=12, do_sample=False)[0]))
