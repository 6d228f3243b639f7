"""The engine: thoughts drawn and re-scored at many places of a text at once, for any causal language model."""
