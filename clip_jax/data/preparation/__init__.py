"""Preparation: any source becomes array records that TFDS opens, range by range, whoever works at a range."""
