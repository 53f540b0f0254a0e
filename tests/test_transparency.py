"""A style picture that is transparent in parts: what lies wholly under alpha 0 is matched at no layer and no phase."""
import re
import shutil

import numpy as np
import pytest
from PIL import Image

import twin
from conftest import mostly_slow
from golden_data import FOLDER
from test_losses import channels_first
from test_matching import assert_best
from test_twin import thin_weights

LAYERS = {'2_1': 2, '3_1': 4}                                           # and their pixels of the picture, along a side
SIZE = 56, 48                                                           # of the style picture: height, width
ALPHA = np.full((*SIZE, 1), 0, np.uint8)
ALPHA[:, :20] = 255
ALPHA[30, 44] = 1                                                       # hardly to be seen, but not under alpha 0
RNG = np.random.default_rng(3)
STYLE, CONTENT, *IMAGES = RNG.uniform(0, 255, (3, *SIZE)), *RNG.uniform(0, 255, (3, 3, 40, 44))


def seen(alpha, k):
    """Whether each 3x3 patch at a layer, whose pixels are k x k of the picture, has anything to show: (N,)."""
    h, w = (side // k - 2 for side in alpha.shape[:2])
    return np.array([alpha[k * y:k * (y + 3), k * x:k * (x + 3)].any() for y in range(h) for x in range(w)])


@pytest.fixture
def evaluated(doodle):
    """An objective of thin layers after evaluations of random images, its style with ALPHA or another, and the last."""
    weights = doodle.Weights('vgg19', {name[4:]: tuple(map(np.float32, pair)) for name, pair in thin_weights().items()},
                             '', '')

    def evaluated(*arguments, fast=True, alpha=ALPHA, shrink=1, transparent=True, times=1):
        options = doodle.parse_options(['--style=-', '--style-layers=2_1,3_1', '--content-layers=2_2', *arguments])
        objective = doodle.Objective(weights, options, True, False, fast, transparent)
        objective.set_phase(CONTENT, STYLE[:, ::shrink, ::shrink], None, None, (44, 40),
                            *([alpha] if transparent else []))
        for image in IMAGES[:times]:
            evaluation = objective(image)
        return objective, evaluation, dict(zip(objective.layers, objective.features(np.float32(image))))
    return evaluated


@pytest.mark.parametrize('fast', mostly_slow([True, False], True))
@pytest.mark.parametrize('choices', [[], ['--variety=0.5'], ['--method=li-wand', '--rotations=0', '--scales=0']])
def test_of_the_patches_that_show_something_the_best_is_matched(evaluated, fast, choices):
    objective, _, f = evaluated(*choices, fast=fast)
    for layer, k in LAYERS.items():
        allowed, g = seen(ALPHA, k), channels_first(objective.style[layer].features.get_value())
        assert 0 < allowed.sum() < len(allowed) / 1.5
        assert ((objective.style[layer].scale.get_value() > 0) == allowed).all()
        image = channels_first(f[layer])
        S = twin.patch_scores(g, image) if 'li-wand' in str(choices) else twin.scores(
            *(twin.semantic_features(features, None, 0) for features in (g, image)))        # (j, i)
        S -= 0.5 * S.max(axis=1, keepdims=True) if '--variety=0.5' in choices else 0
        assert_best(np.where(allowed[:, None], S, -np.inf), objective.style[layer].matches.get_value())


@pytest.mark.parametrize('method', ['champandard', 'li-wand'])
@pytest.mark.parametrize('fast', mostly_slow([True, False], True))
def test_alpha_turns_and_scales_with_the_copies(doodle, evaluated, method, fast):
    objective, _, _ = evaluated(f'--method={method}', '--rotations=1', '--scales=1', fast=fast)
    copies = doodle.style_copies(np.moveaxis(ALPHA, 2, 0), 1, 1, Image.BILINEAR)
    for layer, k in LAYERS.items():
        width, allowed = max(copy.shape[2] // k for copy in copies) - 2, []
        for copy in copies:
            (h, w), rows = (side // k for side in copy.shape[1:]), np.zeros((copy.shape[1] // k, width), bool)
            rows[:h - 2, :w - 2] = seen(np.moveaxis(copy, 0, 2), k).reshape(h - 2, w - 2)
            allowed.append(rows)                                        # the last two are over a seam
        allowed = np.concatenate(allowed)[:-2].ravel()
        assert ((objective.style[layer].scale.get_value() > 0) == allowed).all()
        assert allowed[objective.style[layer].matches.get_value()].all()
        assert f'({allowed.sum()}, ' in objective.style[layer].describe()


def test_alpha_goes_through_the_phases(evaluated):
    objective, _, _ = evaluated(shrink=2)                               # each pixel is then 2x2 of ALPHA's
    for layer, k in LAYERS.items():
        assert ((objective.style[layer].scale.get_value() > 0) == seen(ALPHA, 2 * k)).all()


@pytest.mark.slow
def test_cached_matches_show_something_too(evaluated):
    objective, _, _ = evaluated('--cache=1', '--variety=0.1', times=2)
    assert all(seen(ALPHA, k)[objective.style[layer].matches.get_value()].all() for layer, k in LAYERS.items())


def test_a_gram_matrix_is_of_the_pixels_that_show_something(doodle, evaluated):
    objective, _, _ = evaluated('--method=gatys')
    whole, _, _ = evaluated('--method=gatys', alpha=np.full_like(ALPHA, 255))
    plain, _, _ = evaluated('--method=gatys', transparent=False)
    for layer, k in LAYERS.items():
        A = plain.style[layer].gram.get_value()
        np.testing.assert_allclose(whole.style[layer].gram.get_value(), A, rtol=1e-6)
        g = dict(zip(objective.layers, objective.features(np.float32(STYLE))))[layer]
        pixels = [g[y, x] for y, x in np.ndindex(g.shape[:2]) if ALPHA[k * y:k * (y + 1), k * x:k * (x + 1)].any()]
        expected = np.einsum('na, nb -> ab', pixels, pixels) / len(pixels)
        np.testing.assert_allclose(objective.style[layer].gram.get_value(), expected, rtol=1e-4)
        assert np.abs(expected - A).max() > 1e-2 * A.max()


@pytest.mark.slow
@pytest.mark.parametrize('fast', [True, False])
@pytest.mark.parametrize('choices', [['--variety=0.5'], ['--method=li-wand', '--rotations=1'], ['--method=gatys']])
def test_where_nothing_is_transparent_all_is_as_without(evaluated, choices, fast):
    (plain, without, _), (_, opaque, _) = (evaluated(
        *choices, fast=fast, transparent=transparent, alpha=np.full_like(ALPHA, 1)) for transparent in (False, True))
    assert without.total == opaque.total and (without.gradient == opaque.gradient).all()
    assert 'li-wand' in str(choices) or not any(
        getattr(term, 'scale', None) for term in plain.style.values())


# ---- from the file on ------------------------------------------------------------------------------------------------

def cut_out(alpha):
    """Write the style picture of the golden faces under `alpha` (H, W), one of its pixels white."""
    picture = Image.open(FOLDER / 'face_style.png').convert('RGB')
    picture.putpixel((40, 30), (255, 255, 255))
    picture.putalpha(Image.fromarray(np.uint8(alpha)))
    picture.save('cut.png')


@pytest.fixture
def inputs(doodle, tmp_path, monkeypatch):
    """inputs('--max-size=9', ...) and remarks, of the golden content and a cut-out style."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(FOLDER / 'face_content.png', tmp_path)
    return lambda *arguments: doodle.read_inputs(doodle.parse_options(
        ['--style=cut.png', '--content=face_content.png', '--phases=2', '--semantic-weight=0', *arguments]))


def alpha_of():
    """An alpha of the style picture with a hole in its middle, and one pixel in that."""
    alpha = np.full((108, 124), 255)
    alpha[30:70, 40:90] = 0
    alpha[51, 61] = 255
    return alpha


def test_the_alpha_of_the_style_is_read_shrunk_and_told(doodle, inputs):
    cut_out(alpha_of())
    read, remarks = inputs()
    assert (read.style_alpha[:, :, 0] == alpha_of()).all() and (read.style[30:50, 40:90] == 255).all()
    assert f'{100 * 1999 / 108 / 124:.3g}% of `cut.png` is transparent: it is laid on white.' in remarks
    small, _ = inputs('--max-size=62')
    assert small.style.shape == (54, 62, 3)
    assert (small.style_alpha[:, :, 0] == np.ceil(alpha_of().reshape(54, 2, 62, 2).mean(axis=(1, 3)))).all()


@pytest.mark.parametrize('alpha', [255, 1])
def test_a_style_that_is_nowhere_wholly_transparent_has_no_alpha(inputs, alpha):
    cut_out(np.full((108, 124), alpha))
    read, remarks = inputs()
    assert read.style_alpha is None and any('transparent' in line for line in remarks) == (alpha < 255)


@pytest.mark.parametrize('method', ['champandard', 'li-wand', 'gatys'])
@pytest.mark.parametrize('where', [(slice(0), slice(0)), (slice(105, 108), slice(0, 124))])
def test_a_style_without_a_patch_that_shows_something_is_refused(refused, method, where):
    """Nothing at all, or but the last rows, which the network's pooling drops."""
    alpha = np.zeros((108, 124))
    alpha[where] = 255
    cut_out(alpha)
    shutil.copy(FOLDER / 'face_content.png', '.')
    problem, fix = refused('--style=cut.png', '--content=face_content.png', '--phases=1', '--semantic-weight=0',
                           '--style-layers=3_1,4_1', f'--method={method}')
    assert re.fullmatch(r"All of 'cut\.png' is transparent, as conv[34]_1 sees it in phase 0\.", problem)


def test_a_resumed_run_knows_the_alpha_of_its_style(doodle, inputs):
    options = doodle.parse_options(['--style=cut.png'])
    weights = doodle.Weights('vgg16', None, 'a file', 'checksum')
    found = []
    for k in (0, 0, 1):
        alpha = alpha_of()
        alpha[30, 40] = k                                               # white on white
        cut_out(alpha)
        found.append(doodle.provenance(inputs()[0], weights, options)['inputs'])
    assert found[0] == found[1] and {name for name in found[0] if found[0][name] != found[2][name]} == {'style_alpha'}


# ---- the content's transparency is the result's ----------------------------------------------------------------------

def test_the_alpha_of_the_content_is_that_of_the_result(doodle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    alpha = np.uint8(np.linspace(0, 255, 112 * 96).reshape(112, 96))
    picture = Image.open(FOLDER / 'face_content.png').convert('RGB')
    picture.putalpha(Image.fromarray(alpha))
    picture.save('content.png')
    for name, kept in ('out.png', True), ('out.webp', True), ('out.tif', True), ('out.jpg', False), ('out.bmp', False):
        options = doodle.parse_options([f'--style={FOLDER / "face_style.png"}', '--content=content.png',
                                        '--semantic-weight=0', f'--output={name}', '--max-size=56', '--phases=1'])
        read, _ = doodle.read_inputs(options)
        assert read.content_alpha.shape == (56, 48, 1)
        at = doodle.Checkpoint({'random_seed': 5})
        at.minimiser, at.number = doodle.Minimiser(np.full((3, 56, 48), 77.)), 1
        journal = doodle.Journal(options, doodle.place_output(options), read, at)
        assert journal.save(at)
        journal.close()
        with Image.open(name) as written:
            assert written.mode == ('RGBA' if kept else 'RGB')
            if kept:
                assert (np.asarray(written)[:, :, 3] == read.content_alpha[:, :, 0]).all()
            assert np.abs(np.asarray(written)[-9:, :, :3] - 77.).max() <= 1
