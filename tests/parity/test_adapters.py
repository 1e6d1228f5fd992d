"""Steps of low-rank adapters in float64 against a small LoRA in PyTorch, written on its own weight matrices."""

from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax.traverse_util import flatten_dict, unflatten_dict
from torch.nn.utils import parametrize

from clip_jax.models import CLIP, Execution
from clip_jax.parallel import MeshConfig, make_partitioner
from clip_jax.processing import Preprocess
from clip_jax.training.adapters import AdapterConfig, Adapters, adapted_paths
from clip_jax.training.guard import initial_guard
from clip_jax.training.optimizer import OptimizerConfig, make_optimizer
from clip_jax.training.parameters import paths_of
from clip_jax.training.state import Training, TrainState
from clip_jax.training.step import make_train_step
from tests.reference_models import ODD_VIT, variables_of
from tests.reference_training import STEPS, batches, learning_rate, reference_loss, reference_model

TAKEN = 8
SETTINGS = OptimizerConfig(learning_rate=5e-3, warmup_steps=3)
LORA = AdapterConfig(rank=3, alpha=6.0, kernels=("*/query/kernel", "*/value/kernel", "*/out/kernel", "visual/proj"))


class LowRank(torch.nn.Module):
    """W + alpha / r * B A on some of the rows of a weight (outputs, inputs)."""

    def __init__(self, rows, a, b):
        super().__init__()
        self.rows, self.a, self.b = rows, torch.nn.ParameterList(a), torch.nn.ParameterList(b)

    def forward(self, weight):
        weight = weight.clone()
        for rows, a, b in zip(self.rows, self.a, self.b, strict=True):
            weight[rows] += LORA.alpha / LORA.rank * b @ a
        return weight


class LowRankInputMajor(LowRank):
    """The same for a weight (inputs, outputs)."""

    def forward(self, weight):
        return super().forward(weight.T).T


def initial_factors(params):
    """NumPy arrays by path; A random, B zero."""
    generator, factors = np.random.default_rng(0), {}
    for path in adapted_paths(LORA, params):
        shape, rank = flatten_dict(params, sep="/")[path].shape, LORA.rank
        inputs = {"visual/proj": 1}.get(path, 3 if path.endswith("out/kernel") else 2)  # the stack counts as one
        factors[f"{path}/a"] = generator.normal(0, 0.1, (*shape[:inputs], rank))
        stack = () if path == "visual/proj" else shape[:1]
        factors[f"{path}/b"] = np.zeros((*stack, rank, *shape[inputs:]))
    return factors


def torch_factors(factors, path, block):
    """A (rank, inputs) and B (outputs, rank) of one block as PyTorch's parameters."""
    a, b = (factors[f"{path}/{name}"] for name in "ab")
    a, b = (a, b) if block is None else (a[block], b[block])
    return (torch.nn.Parameter(torch.tensor(x)) for x in (a.reshape(-1, LORA.rank).T, b.reshape(LORA.rank, -1).T))


def adapt(model, factors):
    """Put the adapters into OpenAI's class; returns {(path, block): (A, B)}."""
    learned = {("visual/proj", None): tuple(torch_factors(factors, "visual/proj", None))}
    ((a, b),) = learned.values()
    parametrize.register_parametrization(model.visual, "proj", LowRankInputMajor([slice(None)], [a], [b]))
    for tower, module in (("visual", model.visual.transformer), ("text", model.transformer)):
        for number, block in enumerate(module.resblocks):
            width, attn = block.attn.embed_dim, f"{tower}/transformer/resblocks/attn"
            for name in ("query", "value", "out"):
                path = f"{attn}/{name}/kernel"
                learned[path, number] = tuple(torch_factors(factors, path, number))
            (qa, qb), (va, vb) = (learned[f"{attn}/{name}/kernel", number] for name in ("query", "value"))
            rows = [slice(0, width), slice(2 * width, None)]
            parametrize.register_parametrization(block.attn, "in_proj_weight", LowRank(rows, [qa, va], [qb, vb]))
            a, b = learned[f"{attn}/out/kernel", number]
            parametrize.register_parametrization(block.attn.out_proj, "weight", LowRank([slice(None)], [a], [b]))
    return learned


def test_steps_follow_a_lora_in_pytorch():
    model = reference_model(ODD_VIT).requires_grad_(False)
    variables = variables_of(model.state_dict(), ODD_VIT)
    factors = initial_factors(variables["params"])
    learned = adapt(model, factors)
    tensors = [tensor for pair in learned.values() for tensor in pair]
    settings = {"betas": (SETTINGS.b1, SETTINGS.b2), "eps": SETTINGS.eps, "weight_decay": SETTINGS.weight_decay}
    adamw, expected, preprocess = torch.optim.AdamW(tensors, **settings), [], Preprocess.from_config(ODD_VIT)
    for step, (images, tokens) in enumerate(islice(batches(ODD_VIT), TAKEN), start=1):
        adamw.param_groups[0]["lr"] = learning_rate(SETTINGS, step)
        adamw.zero_grad()
        loss = reference_loss(model, preprocess.normalize(images, np.float64), tokens)
        loss.backward()
        adamw.step()
        expected.append(loss.item())

    with jax.enable_x64(True):
        losses, got = our_run(variables["params"], factors)
    np.testing.assert_allclose(losses, expected, rtol=1e-9)
    assert min(losses[1:]) < losses[0]
    for (path, number), pair in learned.items():
        for name, tensor in zip("ab", pair, strict=True):
            ours = got[f"{path}/{name}"] if number is None else got[f"{path}/{name}"][number]
            theirs = tensor.detach().numpy().T.reshape(ours.shape)
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-9 * np.abs(theirs).max(), err_msg=path)


def our_run(params, factors):
    """The losses of the steps, and the last factors by path."""
    params = jax.tree.map(lambda array: jnp.asarray(array, "float64"), params)
    flat, chosen = flatten_dict(params, sep="/"), adapted_paths(LORA, params)
    base = unflatten_dict({path: jnp.copy(flat[path]) for path in chosen}, sep="/")
    adapters = Adapters(base, jax.tree.map(jnp.asarray, unflatten_dict(factors, sep="/")))
    training = Training(
        CLIP(ODD_VIT, Execution(dtype="float64")),
        make_optimizer(SETTINGS, STEPS),
        make_partitioner(MeshConfig(1, 1, 1), jax.devices()[:1]),
        frozen=tuple(path for path in paths_of(params) if path not in chosen),
        adapters=LORA,
    )
    opt_state, guard = training.optimizer.init(adapters.factors), initial_guard(training.guard)
    state = TrainState(jnp.zeros((), jnp.int32), params, {}, opt_state, guard, {}, adapters)
    train_step, losses = make_train_step(training), []
    for images, tokens in islice(batches(ODD_VIT), TAKEN):
        state, metrics = train_step(state, {"image": images, "text": tokens})
        losses.append(float(metrics["loss"]))
    return losses, flatten_dict(jax.device_get(state.adapters.factors), sep="/")
