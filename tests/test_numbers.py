"""Matching, losses, convolution and whole evaluations against the twin, over whatever shapes Hypothesis draws.

The graphs have symbolic shapes and are compiled once. Shapes are small, odd and prime ones among them; the style is
smaller or larger than the image.
"""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import twin
from conftest import ROOT
from test_matching import brute_force

often = settings(max_examples=60)
seeds = st.integers(0, 2 ** 32 - 1)


def shapes(least, most):
    """(height, width)."""
    return st.tuples(st.integers(least, most), st.integers(least, most))


def channels_first(a):
    return np.moveaxis(np.asarray(a, np.float64), 2, 0)


def normal(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


# ---- matching --------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def matchers(doodle):
    """Functions of u, v, variety and history that give matches and new history: the plain formula and the engine."""
    symbols = u, v, variety, history = doodle.T.tensor3(), doodle.T.tensor3(), doodle.T.scalar(), doodle.T.vector()
    return [doodle.theano.function(symbols, match(u, v, variety, history))
            for match in (doodle.match, doodle.fast_match)]


@often
@given(shapes(3, 23), shapes(3, 23), st.integers(1, 70), st.sampled_from([0, .3, 5]), seeds)
def test_matching(matchers, image, style, D, variety, seed):
    rng = np.random.default_rng(seed)
    u, v = (a / np.linalg.norm(a, axis=2, keepdims=True) for a in (normal(rng, *image, D), normal(rng, *style, D)))
    history = rng.random((style[0] - 2) * (style[1] - 2)).astype(np.float32)
    S = brute_force(u, v)
    varied = S - variety * history[:, None]
    for match in matchers:
        j, new = match(u, v, variety, history)
        assert (varied.max(axis=0) - varied[j, np.arange(len(j))]).max() < 1e-5
        np.testing.assert_allclose(new, S.max(axis=1), atol=1e-5)


# ---- losses ----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def losses(doodle):
    """{name: function of its arrays that gives the loss and its gradient with respect to the first}."""
    def compiled(loss, *symbols):
        value = loss(*symbols)
        return doodle.theano.function(symbols, [value, doodle.theano.grad(value, symbols[0])])
    f, g, x, matches = doodle.T.tensor3(), doodle.T.tensor3(), doodle.T.tensor3(), doodle.T.lvector()
    return {'content': compiled(doodle.content_loss, f, g), 'style': compiled(doodle.style_loss, f, g, matches),
            'smooth': compiled(doodle.smoothness_loss, x)}


@often
@given(shapes(3, 17), shapes(3, 17), st.integers(1, 9), seeds)
def test_losses(losses, image, style, C, seed):
    rng = np.random.default_rng(seed)
    f, other, g, x = (normal(rng, *shape) * 50 for shape in ((*image, C), (*image, C), (*style, C), (3, *image)))
    matches = rng.integers(0, (style[0] - 2) * (style[1] - 2), (image[0] - 2) * (image[1] - 2))
    matched = twin.patches(channels_first(g))[matches]
    for (value, gradient), (expected, slope), as_the_twin in (
            (losses['content'](f, other), twin.content_loss(channels_first(f), channels_first(other), 1.),
             channels_first),
            (losses['style'](f, g, matches), twin.style_loss(channels_first(f), matched, 1.), channels_first),
            (losses['smooth'](x), twin.smoothness_loss(np.float64(x), 1.), np.asarray)):    # an image has them first
        assert value == pytest.approx(expected, rel=1e-4)
        np.testing.assert_allclose(as_the_twin(gradient), slope, atol=2e-4 * np.abs(slope).max())


# ---- convolution -----------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def convolutions(doodle):
    """For pool = 0 and 1, a function of x, filters, bias, turned filters and weights: y and the gradient of sum w y."""
    def compiled(pool):
        T = doodle.T
        symbols = x, U, b, turned, weight = T.tensor3(), T.matrix(), T.vector(), T.matrix(), T.tensor3()
        y = doodle.Convolution(pool)(x, U, b, turned)
        return doodle.theano.function(symbols, [y, doodle.theano.grad(T.sum(y * weight), x)])
    return [compiled(False), compiled(True)]


@often
@given(shapes(1, 29), st.integers(1, 40), st.integers(1, 40), st.integers(0, 1), seeds)
def test_convolution(doodle, convolutions, size, C, K, pool, seed):
    rng = np.random.default_rng(seed)
    x, W, b = normal(rng, *size, C), normal(rng, K, C, 3, 3), normal(rng, K)
    weight = normal(rng, size[0] >> pool, size[1] >> pool, K)
    turned = W[:, :, ::-1, ::-1].transpose(1, 0, 2, 3)
    y, dx = convolutions[pool](x, doodle.winograd(W), b, doodle.winograd(turned), weight)
    assert y.shape == weight.shape and dx.shape == x.shape
    if not y.size:                                                                          # averaged to nothing
        assert not dx.any()
        return
    image = channels_first(x)
    before = twin.conv2d(twin.average_pool(image) if pool else image, np.float64(W), b)
    tolerance = 1e-4 * np.abs(before).max()
    np.testing.assert_allclose(channels_first(y), np.maximum(before, 0), atol=tolerance)
    back = twin.conv2d_backward(channels_first(weight * (y > 0)), np.float64(W))            # by the engine's rectifier
    back = twin.average_pool_backward(back, image.shape) if pool else back
    np.testing.assert_allclose(channels_first(dx), back, atol=1e-4 * np.abs(back).max())


# ---- maps ------------------------------------------------------------------------------------------------------------

@often
@given(shapes(16, 50), st.integers(1, 4), st.sampled_from(['1_1', '2_2', '3_1', '4_1', '5_1']), seeds)
def test_pooled_maps(doodle, size, K, layer, seed):
    channels = np.random.default_rng(seed).integers(0, 256, (*size, K), dtype=np.uint8)
    ours = doodle.pooled_map(channels, size[::-1], layer)
    np.testing.assert_allclose(channels_first(ours), twin.pool_map(channels_first(channels), layer), rtol=1e-5)


# ---- whole evaluations -----------------------------------------------------------------------------------------------

PAINTS = np.array([(255, 0, 0), (0, 0, 0), (0, 255, 0), (90, 90, 90)], np.uint8)            # black and grey: one-hot


@pytest.fixture(scope='module')
def objectives(doodle):
    """Options, the engine's objective and that of the plain formulas, style at 1_2 and 2_1, and the twin's weights."""
    options = doodle.parse_options(['--style=a', '--style-layers=1_2,2_1', '--content-layers=2_2', '--variety=0.2'])
    weights, _ = doodle.read_weights(str(ROOT / 'vgg16.npz'))
    return options, [doodle.Objective(weights, options, True, True, fast) for fast in (True, False)], {
        f'conv{name}': pair for name, pair in weights.layers.items()}


@pytest.mark.slow
@settings(often, max_examples=15)
@given(shapes(6, 21), shapes(6, 21), st.integers(1, 4), st.booleans(), st.sampled_from([.1, 10, 1000]), seeds)
def test_evaluations(doodle, objectives, image, style, classes, narrow, w, seed):
    options, both, weights = objectives
    options.semantic_weight, rng = w, np.random.default_rng(seed)
    pictures = [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in (image, style)]
    maps = [PAINTS[rng.integers(0, classes, (shape[0], 1 if narrow else shape[1]))] for shape in (image, style)]
    channels, _ = doodle.map_channels(maps, *doodle.map_classes(maps, [False, False]))
    wide = [np.broadcast_to(c, (*shape, c.shape[2])) for c, shape in zip(channels, (image, style))]
    truth = twin.Twin(weights, pictures[0], wide[0], pictures[1], wide[1], style_layers=('1_2', '2_1'),
                      content_layers=('2_2',), variety=.2, semantic_weight=w, balance=doodle.balance('vgg16'))
    x = rng.uniform(0, 255, (3, *image))
    total, losses, gradient, matches = truth.evaluate(x)
    content, painted = (doodle.to_planes(picture) for picture in pictures)
    for objective in both:
        objective.set_phase(content, painted, *channels, image[::-1])
        ours = objective(x)
        same = [(objective.style[layer].matches.get_value() == matches[layer]).mean() for layer in matches]
        assert min(same) > .9                                                               # ties apart
        assert ours.content['2_2'] == pytest.approx(losses['content_2_2'], rel=1e-4)
        assert ours.smooth == pytest.approx(losses['smooth_img'], rel=1e-4)
        if min(same) == 1:
            assert ours.total == pytest.approx(total, rel=1e-4)
            assert np.linalg.norm(ours.gradient - gradient) < 1e-2 * np.linalg.norm(gradient)


@pytest.mark.parametrize('grey', [0, 94, 255])
def test_a_flat_picture_in_its_own_style_has_no_negative_loss(doodle, objectives, grey):
    picture, channels = np.full((3, 15, 17), float(grey)), np.full((15, 17, 1), 255, np.uint8)
    for objective in objectives[1]:
        objective.set_phase(picture, picture, channels, channels, (17, 15))
        f = dict(zip(objective.layers, objective.features(np.float32(picture))))
        for layer, loss in objective(picture).style.items():
            assert 0 <= loss < 1e-10 * (f[layer] ** 2).mean()


@pytest.mark.parametrize('weight', [1e-6, 1e20])
def test_the_smallest_and_largest_weights_scale_losses_and_gradient(doodle, objectives, monkeypatch, weight):
    options, both, _ = objectives
    content, style, x = np.random.default_rng(1).uniform(0, 255, (3, 3, 15, 17))
    channels = np.full((15, 17, 1), 255, np.uint8)
    for objective in both:
        found = []
        for number in (1, weight):
            for name in ('content_weight', 'style_weight', 'smoothness'):
                monkeypatch.setattr(options, name, number)
            objective.set_phase(content, style, channels, channels, (17, 15))
            found.append(objective(x))
        one, many = found
        assert many.total == pytest.approx(one.total * weight, rel=1e-5)
        np.testing.assert_allclose(many.gradient / weight, one.gradient, atol=1e-5 * np.abs(one.gradient).max())


@settings(often, max_examples=15)
@given(shapes(6, 13), shapes(6, 13), st.integers(1, 4), seeds)
def test_the_gradient_of_the_twin_is_its_finite_difference(objectives, image, style, classes, seed):
    rng, weights = np.random.default_rng(seed), objectives[2]
    pictures = [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in (image, style)]
    maps = [np.eye(4)[rng.integers(0, classes, shape)] for shape in (image, style)]
    truth = twin.Twin(weights, pictures[0], maps[0], pictures[1], maps[1], style_layers=('1_2', '2_1'),
                      content_layers=('2_2',), cache=True)
    x, step = rng.uniform(0, 255, (3, *image)), rng.normal(size=(3, *image))
    _, _, gradient, _ = truth.evaluate(x)
    epsilon = 1e-5
    slope = (truth.evaluate(x + epsilon * step)[0] - truth.evaluate(x - epsilon * step)[0]) / (2 * epsilon)
    assert slope == pytest.approx((gradient * step).sum(), rel=1e-3, abs=1e-4 * np.linalg.norm(gradient))
