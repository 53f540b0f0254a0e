"""What lies wholly under alpha 0 in the style picture is never used, whatever the method."""
import numpy as np
import pytest
from PIL import Image

from conftest import ROOT

SIZE = 40                                                               # of both pictures, square


@pytest.fixture(scope='module')
def weights(doodle):
    return doodle.read_weights(str(ROOT / 'vgg16.npz'))[0]


def pictures():
    """Content and style (3, H, W), an image between them, and an alpha that leaves the right of the style out."""
    content, style, x = np.random.default_rng(0).uniform(0, 255, (3, 3, SIZE, SIZE))
    alpha = np.full((SIZE, SIZE, 1), 255, np.uint8)
    alpha[:, 20:] = 0
    alpha[4, 30] = 1                                                    # hardly to be seen, but to be seen
    return content, style, x, alpha


def evaluated(doodle, weights, alpha, style, *arguments, fast=True):
    content, _, x, _ = pictures()
    options = doodle.parse_options(['--style=a', '--content=b', '--style-layers=1_2,2_1', '--content-layers=2_1',
                                    *arguments])
    objective = doodle.Objective(weights, options, True, False, fast, alpha is not None)
    objective.set_phase(content, style, None, None, (SIZE, SIZE), alpha)
    return objective, objective(x)


def seen(alpha, stride):
    """Which 3x3 patches see anything, by looking at the pixels of each: 'valid' positions, row by row."""
    side = SIZE // stride
    return np.array([alpha[y * stride:(y + 3) * stride, x * stride:(x + 3) * stride].any()
                     for y in range(side - 2) for x in range(side - 2)])


@pytest.mark.parametrize('arguments', [[], ['--variety=0.5'], ['--cache=1'], ['--method=li-wand', '--rotations=0',
                                                                              '--scales=0']])
@pytest.mark.parametrize('fast', [True, False])
def test_patches_under_alpha_0_are_not_matched_and_others_as_before(doodle, weights, arguments, fast):
    _, style, _, alpha = pictures()
    without, _ = evaluated(doodle, weights, None, style, *arguments, fast=fast)
    objective, evaluation = evaluated(doodle, weights, alpha, style, *arguments, fast=fast)
    assert np.isfinite(evaluation.gradient).all()
    for layer, stride in (('1_2', 1), ('2_1', 2)):
        allowed, before, after = seen(alpha, stride), *(
            each.matches[layer].get_value() for each in (without, objective))
        assert allowed[after].all() and not allowed[before].all()
        if not arguments or arguments[0] != '--variety=0.5':            # whose history is of other patches
            assert (after[allowed[before]] == before[allowed[before]]).all()


@pytest.mark.parametrize('arguments', [['--rotations=1', '--scales=1'], ['--method=li-wand', '--rotations=1']])
def test_copies_of_a_cut_out_leave_the_same_out(doodle, weights, arguments):
    _, style, _, alpha = pictures()
    count = {}
    for name, mask in (('all', None), ('some', alpha)):
        objective, _ = evaluated(doodle, weights, mask, style, *arguments)
        count[name] = np.count_nonzero(objective.scale['1_2'].get_value())
    assert 0.4 < count['some'] / count['all'] < 0.7


def test_the_gram_matrix_is_of_what_is_seen(doodle, weights):
    """A cut in two has the matrix of its visible half: but for the features at the cut, which see both."""
    _, style, _, alpha = pictures()
    alpha[4, 30] = 0
    arguments = '--method=gatys', '--style-layers=1_1'
    objective, _ = evaluated(doodle, weights, alpha, style, *arguments)
    whole, _ = evaluated(doodle, weights, None, style, *arguments)
    g = dict(zip(whole.layers, whole.features(np.float32(style))))['1_1'][:, :20].reshape(-1, 64).astype(float)
    np.testing.assert_allclose(objective.style['1_1'].get_value(), g.T @ g / len(g), rtol=1e-4)


def test_an_opaque_style_is_as_without_alpha_bit_for_bit(doodle, weights):
    _, style, _, alpha = pictures()
    (_, a), (_, b) = (evaluated(doodle, weights, mask, style) for mask in (None, np.full_like(alpha, 255)))
    assert a.total == pytest.approx(b.total, rel=1e-6) and np.allclose(a.gradient, b.gradient, rtol=1e-4, atol=1e-3)


def cut_out(path, opaque):
    """A picture that is opaque in its first columns and rubbish elsewhere."""
    pixels = np.random.default_rng(1).integers(0, 256, (48, 48, 4), dtype=np.uint8)
    pixels[:, :, 3] = 255 * (np.arange(48) < opaque)
    Image.fromarray(pixels).save(path)


def test_what_is_read_follows_the_size_and_is_compared_on_resume(doodle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cut_out('a.png', 24)
    read = {}
    for name, arguments in (('full', []), ('small', ['--max-size=24'])):
        options = doodle.parse_options(['--style=a.png', '--phases=1', *arguments])
        inputs, remarks = doodle.read_inputs(options)
        read[name] = inputs.style_alpha
        assert inputs.style_alpha.shape[:2] == inputs.style.shape[:2]
        assert (inputs.style[:, inputs.style_alpha[0, :, 0] == 0] == 255).mean() > .8       # white, not rubbish
        assert any('50% of `a.png` is transparent' in line for line in remarks)
    assert (read['full'][:, :24] == 255).all() and not read['full'][:, 24:].any()
    assert 0.4 < (read['small'] > 0).mean() < 0.6
    weights = doodle.Weights('vgg16', {}, 'a', 'b')
    assert doodle.explained(inputs, weights, options, 0)['inputs']['style_alpha']


def test_a_style_that_is_all_transparent_is_refused(refused, tmp_path):
    cut_out(tmp_path / 'a.png', 0)
    problem, fix = refused('--style=a.png', '--phases=1')
    assert "'a.png' is transparent" in problem and 'shows something' in fix


def test_a_transparent_content_is_laid_on_white(doodle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, opaque in (('a.png', 48), ('b.png', 24)):
        cut_out(name, opaque)
    inputs, remarks = doodle.read_inputs(doodle.parse_options(['--style=a.png', '--content=b.png', '--phases=1']))
    assert inputs.style_alpha is None and (inputs.content[:, 24:] == 255).all()
    assert (inputs.content[:, :24] != 255).any()
