"""Prune a model, and fine-tune it with its zeros kept, in the Trainer of Hugging Face."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from wanda_lightning import KeepZeros, prune_model, save_pretrained

MODEL, TEXT, LENGTH = "HuggingFaceTB/SmolLM2-135M", "my_text.txt", 512

model, tokenizer = AutoModelForCausalLM.from_pretrained(MODEL), AutoTokenizer.from_pretrained(MODEL)
ids = torch.tensor(tokenizer(Path(TEXT).read_text(encoding="utf-8"))["input_ids"])
windows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)

report = prune_model(model, windows[:32].split(4), "wanda", 0.5)

trainer = Trainer(
    model,
    TrainingArguments("results/trainer", learning_rate=1e-5, weight_decay=0.1, max_steps=100),
    train_dataset=[{"input_ids": window, "labels": window} for window in windows],
    callbacks=[KeepZeros()],
)
trainer.train()  # resume_from_checkpoint=True goes on after an interruption, with the same zeros

save_pretrained(model, tokenizer, "results/trainer/model")
print(report.summary)
