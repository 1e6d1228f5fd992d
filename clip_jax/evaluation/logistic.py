"""Multinomial logistic regression: what scikit-learn's `LogisticRegression` minimises, computed on the mesh.

The loss and its gradient, two products with all the features, are the devices' work. The steps are SciPy's L-BFGS,
in float64 on the host: the optimizer that scikit-learn calls, with the same rules for when to stop. A fit does not
depend on the number of devices: each block of rows is one device's, and the blocks' gradients are added up exactly.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int
from scipy.optimize import minimize
from threadpoolctl import threadpool_limits

from clip_jax.errors import UserError
from clip_jax.evaluation.exact_sum import ExactSum, Parts
from clip_jax.parallel import Partitioner

MAX_ITERATIONS = 1000  # of the paper, appendix A.3
TOLERANCE = 1e-4  # scikit-learn's: the largest entry of the mean loss's gradient at which L-BFGS stops
_ROWS = 2048  # of a block: their logits stay in a CPU's cache, and do not fill an accelerator's memory
_FEWEST = 8  # blocks into which few rows are cut, so that several devices have some
_PADDING = -1  # the label of what fills up the last blocks


@dataclass(frozen=True)
class LinearClassifier:
    """Scores that are linear in the features.

    Attributes:
      weights: of the classes that were trained on.
      bias: of the same.
      trained: their numbers.
      classes: of the data set.
    """

    weights: Float[np.ndarray, "dim trained"]
    bias: Float[np.ndarray, "trained"]
    trained: Int[np.ndarray, "trained"]
    classes: int

    def scores(self, features: Float[np.ndarray, "n dim"]) -> Float[np.ndarray, "n classes"]:
        """Logits; classes that had no example to train on come last."""
        logits = features @ self.weights + self.bias
        scores = np.repeat(logits.min(axis=1, keepdims=True) - 1, self.classes, axis=1)
        scores[:, self.trained] = logits
        return scores


class LogisticRegression:
    """Examples on the devices, to be fitted at any strength of regularisation.

    Args:
      features: float32, or float64 under `jax_enable_x64`.
      labels: from 0 to classes - 1.
      classes: of the data set; some may have no example.
      partitioner: examples are split over the devices as a batch is.
      bias: whether classes have one; without, it stays 0.

    Raises:
      UserError: features that are not finite, labels that are no classes, or fewer than two classes.
    """

    def __init__(
        self,
        features: Float[np.ndarray, "n dim"],
        labels: Int[np.ndarray, "n"],
        classes: int,
        partitioner: Partitioner,
        bias: bool = True,
    ):
        _check(features, labels, classes)
        self._trained, targets = np.unique(labels, return_inverse=True)
        self._examples, self._width = features.shape
        self._classes, self._replicated, self._has_bias = classes, partitioner.replicated, bias
        self._features = _in_blocks(features, 0, partitioner)
        self._targets = _in_blocks(targets.astype(np.int32), _PADDING, partitioner)
        # No error of a prediction is larger than 1 but for rounding, so that no sum of gradients is than twice this.
        largest = max(float(np.abs(features).sum(axis=0, dtype=np.float64).max()), float(self._examples))
        self._sum = ExactSum(2 * largest, _FEWEST + self._examples // _ROWS, features.dtype)
        evaluate = _over_the_mesh(self._sum, partitioner)
        self._evaluate = partitioner.jit(evaluate, out_shardings=partitioner.replicated)

    def fit(
        self, strength: float, max_iterations: int = MAX_ITERATIONS, tolerance: float = TOLERANCE
    ) -> LinearClassifier:
        """The classifier that minimises the examples' summed loss + strength / 2 · the weights' squared L2 norm.

        That is scikit-learn's at C = 1 / strength: the bias is not penalised, and two classes have one vector of
        weights between them, which is the difference of the two here: opposite halves of it, whose penalty is doubled.

        Args:
          strength: of the regularisation, the paper's λ.
          max_iterations: of L-BFGS.
          tolerance: L-BFGS stops where no entry of the mean loss's gradient is larger.
        """
        shape = (self._width + 1, len(self._trained))  # the last row is the bias
        penalty = strength * (2 if len(self._trained) == 2 else 1) / self._examples

        def objective(flat: Float[np.ndarray, "parameters"]) -> tuple[float, Float[np.ndarray, "parameters"]]:
            parameters = flat.reshape(shape)
            values = parameters.astype(self._features.dtype)
            on_devices = jax.device_put(values, self._replicated)
            losses, parts = jax.device_get(self._evaluate(on_devices, self._features, self._targets))
            weights, gradient = parameters[:-1], self._sum.value(parts) / self._examples
            gradient[:-1] += penalty * weights
            gradient[-1] *= self._has_bias
            # A step changes the loss by less than float32 holds of a sum.
            loss = losses.reshape(-1)[: self._examples].sum(dtype=np.float64) / self._examples
            loss += penalty / 2 * np.vdot(weights, weights)
            return loss, gradient.ravel()

        # As scikit-learn calls it.
        options = {"maxiter": max_iterations, "maxls": 50, "gtol": tolerance, "ftol": 64 * np.finfo(float).eps}
        with threadpool_limits(1, "blas"):  # several would wait in a loop for each other, on cores that XLA needs
            found = minimize(objective, np.zeros(np.prod(shape)), method="L-BFGS-B", jac=True, options=options)
        weights, bias = np.split(found.x.reshape(shape).astype(self._features.dtype), [-1])
        return LinearClassifier(weights, bias[0], self._trained, self._classes)


def _check(features: Float[np.ndarray, "n dim"], labels: Int[np.ndarray, "n"], classes: int) -> None:
    bad = features.size - np.count_nonzero(np.isfinite(features))
    if bad:
        raise UserError(f"expected finite features, but {bad:,} of {features.size:,} numbers are NaN or infinite")
    strange = labels[(labels < 0) | (labels >= classes)]
    if strange.size:
        raise UserError(
            f"expected labels from 0 to {classes - 1}, but {strange.size:,} of {labels.size:,} are not "
            f"({strange[0]} among them): the split may have no labels"
        )
    if len(np.unique(labels)) < 2:
        raise UserError(f"a classifier needs examples of at least 2 classes, got {len(np.unique(labels))}")


def _in_blocks(array: np.ndarray, padding: int, partitioner: Partitioner) -> Array:
    """(n, ...) as (steps, devices' rows, ...): in each step a device has one block, whatever the number of devices."""
    shards = partitioner.batch_shards
    rows = min(_ROWS, 2 ** ((len(array) - 1) // _FEWEST).bit_length()) * shards
    steps = -(-len(array) // rows)
    padded = np.full((steps * rows, *array.shape[1:]), padding, array.dtype)
    padded[: len(array)] = array
    padded = padded.reshape(steps, rows, *array.shape[1:])
    sharding = NamedSharding(partitioner.mesh, P(None, partitioner.batch_axes))
    return jax.make_array_from_callback(padded.shape, sharding, padded.__getitem__)


def _over_the_mesh(exact: ExactSum, partitioner: Partitioner) -> Callable[[Array, Array, Array], tuple[Array, Parts]]:
    """(parameters, features, targets) -> (the loss of each row, the summed gradient in parts)."""
    axes = partitioner.batch_axes

    def local(
        parameters: Float[Array, "inputs classes"],
        features: Float[Array, "steps rows dim"],
        targets: Int[Array, "steps rows"],
    ) -> tuple[Float[Array, "steps rows"], Parts]:
        parameters = jax.lax.pcast(parameters, axes, to="varying")

        def add_block(total: Parts, rows: tuple[Array, Array]) -> tuple[Parts, Array]:
            gradient, losses = _block(parameters, *rows)
            return exact.add(total, gradient), losses

        parts, losses = jax.lax.scan(add_block, exact.zeros_like(parameters), (features, targets))
        return losses, jax.lax.psum(parts, axes)

    split = P(None, axes)
    return jax.shard_map(local, mesh=partitioner.mesh, in_specs=(P(), split, split), out_specs=(split, P()))


def _block(
    parameters: Float[Array, "inputs classes"], features: Float[Array, "rows dim"], targets: Int[Array, "rows"]
) -> tuple[Float[Array, "inputs classes"], Float[Array, "rows"]]:
    """The gradient of some rows, and their losses."""
    weights, bias = parameters[:-1], parameters[-1:]
    highest = jax.lax.Precision.HIGHEST  # accelerators would round the factors
    logits = jnp.matmul(features, weights, precision=highest) + bias
    is_own = targets[:, None] == jnp.arange(bias.shape[1])[None]
    is_example = (targets != _PADDING)[:, None]
    # Relative to the true class, so that small losses and errors are no differences of large numbers.
    logits -= jnp.where(is_own, logits, 0).sum(axis=1, keepdims=True)
    top = logits.max(axis=1, keepdims=True)
    others = jnp.where(is_own, 0, jnp.exp(logits - top))
    sum_of_others = others.sum(axis=1, keepdims=True)
    losses = jnp.where(is_example, top + jnp.log1p(sum_of_others + jnp.expm1(-top)), 0)
    errors = jnp.where(is_own, -sum_of_others, others) * (is_example / (sum_of_others + jnp.exp(-top)))
    gradient = jnp.matmul(features.T, errors, precision=highest)
    gradient = jnp.concatenate([gradient, errors.sum(axis=0, keepdims=True)])
    return gradient, losses[:, 0]
