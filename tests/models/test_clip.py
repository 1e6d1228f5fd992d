import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.errors import UserError
from clip_jax.models import CLIP, OPENAI_MODELS, Execution, parameter_count
from tests import tiny

PARAMETERS = {
    "RN50": 102_007_137,
    "RN101": 119_688_033,
    "RN50x4": 178_300_601,
    "RN50x16": 290_979_217,
    "RN50x64": 623_258_305,
    "ViT-B/32": 151_277_313,
    "ViT-B/16": 149_620_737,
    "ViT-L/14": 427_616_513,
    "ViT-L/14@336px": 427_944_193,
}


@functools.cache
def init(config, seed=0):
    images, tokens = floats(config, 1), tiny.tokens(config, 1)
    return nn.unbox(jax.jit(CLIP(config).init)(jax.random.key(seed), images, tokens))


@functools.cache
def compiled(model, method):
    return jax.jit(functools.partial(model.apply, method=method))


def apply(config, variables, *inputs, method=None, execution=None):
    """A method of the model, compiled: op by op a ResNet takes minutes."""
    return compiled(CLIP(config, execution or Execution()), method)(variables, *inputs)


def floats(config, batch, seed=0):
    return (tiny.images(config, batch, seed) / 128 - 1).astype(np.float32)


def test_the_nine_models_are_named():
    assert list(OPENAI_MODELS) == list(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name):
    assert parameter_count(OPENAI_MODELS[name]) == PARAMETERS[name]


@pytest.mark.parametrize("config", [tiny.VIT, tiny.RESNET], ids=["vit", "resnet"])
def test_shapes_and_dtypes(config):
    variables = init(config)
    images, tokens = floats(config, 3), tiny.tokens(config, 5)
    per_image, per_text = apply(config, variables, images, tokens)
    assert per_image.shape == (3, 5) and per_image.dtype == jnp.float32
    np.testing.assert_array_equal(per_image, per_text.T)
    assert apply(config, variables, images, method=CLIP.encode_image).shape == (3, config.embed_dim)
    assert apply(config, variables, tokens, method=CLIP.encode_text).shape == (5, config.embed_dim)


def test_logits_are_scaled_cosines():
    variables = init(tiny.VIT)
    images, tokens = floats(tiny.VIT, 3), tiny.tokens(tiny.VIT, 5)
    image = np.asarray(apply(tiny.VIT, variables, images, method=CLIP.encode_image), np.float64)
    text = np.asarray(apply(tiny.VIT, variables, tokens, method=CLIP.encode_text), np.float64)
    cosines = image @ text.T / np.linalg.norm(image, axis=1)[:, None] / np.linalg.norm(text, axis=1)[None]
    np.testing.assert_allclose(apply(tiny.VIT, variables, images, tokens)[0], cosines / 0.07, atol=2e-5)


def test_a_head_is_linear_in_normalised_image_features():
    config, images = dataclasses.replace(tiny.VIT, classes=("a", "b")), floats(tiny.VIT, 3)
    variables = init(tiny.VIT)
    classifier = np.random.default_rng(0).normal(size=(2, config.embed_dim)).astype(np.float32)
    variables = {"params": {**variables["params"], "classifier": classifier}}
    features = np.asarray(apply(config, variables, images, method=CLIP.encode_image), np.float64)
    expected = features / np.linalg.norm(features, axis=1)[:, None] @ classifier.T
    np.testing.assert_allclose(apply(config, variables, images, method=CLIP.classify), expected, atol=1e-5)
    with pytest.raises(UserError, match="this model has no classification head"):
        apply(tiny.VIT, variables, images, method=CLIP.classify)


def test_text_tower_is_causal():
    """The hidden state at t has no gradient with respect to the position embeddings after t."""
    config = tiny.VIT
    model, variables, tokens = CLIP(config), init(config), tiny.tokens(config, 1)
    direction = np.random.default_rng(0).normal(size=config.text.width).astype(np.float32)

    def hidden(positions):
        params = {**variables["params"], "text": {**variables["params"]["text"], "positional_embedding": positions}}
        return model.apply({"params": params}, tokens, method=model.text_outputs).last_hidden_state[0] @ direction

    jacobian = jax.jit(jax.jacobian(hidden))(variables["params"]["text"]["positional_embedding"])
    influence = np.abs(np.asarray(jacobian)).max(axis=-1)  # (output position, input position)
    assert (influence[np.triu_indices(len(influence), 1)] == 0).all()
    assert (influence[np.tril_indices(len(influence))] > 0).all()


def test_padding_after_end_of_text_changes_nothing():
    config = tiny.VIT
    variables, tokens = init(config), tiny.tokens(config, 8)
    other = tokens.copy()
    after = np.arange(tokens.shape[1])[None] > tokens.argmax(axis=1)[:, None]
    other[after] = np.random.default_rng(1).integers(1, tiny.END_OF_TEXT, after.sum())
    assert (tokens != other).any()
    np.testing.assert_array_equal(
        apply(config, variables, tokens, method=CLIP.encode_text),
        apply(config, variables, other, method=CLIP.encode_text),
    )


def test_text_outputs_agree_with_encode_text():
    config = tiny.VIT
    variables, tokens = init(config), tiny.tokens(config, 4)
    outputs = apply(config, variables, tokens, method=CLIP.text_outputs)
    features = apply(config, variables, tokens, method=CLIP.encode_text)
    np.testing.assert_allclose(outputs.text_features, features, rtol=1e-5, atol=1e-6)
    assert outputs.hidden_states.shape == (config.text.layers + 1, 4, config.text.context_length, config.text.width)
    rows = np.arange(4), tokens.argmax(axis=1)
    np.testing.assert_array_equal(outputs.pooled_output, np.asarray(outputs.last_hidden_state)[rows])


def test_what_blocks_compute_can_be_captured():
    model, variables, images = CLIP(tiny.VIT, Execution(remat="full")), init(tiny.VIT), floats(tiny.VIT, 2)

    @jax.jit
    def captured(variables):
        only_blocks = lambda module, _: module.name == "resblocks"  # noqa: E731
        return model.apply(variables, images, method=model.encode_image, capture_intermediates=only_blocks)

    features, collections = captured(variables)
    [blocks] = collections["intermediates"]["visual"]["transformer"]["resblocks"]["__call__"]
    hidden = apply(tiny.VIT, variables, images, method=CLIP.image_hidden_states)
    np.testing.assert_allclose(blocks, hidden[1:], atol=1e-5)
    np.testing.assert_allclose(features, apply(tiny.VIT, variables, images, method=CLIP.encode_image), atol=1e-5)


def test_interceptors_reach_the_blocks():
    """An MLP that an interceptor silences adds nothing to the residual."""

    def silence(next_method, args, kwargs, context):
        result = next_method(*args, **kwargs)
        return jnp.zeros_like(result) if type(context.module).__name__ in ("MLP", "MultiheadAttention") else result

    model, variables, images = CLIP(tiny.VIT), init(tiny.VIT), floats(tiny.VIT, 2)
    with nn.intercept_methods(silence):
        silenced = model.apply(variables, images, method=model.encode_image)
    embedded = model.bind(variables).visual.embed(jnp.asarray(images))
    np.testing.assert_allclose(silenced, model.bind(variables).visual.pool(embedded), atol=1e-5)


@functools.cache
def value_and_gradients(config, execution):
    """Of the sum of squared logits."""
    variables, model = init(config), CLIP(config, execution)
    images, tokens = floats(config, 4), tiny.tokens(config, 4)

    def loss(params):
        logits, _ = model.apply({**variables, "params": params}, images, tokens)
        return jnp.square(logits).sum()

    return jax.jit(jax.value_and_grad(loss))(variables["params"])


@pytest.mark.parametrize(
    ("config", "execution"),
    [
        (tiny.VIT, Execution(unroll=2)),
        (tiny.VIT, Execution(remat="full")),
        (tiny.VIT, Execution(remat="dots")),
        (tiny.VIT, Execution(remat="attention")),
        (tiny.VIT, Execution(block_tokens=2 * tiny.VIT.vision.tokens)),
        (tiny.VIT, Execution(block_tokens=1, unroll=2, remat="full")),
        (tiny.VIT, Execution(block_tokens=1, remat="dots")),
        (tiny.RESNET, Execution(remat="full")),
    ],
    ids=lambda value: (
        f"{value.remat}-{value.unroll}-{value.block_tokens}"
        if isinstance(value, Execution)
        else type(value.vision).__name__
    ),
)
def test_execution_changes_neither_values_nor_gradients(config, execution):
    got, expected = value_and_gradients(config, execution), value_and_gradients(config, Execution())
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected[1]))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        # A key's bias has no gradient in exact arithmetic: what is there is rounding of larger ones.
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(jnp.abs(b).max()) + 1e-7 * largest)


@pytest.mark.parametrize("config", [tiny.VIT, tiny.RESNET], ids=["vit", "resnet"])
def test_bfloat16_computes_in_bfloat16_and_stays_close(config):
    variables = init(config)
    images, tokens = floats(config, 4), tiny.tokens(config, 4)
    bfloat16 = Execution(dtype="bfloat16")
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
    assert apply(config, variables, images, method=CLIP.encode_image, execution=bfloat16).dtype == jnp.bfloat16
    logits = apply(config, variables, images, tokens, execution=bfloat16)[0]
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, apply(config, variables, images, tokens)[0], atol=0.3)


@pytest.mark.parametrize("config", [tiny.VIT, tiny.RESNET], ids=["vit", "resnet"])
def test_64_bit_types_come_only_where_they_are_asked_for(config):
    def kinds(tree):
        return {str(leaf.dtype) for leaf in jax.tree.leaves(tree)}

    images, tokens = floats(config, 2), tiny.tokens(config, 2)
    with jax.enable_x64(True):
        variables = nn.unbox(jax.eval_shape(CLIP(config).init, jax.random.key(0), images, tokens))
        assert kinds(variables) == {"float32"}
        for dtype in ("float32", "float64"):
            converted = jax.tree.map(lambda leaf, dtype=dtype: jax.ShapeDtypeStruct(leaf.shape, dtype), variables)
            apply = functools.partial(CLIP(config, Execution(dtype)).apply, train=True, mutable=["batch_stats"])
            assert kinds(jax.eval_shape(apply, converted, images, tokens)) == {dtype}


def test_first_weights_are_drawn_as_openai_does():
    """Standard deviations of `CLIP.initialize_parameters` and of PyTorch's defaults behind it."""
    params = init(OPENAI_MODELS["ViT-B/32"])["params"]
    text, visual = params["text"], params["visual"]
    blocks, vision_blocks = text["transformer"]["resblocks"], visual["transformer"]["resblocks"]

    def std(x):
        return float(np.asarray(x, np.float64).std())

    expected = {
        0.02: text["token_embedding"],
        0.01: text["positional_embedding"],
        512**-0.5: blocks["attn"]["query"]["kernel"],
        512**-0.5 * 24**-0.5: blocks["attn"]["out"]["kernel"],
        1024**-0.5: blocks["mlp"]["c_fc"]["kernel"],
        768**-0.5: visual["proj"],
        (6 / (4 * 768)) ** 0.5 / 3**0.5: vision_blocks["attn"]["key"]["kernel"],
        768**-0.5 / 3**0.5: vision_blocks["attn"]["out"]["kernel"],
        3072**-0.5 / 3**0.5: vision_blocks["mlp"]["c_proj"]["kernel"],
        (3 * 32 * 32) ** -0.5 / 3**0.5: visual["conv1"]["kernel"],
    }
    for value, leaf in expected.items():
        assert std(leaf) == pytest.approx(value, rel=0.02)
    assert float(params["logit_scale"]) == pytest.approx(np.log(1 / 0.07))
    layers = np.asarray(vision_blocks["attn"]["key"]["kernel"])
    assert not np.array_equal(layers[0], layers[1])


def test_residual_branches_of_a_resnet_start_at_zero():
    params = init(tiny.RESNET)["params"]["visual"]
    assert not np.asarray(params["layer2_1"]["bn3"]["scale"]).any()
    assert np.asarray(params["layer2_1"]["bn2"]["scale"]).all()


def test_a_model_with_a_bias_adds_it_to_the_logits():
    config = dataclasses.replace(tiny.VIT, logit_bias=True)
    variables, inputs = init(config), (floats(config, 2), tiny.tokens(config, 2))
    without = apply(config, variables, *inputs)[0]
    variables = {"params": {**variables["params"], "logit_bias": variables["params"]["logit_bias"] - 10}}
    np.testing.assert_allclose(apply(config, variables, *inputs)[0], without - 10, atol=1e-5)


def test_images_of_the_wrong_size_are_refused():
    model, variables = CLIP(tiny.VIT), init(tiny.VIT)
    with pytest.raises(UserError, match=r"expected images of shape \(batch, 32, 32, 3\), got \(1, 64, 64, 3\)"):
        model.apply(variables, np.zeros((1, 64, 64, 3), np.float32), method=model.encode_image)


@pytest.mark.parametrize(
    ("method", "inputs"),
    [("encode_image", np.zeros((1, 32, 32, 3), np.float32)), ("encode_text", tiny.tokens(tiny.VIT, 1))],
    ids=["image", "text"],
)
def test_a_method_called_without_weights_says_how_it_is_called(method, inputs):
    with pytest.raises(UserError, match=rf"expected model\.apply\(variables, .*, method=model\.{method}\)"):
        getattr(CLIP(tiny.VIT), method)(inputs)


def test_tokens_beyond_the_context_are_refused():
    model, variables = CLIP(tiny.VIT), init(tiny.VIT)
    with pytest.raises(UserError, match="at most 16"):
        model.apply(variables, np.zeros((1, 77), np.int32), method=model.encode_text)


@pytest.mark.parametrize("outside", [-1, 512, 49407])
def test_token_ids_outside_the_vocabulary_are_refused(outside):
    """JAX would clamp them and compute on."""
    model = CLIP(tiny.VIT)
    tokens = tiny.tokens(tiny.VIT, 2)
    tokens[1, 3] = outside
    with pytest.raises(UserError, match=f"ids from 0 to 511, got {outside}"):
        model.apply(init(tiny.VIT), tokens, method=model.encode_text)
    with pytest.raises(UserError, match=f"ids from 0 to 511, got {outside}"):
        model.apply(init(tiny.VIT), floats(tiny.VIT, 1), tokens)


@pytest.mark.parametrize("config", [tiny.VIT, tiny.RESNET], ids=["vit", "resnet"])
def test_probe_features_are_those_before_a_vits_projection(config):
    """As OpenAI's `VisionTransformer` gives them where its `proj` is None; a ResNet's are its image features."""
    variables, images = init(config), floats(config, 2)
    features = apply(config, variables, images, method=CLIP.probe_features)
    projection = variables["params"]["visual"]["proj"] if config is tiny.VIT else np.eye(config.embed_dim)
    np.testing.assert_allclose(
        features @ projection, apply(config, variables, images, method=CLIP.encode_image), atol=1e-5
    )
