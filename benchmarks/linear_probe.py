"""Seconds of the linear probe's logistic regression against scikit-learn's, float64 (its default) and float32.

    python -m benchmarks.linear_probe [--examples 100000] [--dim 512] [--classes 1000] [--iterations 5] [--rounds 3]

They take turns in one process on the same features, each for the same number of L-BFGS iterations; the median round
counts. All begin at zero and follow the same rules, so they should arrive at the same weights: the table says how far
from scikit-learn's float64 they are.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable

import numpy as np

from benchmarks.machine import cpu
from clip_jax.evaluation.logistic import LogisticRegression
from clip_jax.parallel import MeshConfig, make_partitioner

Fit = Callable[[], np.ndarray]

STRENGTH = 1.0


def examples(count: int, dim: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Clouds around a centre for each class, that overlap."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, classes, count)
    centres = generator.normal(size=(classes, dim))
    noise = generator.normal(scale=3.0, size=(count, dim))
    return (centres[labels] + noise).astype(np.float32), labels


def ours(features: np.ndarray, labels: np.ndarray, classes: int, iterations: int) -> Fit:
    """Our fit; the examples are brought onto the devices, and the program is compiled, within the time."""

    def fit() -> np.ndarray:
        regression = LogisticRegression(features, labels, classes, make_partitioner(MeshConfig()))
        return regression.fit(STRENGTH, iterations, tolerance=0.0).weights.T

    return fit


def scikit_learn(features: np.ndarray, labels: np.ndarray, iterations: int) -> Fit:
    """scikit-learn's, in the dtype of the features."""
    from sklearn.linear_model import LogisticRegression as Reference

    def fit() -> np.ndarray:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it has not converged
            return Reference(C=1 / STRENGTH, max_iter=iterations, tol=0.0).fit(features, labels).coef_

    return fit


def main() -> None:
    """Print one line per contestant."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("examples", 100_000), ("dim", 512), ("classes", 1000), ("iterations", 5), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    flags = parser.parse_args()
    features, labels = examples(flags.examples, flags.dim, flags.classes)
    contestants = {
        "clip_jax": ours(features, labels, flags.classes, flags.iterations),
        "scikit-learn, float32": scikit_learn(features, labels, flags.iterations),
        "scikit-learn, float64": scikit_learn(features.astype(np.float64), labels, flags.iterations),
    }
    seconds, weights = {name: [] for name in contestants}, {}
    for _ in range(flags.rounds):
        for name, fit in contestants.items():
            start = time.perf_counter(), time.process_time()
            weights[name] = fit()
            seconds[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
            print(f"{name:24}{seconds[name][-1][0]:9.1f} s", flush=True)
    reference = weights["scikit-learn, float64"]
    print(
        f"{cpu()}\n{flags.examples:,} x {flags.dim}, {flags.classes:,} classes, {flags.iterations} iterations, medians"
    )
    for name, times in seconds.items():
        wall, processor = (statistics.median(column) for column in zip(*times, strict=True))
        difference = np.linalg.norm(weights[name] - reference) / np.linalg.norm(reference)
        print(f"{name:24}{wall:9.1f} s{processor:9.1f} s of CPU time, weights differ by {difference:.1e}")


if __name__ == "__main__":
    main()
