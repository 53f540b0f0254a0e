"""The engine's Ops against the plain formulas and against brute force, over odd, prime and tiny shapes."""
import io
import subprocess
import sys

import numpy as np
import pytest

import twin
from conftest import ROOT, minimised
from golden_data import FOLDER
from test_cpp import KEYS, with_maps
from test_matching import brute_force

SIZES = [(1, 1), (1, 9), (2, 3), (4, 4), (5, 9), (31, 37), (23, 101)]
FILTERS = [(3, 64, False), (64, 3, False), (5, 7, True), (17, 33, False), (31, 100, True), (1, 1, False)]


def normal(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


@pytest.mark.parametrize('C, K, pool', FILTERS)
def test_convolution_and_its_gradient_are_those_of_the_plain_graph(doodle, C, K, pool):
    rng, theano, T = np.random.default_rng(C), doodle.theano, doodle.T
    W, b, x, weight = normal(rng, K, C, 3, 3), normal(rng, K), T.tensor3(), T.tensor3()
    ours = doodle.fast_convolution(W, b, pool)(x.dimshuffle('x', 2, 0, 1)).dimshuffle(2, 3, 1)
    f = theano.function([x, weight], [ours, theano.grad(T.sum(ours * weight), x), ours.shape])
    for H, width in SIZES:
        p, q = normal(rng, H, width, C), normal(rng, H >> pool, width >> pool, K)           # image, weight of output
        y, dx, shape = f(p, q)
        assert tuple(shape) == y.shape == q.shape and dx.shape == p.shape
        assert all((once == again).all() for once, again in zip((y, dx), f(p, q))), 'not repeatable'
        image = np.moveaxis(p, 2, 0).astype(float)
        pooled = twin.average_pool(image) if pool else image
        expected = np.maximum(twin.conv2d(pooled, W.astype(float), b), 0) if q.size else np.zeros((K, *q.shape[:2]))
        np.testing.assert_allclose(np.moveaxis(y, 2, 0), expected, atol=3e-5 * max(1e-6, expected.max(initial=0)))
        back = np.zeros_like(image)
        if q.size:                                                      # by the engine's rectifier: rounding flips some
            back = twin.conv2d_backward(np.moveaxis(q * (y > 0), 2, 0).astype(float), W.astype(float))
            back = twin.average_pool_backward(back, image.shape) if pool else back
        np.testing.assert_allclose(np.moveaxis(dx, 2, 0), back, atol=3e-5 * max(1e-6, np.abs(back).max()))


def test_convolution_refuses_what_does_not_fit(doodle):
    rng, x = np.random.default_rng(0), doodle.T.tensor3()
    f = doodle.theano.function([x], doodle.fast_convolution(normal(rng, 4, 3, 3, 3), normal(rng, 4), False)(
        x.dimshuffle('x', 2, 0, 1)))
    with pytest.raises(ValueError):
        f(normal(rng, 6, 6, 5))


@pytest.fixture(scope='module')
def found(doodle):
    """Matches, and with a history the new one, by arrays u (H, W, D), v (h, w, D) and variety 0.3."""
    u, v, history = doodle.T.tensor3(), doodle.T.tensor3(), doodle.T.vector()
    plain = doodle.theano.function([u, v], doodle.fast_match(u, v)[0])
    varied = doodle.theano.function([u, v, history], doodle.fast_match(u, v, np.float32(0.3), history))
    return lambda u, v, *history: varied(u, v, *history) if history else plain(u, v)


@pytest.mark.parametrize('H, W, h, w, D', [
    (3, 3, 3, 3, 1), (3, 4, 5, 3, 2), (7, 3, 3, 11, 5), (13, 17, 11, 19, 7), (23, 31, 29, 37, 67), (5, 67, 7, 66, 259),
    (17, 18, 19, 65, 3), (17, 80, 19, 81, 30), (3, 131, 61, 3, 13), (64, 3, 3, 130, 515)])
def test_matches_and_history_are_those_of_brute_force(found, H, W, h, w, D):
    rng = np.random.default_rng(D)
    u, v = (a / np.linalg.norm(a, axis=2, keepdims=True) for a in (normal(rng, H, W, D), normal(rng, h, w, D)))
    history, S, i = np.float32(rng.random((h - 2) * (w - 2))), brute_force(u, v), np.arange((H - 2) * (W - 2))
    assert (S.max(axis=0) - S[found(u, v), i]).max() < 1e-6
    matches, new = found(u, v, history)
    S_varied = S - 0.3 * history[:, None]
    assert (S_varied.max(axis=0) - S_varied[matches, i]).max() < 1e-6
    np.testing.assert_allclose(new, S.max(axis=1), atol=1e-6)


def test_of_equal_scores_the_first_wins(found):
    rng = np.random.default_rng(0)
    u, v = (np.float32(rng.integers(0, 2, shape)) for shape in ((13, 17, 5), (11, 19, 5)))  # sums of ones are exact
    assert (found(u, v) == brute_force(u, v).argmax(axis=0)).all()


def test_a_patch_that_matches_nothing_takes_the_first(found):
    u, v = np.zeros((4, 5, 3), np.float32), np.ones((6, 7, 3), np.float32)
    assert not found(u, v).any() and not found(u * np.nan, v).any()


def test_matching_refuses_what_has_no_patch_or_does_not_fit(found):
    for u, v in (((2, 5, 3), (5, 5, 3)), ((5, 5, 3), (5, 2, 3)), ((5, 5, 3), (5, 5, 4))):
        with pytest.raises(ValueError):
            found(np.ones(u, np.float32), np.ones(v, np.float32))


@pytest.mark.parametrize('kind', KEYS)
def test_matches_from_a_start_are_those_without_by_any_number_of_threads(doodle, threads, kind):
    """Though from a start most pairs are left out by bounds in bytes, where the processor can."""
    T, rng = doodle.T, np.random.default_rng(4)
    u, v, start, H, W, h, w = T.tensor3(), T.tensor3(), T.lvector(), 17, 23, 21, 14
    plain = doodle.theano.function([u, v], doodle.fast_match(u, v)[0])
    begun = doodle.theano.function([u, v, start], doodle.fast_match(u, v, start=start)[0])
    p, q = (with_maps(rng, KEYS[kind](rng, (*size, 192)), 5) for size in ((H, W), (h, w)))
    p[5:9, 5:9] = q[3:7, 2:6] = q[11:15, 8:12]                          # two patches match as well
    j = plain(p, q)
    for count in range(1, 9):
        threads(count)
        for first in (j, rng.integers(0, (h - 2) * (w - 2), len(j))):
            assert (begun(p, q, first) == j).all()


@pytest.mark.parametrize('H, W, h, w, C', [(3, 3, 3, 3, 1), (3, 5, 4, 3, 16), (13, 17, 11, 19, 37), (9, 4, 5, 21, 128)])
def test_the_style_loss_and_its_gradient_are_those_of_the_formula(doodle, H, W, h, w, C):
    rng, T = np.random.default_rng(C), doodle.T
    f, g, j = T.tensor3(), T.tensor3(), T.lvector()
    losses = [loss(f, g, j) for loss in (doodle.fast_style_loss, doodle.style_loss)]
    both = doodle.theano.function([f, g, j], losses + [doodle.theano.grad(loss, f) for loss in losses])
    p, q = normal(rng, H, W, C), normal(rng, h, w, C)
    loss, plain, gradient, expected = both(p, q, rng.integers(0, (h - 2) * (w - 2), (H - 2) * (W - 2)))
    np.testing.assert_allclose(loss, plain, rtol=1e-6)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-7)
    same, _, none, _ = both(q, q, np.arange((h - 2) * (w - 2)))
    assert same == 0 and not none.any()
    for matches in (np.zeros((H - 2) * (W - 2) - 1, int), np.full((H - 2) * (W - 2), (h - 2) * (w - 2))):
        with pytest.raises(ValueError):
            both(p, q, matches)


@pytest.mark.slow
def test_matches_at_every_image_of_a_run_are_those_without_a_start(doodle, tmp_path):
    weights, _ = doodle.read_weights(str(ROOT / 'vgg16.npz'))
    options = doodle.parse_options([f'--style={FOLDER / "face_style.png"}', f'--content={FOLDER / "face_content.png"}',
                                    f'--output={tmp_path / "none.png"}', '--save-every=0'])
    inputs, _ = doodle.read_inputs(options)
    content, style = (doodle.to_planes(picture) for picture in (inputs.content, inputs.style))
    engine = doodle.Objective(weights, options, True, True, True)
    engine.set_phase(content, style, inputs.content_map, inputs.style_map, content.shape[:0:-1])
    f, found, compared = doodle.T.tensor3(), {}, 0
    for layer, term in engine.style.items():
        u = term.key(f)
        found[layer] = doodle.theano.function([f], [u, doodle.fast_match(u, term.keys)[0]])

    def evaluate(x):
        nonlocal compared
        evaluation, features = engine(x), dict(zip(engine.layers, engine.features(np.float32(x))))
        for layer, term in engine.style.items():
            u, j = found[layer](features[layer])
            S = brute_force(u, term.keys.get_value())
            assert (term.matches.get_value() == j).all()
            assert (S.max(axis=0) - S[j, np.arange(len(j))]).max() < 1e-5
            compared += 1
        return evaluation.total, evaluation.gradient
    minimised(doodle.Minimiser(np.random.default_rng(0).uniform(16, 240, content.shape)), evaluate, 25)
    assert compared == 2 * 25


@pytest.mark.parametrize('files, cores', [
    ({}, 8), ({'cpu.max': 'max 100000\n'}, 8), ({'cpu.max': '250000 100000\n'}, 3), ({'cpu.max': '50000 100000\n'}, 1),
    ({'a/b/cpu.max': '250000 100000\n'}, 3), ({'a/b/cpu.max': '250000 100000\n', 'a/cpu.max': '200000 100000\n'}, 2),
    ({'cpu/cpu.cfs_quota_us': '-1\n', 'cpu/cpu.cfs_period_us': '100000\n'}, 8),
    ({'cpu/cpu.cfs_quota_us': '400000\n', 'cpu/cpu.cfs_period_us': '100000\n'}, 4),
    ({'cpu/c/cpu.cfs_quota_us': '500000\n', 'cpu/c/cpu.cfs_period_us': '100000\n'}, 5)])
def test_cores_are_those_of_the_cpu_set_and_the_cgroup(doodle, monkeypatch, files, cores):
    files = {f'/sys/fs/cgroup/{name}': text for name, text in files.items()}
    files['/proc/self/cgroup'] = '5:memory:/m\n4:cpu,cpuacct:/c\n0::/a/b\n'

    def opened(path, *_, **__):
        if path not in files:
            raise FileNotFoundError(path)
        return io.StringIO(files[path])
    monkeypatch.setattr(doodle.os, 'sched_getaffinity', lambda _: set(range(8)))
    monkeypatch.setattr(doodle, 'open', opened, raising=False)
    assert doodle.allowed_cores() == cores


@pytest.mark.slow
@pytest.mark.parametrize('evaluations, choices', [
    (60, []), (12, ['--rotations=1']), (20, ['--method=li-wand', '--rotations=0', '--scales=1'])])
def test_a_whole_run_is_that_of_the_plain_formulas(doodle, tmp_path, evaluations, choices):
    """At every image the engine's losses, matches and gradient are those of the plain graph, where no match differs."""
    weights, _ = doodle.read_weights(str(ROOT / 'vgg16.npz'))
    options = doodle.parse_options([f'--style={FOLDER / "face_style.png"}', f'--content={FOLDER / "face_content.png"}',
                                    '--seed=content', f'--output={tmp_path / "none.png"}', '--save-every=0',
                                    '--variety=0.1', *choices])
    inputs, _ = doodle.read_inputs(options)
    size, style_size = (48, 56), (62, 54)
    content, style = (doodle.to_planes(doodle.resized(picture, to, doodle.Image.LANCZOS))
                      for picture, to in ((inputs.content, size), (inputs.style, style_size)))
    engine, plain = (doodle.Objective(weights, options, True, inputs.style_map is not None, fast)
                     for fast in (True, False))
    for objective in (engine, plain):
        objective.set_phase(content, style, inputs.content_map, inputs.style_map, size)
    compared, errors = 0, []                                            # of gradients, in shares of the largest entry

    def evaluate(x):
        nonlocal compared
        ours, theirs, same = engine(x), plain(x), 0
        assert ours.content['4_2'] == pytest.approx(theirs.content['4_2'], rel=1e-5, abs=1e-6 * ours.total)
        for layer, term in engine.style.items():
            differ = term.matches.get_value() != plain.style[layer].matches.get_value()
            assert differ.mean() <= 0.01, 'more than ties'
            if not differ.any():
                same += 1
                assert ours.style[layer] == pytest.approx(theirs.style[layer], rel=1e-5)
        if same == 2:
            errors.append(np.abs(ours.gradient - theirs.gradient).max() / np.abs(theirs.gradient).max())
        compared += same
        return ours.total, ours.gradient
    minimised(doodle.Minimiser(content + np.random.default_rng(0).normal(size=content.shape)), evaluate, evaluations)
    assert compared > 1.5 * evaluations                                                     # of 2 layers each
    assert np.median(errors) < 1e-4 and max(errors) < .1                # more where rounding flips a rectifier


@pytest.mark.slow
def test_the_benchmark_measures_and_compares():
    command = [sys.executable, ROOT / 'tests/benchmark.py', '--rounds=2', '--size=64x48', '--skip=torch', '--after=3']
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for row in ('| engine |', '| engine / plain |', '| plain |', '| 32x24 |', 'GFLOPS by the count'):
        assert printed.count(row) == 1


@pytest.mark.slow
@pytest.mark.parametrize('arguments, rows', [
    (['--growth=64x48,80x60', '--options=--matching=near'], ['| 64x48 | ', '| 80x60 | ']),
    (['--size=64x48', '--whole', '--weights=vgg16.npz', '--options=--phases=2 --iterations=3'], [
        'Phase #0: 32x24, 3 evaluations of about', 'Phase #1: 3 evaluations of', ' minutes in all']),
    # The image stays where it is: of 20 evaluations the first two and the last are made.
    (['--size=64x48', '--whole', '--options=--phases=1 --iterations=20 --content-weight=0 --style-weight=0 '
      '--smoothness=0'], ['Phase #0: 3 evaluations of'])])
def test_the_benchmark_measures_growth_and_whole_runs(arguments, rows):
    printed = subprocess.run([sys.executable, ROOT / 'tests/benchmark.py', *arguments], cwd=ROOT, capture_output=True,
                             text=True, check=True).stdout
    assert [row for row in rows if printed.count(row) != 1] == []


@pytest.mark.parametrize('options', ['--method=gatys', '--method=li-wand', '--matching=near'])
def test_the_benchmark_compares_only_what_all_forms_compute_alike(options):
    done = subprocess.run([sys.executable, ROOT / 'tests/benchmark.py', f'--options={options}'], capture_output=True,
                          text=True)
    assert (done.returncode, done.stdout) == (2, '') and done.stderr.splitlines()[-1] == (
        'benchmark.py: error: without --growth or --whole, --options can only be --content-weight, --style-weight, '
        '--semantic-weight, --smoothness')
