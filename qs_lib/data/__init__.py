"""Thinking tokens, problems, worked examples, and the batches that training reads."""
