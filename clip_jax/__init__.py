"""CLIP in JAX and Flax."""
