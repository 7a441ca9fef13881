"""Layers shared by the tokenizer, the masked language model and the prior."""
