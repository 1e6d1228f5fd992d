"""Attention against PyTorch's in float64: output, and the gradient of input and parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from clip_jax.models import Execution, attention
from clip_jax.models.initializers import vision_block

BATCH, WIDTH, HEADS = 2, 48, 3


def randoms(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32) / np.sqrt(shape[0])


def parameters() -> dict:
    """Of MultiheadAttention, biases not zero."""
    head = (HEADS, WIDTH // HEADS)
    projections = {
        name: {"kernel": randoms(WIDTH, *head, seed=seed), "bias": randoms(*head, seed=seed + 10)}
        for seed, name in enumerate(("query", "key", "value"))
    }
    return {**projections, "out": {"kernel": randoms(*head, WIDTH, seed=3), "bias": randoms(WIDTH, seed=13)}}


def torch_attention(params: dict, x: np.ndarray, cotangent: np.ndarray, causal: bool) -> tuple:
    """Output and gradients (of x and of the parameters) in float64, from softmax's definition."""
    x = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    leaves = jax.tree.map(lambda leaf: torch.tensor(leaf, dtype=torch.float64, requires_grad=True), params)
    q, k, v = (
        torch.einsum("blw,whd->bhld", x, leaves[name]["kernel"]) + leaves[name]["bias"][None, :, None]
        for name in ("query", "key", "value")
    )
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    y = torch.einsum("bhld,hdw->blw", y, leaves["out"]["kernel"]) + leaves["out"]["bias"]
    y.backward(torch.tensor(cotangent, dtype=torch.float64))
    return y.detach().numpy(), x.grad.numpy(), jax.tree.map(lambda leaf: leaf.grad.numpy(), leaves)


@pytest.mark.parametrize(("length", "causal"), ((257, False), (77, True)))
def test_attention_equals_float64(length, causal):
    module = attention.MultiheadAttention(HEADS, causal, vision_block(WIDTH, 4 * WIDTH), Execution())
    x, cotangent = randoms(BATCH, length, WIDTH, seed=20), randoms(BATCH, length, WIDTH, seed=21)
    params = parameters()

    @jax.jit
    def run(params, x, cotangent):
        y, vjp = jax.vjp(lambda params, x: module.apply({"params": params}, x), params, x)
        return y, vjp(cotangent)

    y, (param_grads, x_grad) = run(params, jnp.asarray(x), jnp.asarray(cotangent))
    expected, expected_x_grad, expected_param_grads = torch_attention(params, x, cotangent, causal)
    assert_close(y, expected)
    assert_close(x_grad, expected_x_grad)
    # In exact arithmetic a key's bias has no gradient, so its size says nothing: judge it by the query's.
    key_bias = param_grads["key"].pop("bias")
    np.testing.assert_allclose(key_bias, 0, atol=1e-5 * np.abs(expected_param_grads["query"]["bias"]).max())
    del expected_param_grads["key"]["bias"]
    jax.tree.map(assert_close, param_grads, expected_param_grads)


def assert_close(actual: jax.Array, expected: np.ndarray) -> None:
    np.testing.assert_allclose(actual, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)
