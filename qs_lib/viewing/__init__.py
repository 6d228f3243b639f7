"""Thoughts on the screen: escaped HTML and the inspector."""
