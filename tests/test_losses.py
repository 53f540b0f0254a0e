"""The symbolic losses and their gradients against the twin's, written out by hand."""
import numpy as np
import pytest

import twin
from conftest import first_quick, mostly_slow
from test_twin import thin_weights


def value_and_gradient(doodle, loss, *arrays):
    """A loss of its first argument, the others held fixed, and its gradient."""
    symbols = [doodle.theano.shared(a) for a in arrays]
    expression = loss(*symbols)
    value, gradient = doodle.theano.function([], [expression, doodle.theano.grad(expression, symbols[0])])()
    assert gradient.dtype == np.float32
    return value, gradient


def channels_first(a):
    return np.moveaxis(np.float64(a), 2, 0)


def test_content_loss(doodle):
    f, g = np.random.default_rng(0).random((2, 5, 7, 4), dtype=np.float32)
    value, gradient = value_and_gradient(doodle, doodle.content_loss, f, g)
    expected, slope = twin.content_loss(channels_first(f), channels_first(g), 1.)
    assert value == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(channels_first(gradient), slope, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize('image, style', [((3, 3), (3, 3)), ((3, 4), (5, 3)), ((7, 5), (6, 9)), ((11, 13), (4, 8))])
def test_style_loss_without_patches_is_the_mean_over_patches(doodle, image, style):
    rng = np.random.default_rng(sum(image + style))
    f, g = rng.random(image + (6,), dtype=np.float32) * 100, rng.random(style + (6,), dtype=np.float32) * 100
    matches = rng.integers(0, (style[0] - 2) * (style[1] - 2), (image[0] - 2) * (image[1] - 2))
    value, gradient = value_and_gradient(doodle, doodle.style_loss, f, g, matches)
    matched = twin.patches(channels_first(g))[matches]
    expected, slope = twin.style_loss(channels_first(f), matched, 1.)
    assert value == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(channels_first(gradient), slope, rtol=1e-4, atol=1e-6)


def constant(value):
    return np.full((6, 7, 5), value, dtype=np.float32)


SAME = {'black': constant(0), 'constant': constant(.1) + np.float32(.37) * np.arange(5, dtype=np.float32),
        'large': constant(3e5 / 7), 'small': constant(1e-9 / 7),
        'random': np.random.default_rng(1).random((6, 7, 5), dtype=np.float32) * 100}


@pytest.mark.parametrize('name', SAME)
@pytest.mark.parametrize('matches', first_quick([np.arange(20), np.zeros(20, int),
                                                 np.random.default_rng(2).permutation(20)], 1))
def test_style_loss_of_a_picture_in_its_own_style_is_the_twin_s_and_never_negative(doodle, name, matches):
    f = SAME[name]
    value, gradient = value_and_gradient(doodle, doodle.style_loss, f, f, matches)
    expected, slope = twin.style_loss(channels_first(f), twin.patches(channels_first(f))[matches], 1.)
    assert value >= 0 and value == pytest.approx(expected, rel=1e-6, abs=0)
    np.testing.assert_allclose(channels_first(gradient), slope, rtol=1e-5, atol=1e-6 * np.abs(slope).max())


@pytest.mark.parametrize('image, style', [((1, 1), (4, 7)), ((5, 7), (6, 3))])
def test_gram_loss(doodle, image, style):
    f, g = (np.random.default_rng(3).random(shape + (6,), dtype=np.float32) * 100 for shape in (image, style))
    A = twin.gram(channels_first(g))
    np.testing.assert_allclose(doodle.gram(doodle.theano.shared(g)).eval(), A, rtol=1e-5)
    value, gradient = value_and_gradient(doodle, doodle.gram_loss, f, np.float32(A))
    expected, slope = twin.gram_loss(channels_first(f), A, 1.)
    assert value == pytest.approx(expected, rel=1e-4)
    np.testing.assert_allclose(channels_first(gradient), slope, rtol=1e-3, atol=1e-4 * np.abs(slope).max())


@pytest.mark.parametrize('shape, power', [((2, 2), 1.25), ((5, 3), 1), ((8, 9), 1.25)])
def test_smoothness_loss(doodle, shape, power):
    x = np.random.default_rng(2).random((3,) + shape, dtype=np.float32) * 255
    value, gradient = value_and_gradient(doodle, lambda x: doodle.smoothness_loss(x, power), x)
    expected, slope = twin.smoothness_loss(np.float64(x), 1., power)
    assert value == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(gradient, slope, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('kind', mostly_slow(['vgg19', 'vgg16'], 'vgg16'))
@pytest.mark.parametrize('method, power', [('champandard', 1.25), ('li-wand', 1), ('gatys', 1.25)])
def test_a_method_is_the_sum_of_its_terms(doodle, method, power, kind):
    """Every term at an image, and the gradient of all, is the twin's, with the matches that were found.

    VGG19's features are in the terms as they are, and VGG16's times their layer's factor.
    """
    weights = doodle.Weights(kind, {name[4:]: pair for name, pair in thin_weights().items()}, '', '')
    balance = {'vgg19': dict.fromkeys(twin.LAYERS, 1), 'vgg16': doodle.balance('vgg16')}[kind]
    o = doodle.parse_options(['--style=-', f'--method={method}', '--style-layers=2_1,3_1', '--content-layers=2_2',
                              '--smoothness=0.1', *([] if method == 'gatys' else ['--rotations=1', '--scales=1'])])
    rng = np.random.default_rng(5)
    x, content, style = (rng.uniform(0, 255, (3, *shape)) for shape in ((30, 34), (30, 34), (41, 36)))
    objective = doodle.Objective(weights, o, True, False, fast=True)
    objective.set_phase(content, style, None, None, (34, 30))
    found = objective(x)

    f, of_content, of_style = (twin.features(thin_weights(), image, '3_1') for image in (x, content, style))
    scaled, of_content, of_style = ({layer: balance[layer] * each[layer] for layer in ('2_1', '2_2', '3_1')}
                                    for each in (f, of_content, of_style))
    terms = {('content', '2_2'): twin.content_loss(scaled['2_2'], of_content['2_2'], o.content_weight)}
    for layer in o.style_layers:
        if method == 'gatys':
            terms['style', layer] = twin.gram_loss(scaled[layer], twin.gram(of_style[layer]), o.style_weight / 2)
        else:
            patches = twin.patches(balance[layer] * channels_first(objective.style[layer].features.get_value()))
            terms['style', layer] = twin.style_loss(scaled[layer], patches[objective.style[layer].matches.get_value()],
                                                    o.style_weight)
    smooth, gradient = twin.smoothness_loss(x, o.smoothness, power)
    gradient = gradient + twin.features_backward(
        thin_weights(), f, {layer: balance[layer] * g for (_, layer), (_, g) in terms.items()})
    assert found.smooth == pytest.approx(smooth, rel=1e-4)
    for (kind, layer), (value, _) in terms.items():
        assert getattr(found, kind)[layer] == pytest.approx(value, rel=1e-3), (kind, layer)
    assert np.abs(found.gradient - gradient).max() < 2e-3 * np.abs(gradient).max()


def test_a_gradient_that_is_not_finite_is_refused_though_the_loss_is(doodle, monkeypatch):
    """The gradient alone passes through the turned filters of conv1_1; here these are infinite."""
    rng, winograd = np.random.default_rng(6), doodle.winograd
    layers = {'1_1': (rng.normal(size=(64, 3, 3, 3)).astype(np.float32), np.zeros(64, np.float32))}
    options = doodle.parse_options(['--style=-', '--style-layers=1_1', '--content-layers=1_1'])
    content, style, x = rng.uniform(0, 255, (3, 3, 6, 7))
    for factor in (1, np.inf):
        monkeypatch.setattr(doodle, 'winograd', lambda W: winograd(W) * (factor if len(W) == 3 else 1))
        objective = doodle.Objective(doodle.Weights('vgg16', layers, 'a file', ''), options, True, False, True)
        objective.set_phase(content, style, None, None, (7, 6))
        if factor == 1:
            assert np.isfinite(objective(x).total)
            continue
        with pytest.raises(FloatingPointError, match='not finite'):
            objective(x)
        assert objective.fresh, 'the matches of a refused image were kept'
