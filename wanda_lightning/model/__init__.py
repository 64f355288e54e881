"""What a language model is made of, as far as pruning goes; no family is named."""
