"""The twin against the original's golden numbers, against finite differences and against its own formulas."""
import hashlib

import numpy as np
import pytest
from PIL import Image
from scipy.signal import correlate2d

import golden_data
import twin
from conftest import mostly_slow
from golden.make_fixtures import SHA256, fixtures
from golden_data import images, misses, names, options, run, twin_options, weights
from twin import Twin

RUNS = names('fake') + names('real')


def kind(name):
    return name.split('/')[0]


def twin_of(r, original):
    """The twin of a golden run and the run's images."""
    i = images(r.argv)
    return Twin(weights(kind(r.name)), i.content, i.content_map, i.style, i.style_map,
                original=original, **twin_options(r.argv)), i


def wrong_matches(r, layer, matches, matching_pass=-1):
    """How many of the matches differ although the golden gap says that they are certain."""
    return np.sum((matches != r.idx[layer][matching_pass]) & (r.gap[layer][matching_pass] > r.sure_gap))


# ---- golden numbers ----------------------------------------------------------------------------

def test_fixtures():
    """The images here have the pixels that the numbers were measured on."""
    for name, digest in SHA256.items():
        pixels = Image.open(golden_data.FOLDER / name).tobytes()
        assert hashlib.sha256(pixels).hexdigest() == digest, name


def test_make_fixtures():
    pytest.importorskip('skimage')
    made = {name: hashlib.sha256(image.tobytes()).hexdigest() for name, image in fixtures()}
    assert made == SHA256


@pytest.mark.slow
@pytest.mark.parametrize('name', RUNS)
def test_golden_run(name):
    r = run(name)
    t, i = twin_of(r, original=True)
    if r.start_sha256:
        pixels = i.start[::-1].transpose(1, 2, 0).astype(np.uint8)    # (H, W, 3) RGB
        assert hashlib.sha256(pixels.tobytes()).hexdigest() == r.start_sha256

    evaluations = twin.minimise(t, i.start, options(r.argv)['iterations'])[:len(r.evaluations)]
    assert len(evaluations) == len(r.evaluations)
    for k, (e, expected) in enumerate(zip(evaluations, r.evaluations)):
        assert not misses(expected, e.total, e.losses, e.gradient), f'evaluation {k}'
    for layer in r.idx:
        assert wrong_matches(r, layer, evaluations[0].matches[layer]) == 0, layer
    if r.gradient is not None:
        error = evaluations[0].gradient - r.gradient    # (3, H, W)
        assert np.linalg.norm(error) < 1e-3 * np.linalg.norm(r.gradient)
        assert np.abs(error).max() < 5e-3 * np.abs(r.gradient).max()
    quality = twin.quality([np.abs(e.gradient).max() for e in evaluations])
    for q, expected, tolerance in zip(quality, r.evaluations, [1e-3, 1e-3, 0.02, 0.02]):
        assert abs(q - expected.quality) < tolerance

    final = golden_data.FOLDER / f'{name.split("/")[1]}_{kind(name)}.png'
    if final.is_file():
        image = evaluations[-1].x[::-1].transpose(1, 2, 0)    # (H, W, 3) RGB
        error = np.clip(image, 0, 255).astype(np.uint8) - np.asarray(Image.open(final), float)
        assert 10 * np.log10(255 ** 2 / np.mean(error ** 2)) > 35    # dB


@pytest.mark.parametrize('name', [name for name in RUNS if run(name).hist])
def test_golden_history(name):
    """With variety the first evaluation matches twice, and the second pass knows the first."""
    r = run(name)
    t, i = twin_of(r, original=True)
    f = twin.features(t.weights, i.start, t.last)
    for layer in r.hist:
        for k in range(2):
            assert wrong_matches(r, layer, t.match(layer, f[layer]), k) == 0
            assert np.allclose(t.history[layer], r.hist[layer][k], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('name', mostly_slow(RUNS, 'fake/layer31'))
def test_ours_is_near_the_original(name):
    """Without float16 `slices1` moves by up to 0.1 %, and others, with all patches, by up to 5 %."""
    r = run(name)
    t, i = twin_of(r, original=False)
    total, losses, gradient, _ = t.evaluate(i.start)
    assert not misses(r.evaluations[0], total, losses, gradient, at_least=2e-3 if t.slices == 1 else 0.05)


# ---- gradients against finite differences --------------------------------------------------------

def thin_weights():
    """A VGG19 of few channels, up to conv4_2."""
    rng, result, c = np.random.default_rng(7), {}, 3
    for layer, o in zip(twin.LAYERS, [5, 5, 6, 6, 7, 7, 7, 7, 8, 8]):
        result[f'conv{layer}'] = rng.normal(0, np.sqrt(2 / (9 * c)), (o, c, 3, 3)), rng.normal(0, 0.1, o)
        c = o
    return result


def thin_twin(rng, **changes):
    """A twin of random images, whose odd sizes lose a row or a column in each pooling, and a random x."""
    def random(*shape):
        return rng.uniform(0, 255, shape)
    return Twin(thin_weights(), random(43, 35, 3), random(43, 35, 4), random(39, 51, 3), random(39, 51, 4),
                **changes), random(3, 43, 35)


def assert_is_gradient(loss, x, gradient):
    """`loss` changes along random directions as the gradient says."""
    rng = np.random.default_rng(1)
    for step in [rng.normal(size=x.shape) for _ in range(5)]:
        step *= 1e-3 / np.abs(step).max()
        assert loss(x + step) - loss(x - step) == pytest.approx(2 * np.sum(gradient * step), rel=1e-6)


@pytest.mark.parametrize('part', ['content_weight', 'style_weight', 'smoothness', 'all'])
def test_gradient_of_total(part):
    off = {name: 0. for name in ('content_weight', 'style_weight', 'smoothness') if part not in (name, 'all')}
    t, x = thin_twin(np.random.default_rng(0), **off)
    total, losses, gradient, _ = t.evaluate(x)
    assert total == sum(losses.values()) > 0
    assert_is_gradient(lambda y: t.evaluate(y)[0], x, gradient)


def test_gradient_where_layers_share():
    """A layer of both losses, content below style, several content layers."""
    t, x = thin_twin(np.random.default_rng(2), content_layers=('2_2', '3_1'), style_layers=('3_1', '1_1'),
                     balance={'2_2': 3., '3_1': .5})
    total, losses, gradient, _ = t.evaluate(x)
    assert list(losses) == ['content_2_2', 'content_3_1', 'smooth_img', 'style_3_1', 'style_1_1']
    assert_is_gradient(lambda y: t.evaluate(y)[0], x, gradient)


def test_gradient_of_each_loss():
    rng = np.random.default_rng(3)
    f, target, matched = [rng.normal(0, 100, shape) for shape in [(4, 6, 5), (4, 6, 5), (12, 4, 3, 3)]]
    for loss in [lambda a: twin.content_loss(a, target, 10.), lambda a: twin.style_loss(a, matched, 25.),
                 lambda a: twin.smoothness_loss(a, 2.), lambda a: twin.smoothness_loss(a, 2., 1),
                 lambda a: twin.gram_loss(a, twin.gram(target), 3.)]:
        assert_is_gradient(lambda a: loss(a)[0], f, loss(f)[1])


@pytest.mark.parametrize('shape', [(3, 6, 8), (3, 7, 9), (3, 5, 4)])
def test_backward_is_the_adjoint(shape):
    """<A x, g> = <x, A' g> for the two linear layers."""
    rng = np.random.default_rng(4)
    x, w = rng.normal(size=shape), rng.normal(size=(4, 3, 3, 3))
    y = twin.conv2d(x, w, np.zeros(4))
    g = rng.normal(size=y.shape)
    assert np.sum(y * g) == pytest.approx(np.sum(x * twin.conv2d_backward(g, w)))
    y = twin.average_pool(x)
    g = rng.normal(size=y.shape)
    assert np.sum(y * g) == pytest.approx(np.sum(x * twin.average_pool_backward(g, shape)))


# ---- formulas ----------------------------------------------------------------------------------

def test_conv2d():
    rng = np.random.default_rng(5)
    x, w, b = rng.normal(size=(2, 5, 7)), rng.normal(size=(3, 2, 3, 3)), rng.normal(size=3)
    for o in range(3):
        expected = b[o] + sum(correlate2d(x[c], w[o, c], mode='same') for c in range(2))
        assert np.allclose(twin.conv2d(x, w, b)[o], expected)


def test_average_pool():
    x = np.arange(15.).reshape(1, 3, 5)
    assert np.array_equal(twin.average_pool(x), [[[3, 5]]])
    assert twin.pool_map(np.ones((4, 39, 51)), '4_1').shape == (4, 4, 6)


def test_score_is_mean_of_cosines():
    """S(i, j) = 1/9 sum cos(f, g) + w/9 sum cos(m, n), and a zero vector's cosine is 0."""
    rng = np.random.default_rng(6)
    f, m, g, n = [np.abs(rng.normal(size=s)) for s in [(4, 4, 5), (2, 4, 5), (4, 5, 3), (2, 5, 3)]]
    f[:, 1, 1] = m[:, 2, 2] = 0

    def cos(a, b):
        return a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) if a.any() and b.any() else 0

    s = twin.scores(twin.semantic_features(g, n, 7.), twin.semantic_features(f, m, 7.))
    assert s.shape == (3, 6)
    for j in range(3):
        for i in range(6):
            (y, x), expected = divmod(i, 3), 0
            for dy, dx in twin.OFFSETS:
                p, q = (slice(None), y + dy, x + dx), (slice(None), j + dy, dx)
                expected += (cos(f[p], g[q]) + 7 * cos(m[p], n[q])) / 9
            assert s[j, i] == pytest.approx(expected)


def test_match_prefers_the_first_and_the_fresh():
    s = np.array([[1., 3.], [2., 3.], [2., 1.]])    # (N, M)
    assert twin.match(s, np.zeros(3), 0.5).tolist() == [1, 0]
    assert twin.match(s, np.array([0., 4., 0.]), 0.5).tolist() == [2, 0]


def test_only_the_original_drops_patches():
    for original, slices, used in [(True, 3, 6), (True, 1, 8), (False, 3, 8), (False, 1000, 8)]:
        t, x = thin_twin(np.random.default_rng(8), style_layers=('4_1',), original=original, slices=slices)
        assert t.style_patches['4_1'].shape == (8, 8, 3, 3)
        assert t.used['4_1'] == used
        t.history['4_1'][:] = 1e4 * (np.arange(8) < 6)    # much used: all but the last two
        t.variety = 1.
        t.matches['4_1'] = None    # warm already
        assert (t.evaluate(x)[3]['4_1'] < 6).all() == (used == 6)


def test_cache_keeps_the_first_matches():
    rng = np.random.default_rng(9)
    for cache in (True, False):
        t, x = thin_twin(rng, cache=cache)
        first = t.evaluate(x)[3]['3_1']
        assert np.array_equal(first, t.evaluate(255 - x)[3]['3_1']) == cache


def test_exact_number_of_evaluations():
    t, x = thin_twin(np.random.default_rng(10))
    assert len(twin.minimise(t, x, 7)) == 7


def test_float32():
    rng = np.random.default_rng
    a, b = [thin_twin(rng(11), dtype=dtype) for dtype in (np.float32, np.float64)]
    (total, _, gradient, _), (expected, _, truth, _) = a[0].evaluate(a[1]), b[0].evaluate(b[1])
    assert gradient.dtype == np.float32
    assert total == pytest.approx(expected, rel=1e-5)
    assert np.allclose(gradient, truth, rtol=0, atol=1e-4 * np.abs(truth).max())
