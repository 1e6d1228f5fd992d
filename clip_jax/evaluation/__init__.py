"""Judging: zero-shot classification, its metrics and the report."""
