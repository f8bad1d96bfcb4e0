"""Closed forms of what a model costs; no torch."""
