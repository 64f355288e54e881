"""What is left of a pruned model is trained: masks, adapters, distillation."""
