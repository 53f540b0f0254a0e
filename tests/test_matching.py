"""match() against brute force over patches (twin.py)."""
import functools

import numpy as np
import pytest

import twin


@pytest.fixture(scope='module')
def found(doodle):
    """Matches and new history, by NumPy arrays: u (H, W, D), v (h, w, D), variety, history."""
    @functools.cache
    def function(variety):
        u, v, history = doodle.T.tensor3(), doodle.T.tensor3(), doodle.T.vector()
        if variety:
            return doodle.theano.function([u, v, history], doodle.match(u, v, variety, history))
        matches, _ = doodle.match(u, v)
        return doodle.theano.function([u, v], matches)

    def call(u, v, variety=0., history=None):
        return function(variety)(np.float32(u), np.float32(v), *([np.float32(history)] if variety else []))
    return call


def brute_force(u, v):
    """S (M, N) of style patch j and image patch i, from (H, W, D) and (h, w, D)."""
    return twin.scores(np.moveaxis(v, 2, 0).astype(float) / 3, np.moveaxis(u, 2, 0).astype(float) / 3)


def assert_best(S, j):
    """`j` has the best score for each i, or one within 1e-5 of it."""
    assert (S.max(axis=0) - S[j, np.arange(S.shape[1])]).max() < 1e-5


SHAPES = [((3, 3), (3, 3)), ((5, 7), (7, 5)), ((3, 11), (13, 3)), ((9, 8), (6, 17)), ((12, 13), (4, 4))]


@pytest.mark.parametrize('image, style', SHAPES)
def test_matches_are_those_of_brute_force(found, image, style):
    rng = np.random.default_rng(sum(image + style))
    u, v = rng.normal(size=image + (5,)), rng.normal(size=style + (5,))
    S = brute_force(u, v)
    assert_best(S, found(u, v))


def test_of_equal_scores_the_first_wins(found):
    u, v = np.ones((4, 4, 2)), np.ones((6, 5, 2))
    assert (found(u, v) == 0).all()


def test_variety_takes_the_last_best_scores_off_and_returns_the_new_ones(found):
    rng = np.random.default_rng(2)
    u, v = rng.random((8, 9, 4)), rng.random((7, 8, 4))
    S, history = brute_force(u, v), rng.random(5 * 6)                       # (j, i)
    j, new = found(u, v, 0.5, history)
    assert_best(S - 0.5 * history[:, None], j)
    np.testing.assert_allclose(new, S.max(axis=1), rtol=1e-5)
    assert (j != found(u, v)).any()


def key(doodle, f, m, w):
    symbols = doodle.T.tensor3(), doodle.T.tensor3()
    function = doodle.theano.function(list(symbols), doodle.matching_key(*symbols, np.float32(w)))
    return function(np.float32(f), np.float32(m))


def test_key_products_are_the_cosines_of_features_and_maps(doodle):
    rng = np.random.default_rng(3)
    f, g, m, n = (rng.random((4, 4, k)) for k in (6, 6, 3, 3))
    ours = (key(doodle, f, m, 10.) * key(doodle, g, n, 10.)).sum(axis=2)

    def cosine(a, b):
        return (a * b).sum(axis=2) / np.linalg.norm(a, axis=2) / np.linalg.norm(b, axis=2)
    np.testing.assert_allclose(ours, cosine(f, g) + 10 * cosine(m, n), rtol=1e-5)


def test_a_zero_vector_has_cosine_0_not_nan(doodle):  # fault 4
    f, m = np.ones((3, 3, 4)), np.zeros((3, 3, 3))
    k = key(doodle, f, m, 10.)
    assert np.isfinite(k).all() and (k[:, :, 4:] == 0).all()


# ---- whole patches, and copies of the style picture ------------------------------------------------------------------

@pytest.mark.parametrize('find', ['match', 'fast_match'])
@pytest.mark.parametrize('variety', [0., 0.7])
def test_whole_patches_match_by_their_cosine_in_every_copy_and_across_no_seam(doodle, find, variety):
    rng = np.random.default_rng(4)
    copies = [rng.random((h, w, 5), np.float32) * rng.random((h, w, 1)) for h, w in ((6, 5), (2, 9), (4, 8), (7, 3))]
    f = rng.random((9, 7, 5), dtype=np.float32) * 100
    f[:3, :3] = 0                                                           # its cosine with anything is 0
    g, whole = doodle.sheet(copies)
    f[6:, 4:] = g[5:8, 2:5]                                                 # would match best across the first seam
    T, b = doodle.T, doodle.theano.function([], doodle.patch_scale(doodle.theano.shared(g)))() * whole
    u, history = doodle.theano.shared(f), np.float32(rng.random(len(whole)))
    matches, new = getattr(doodle, find)(u, doodle.theano.shared(g), *([np.float32(variety), T.as_tensor_variable(
        history)] if variety else [None, None]), scale=(doodle.patch_scale(u), T.as_tensor_variable(b)))
    j, *new = doodle.theano.function([], [matches, new] if variety else [matches])()

    S = np.concatenate([twin.patch_scores(np.moveaxis(copy, 2, 0).astype(float), np.moveaxis(f, 2, 0).astype(float))
                        for copy in copies if len(copy) > 2])               # (patches of all copies, M)
    assert len(S) == np.count_nonzero(whole) and (whole[j] == 1).all()
    number = np.cumsum(whole).astype(int) - 1                               # of a patch of the sheet among the copies'
    assert_best(S - variety * history[whole > 0, None], number[j])
    if variety:
        np.testing.assert_allclose(new[0][whole > 0], S.max(axis=1), rtol=1e-5)


def test_copies_are_the_picture_turned_and_rescaled(doodle):
    y, x = np.mgrid[:60, :90]
    picture = np.stack([x, y, 0 * x + 80]) + 20.                           # ramps: a pixel's values tell its place
    copies = doodle.style_copies(picture, 2, 3, doodle.Image.BICUBIC)
    assert len(copies) == 35 and (copies[0] == np.float32(picture)).all()
    found = []
    for copy in copies:
        assert abs(copy[2] - 100).max() < 1e-3                              # nothing from outside the picture
        dy, dx = (slope.mean() for slope in np.gradient(copy[0]))
        found.append((np.degrees(np.arctan2(-dy, dx)) / 7.5, (1 / np.hypot(dy, dx) - 1) / 0.05))
        assert abs(copy[:2].mean(axis=(1, 2)) - picture[:2].mean(axis=(1, 2))).max() < 0.51    # about the centre
    assert {tuple(np.round(steps)) for steps in found} == {(j, k) for j in range(-2, 3) for k in range(-3, 4)}
    assert np.abs(found - np.round(found)).max() < 0.2
