"""The symbolic losses and their gradients against the twin's, written out by hand."""
import numpy as np
import pytest

import twin


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


def test_style_loss_is_zero_where_every_patch_is_its_own_match(doodle):
    f = np.random.default_rng(1).random((6, 7, 5), dtype=np.float32) * 100
    value, gradient = value_and_gradient(doodle, doodle.style_loss, f, f, np.arange(4 * 5))
    assert abs(value) < 1e-3 and np.abs(gradient).max() < 1e-4


@pytest.mark.parametrize('shape', [(2, 2), (5, 3), (8, 9)])
def test_smoothness_loss(doodle, shape):
    x = np.random.default_rng(2).random((3,) + shape, dtype=np.float32) * 255
    value, gradient = value_and_gradient(doodle, doodle.smoothness_loss, x)
    expected, slope = twin.smoothness_loss(np.float64(x), 1.)
    assert value == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(gradient, slope, rtol=1e-3, atol=1e-3)
