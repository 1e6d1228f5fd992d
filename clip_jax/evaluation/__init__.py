"""Judging: zero-shot classification and its metrics."""
