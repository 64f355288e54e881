"""Other forms of a pruned model."""
