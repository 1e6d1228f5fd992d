"""What a run needs on a TPU slice, from the compiler, before anyone pays for it."""
