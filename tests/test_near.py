"""--matching=near: NearMatching against a version of it in NumPy, and what a run makes of it."""
import numpy as np
import pytest

from test_matching import brute_force
from test_twin import thin_weights


def drawn(n):
    """splitmix64 of uint64 numbers."""
    n = n + np.uint64(0x9e3779b97f4a7c15)
    n = (n ^ n >> np.uint64(30)) * np.uint64(0xbf58476d1ce4e5b9)
    n = (n ^ n >> np.uint64(27)) * np.uint64(0x94d049bb133111eb)
    return n ^ n >> np.uint64(31)


def nearly(S, image, style, guess, sweeps, made):
    """PatchMatch over all scores S (j, i), -inf where there is no match; `image` and `style` count rows and columns."""
    (H, W), (h, w), i = image, style, np.arange(S.shape[1])
    y, x = np.divmod(i, W)
    first = np.isfinite(S[:, 0]).argmax()
    j = np.where(np.isfinite(S[guess, i]), guess, first)
    for sweep in range(sweeps):
        before, n = j, drawn(drawn(np.array([made + sweep], np.uint64)) + np.uint64(i))

        def attempt(row, column, there=True):
            nonlocal j
            there = there & (row >= 0) & (row < h) & (column >= 0) & (column < w)
            other = np.where(there, row * w + column, j)
            better = (S[other, i] > S[j, i]) | ((S[other, i] == S[j, i]) & (other < j))
            j = np.where(better, other, j)

        def follow(down, right):
            there = (y + down >= 0) & (y + down < H) & (x + right >= 0) & (x + right < W)
            row, column = np.divmod(before[np.where(there, (y + down) * W + x + right, 0)], w)
            attempt(row - down, column - right, there)

        def steps(rows, columns):
            nonlocal n
            n = drawn(n)
            return [np.int64(half % np.uint64(2 * most + 1)) - most
                    for half, most in ((n >> np.uint64(32), rows), (n & np.uint64(0xffffffff), columns))]
        for down, right in ((-1, 0), (0, -1), (1, 0), (0, 1)):
            follow(down, right)
        for _ in range(4):
            follow(*steps(8, 8))
        row, column = np.divmod(j, w)
        for d in range(9):
            attempt(row + d // 3 - 1, column + d % 3 - 1)
        row, column = np.divmod(j, w)
        most = max(h, w) + 2
        while most:
            down, right = steps(min(most, h + 2), min(most, w + 2))
            attempt(row + down, column + right)
            most //= 2
    return j


@pytest.fixture(scope='module')
def found(doodle):
    """Matches by arrays u, v, b, guess, and sweeps with the number of those made."""
    T = doodle.T
    symbols = T.tensor3(), T.tensor3(), T.vector(), T.lvector(), T.lvector()
    u, v, b, guess, draws = symbols
    a = T.ones(((u.shape[0] - 2) * (u.shape[1] - 2),))
    function = doodle.theano.function(symbols, doodle.NearMatching()(u, v, a, b, guess, draws))
    return lambda u, v, b, guess, *draws: function(u, v, b, guess, np.array(draws))


@pytest.fixture
def integers():
    """u and v of small whole numbers, whose products and sums are exact, b of 1, and a guess."""
    rng = np.random.default_rng(0)
    u, v = (np.float32(rng.integers(0, 5, shape)) for shape in ((19, 23, 37), (31, 17, 37)))
    return u, v, np.ones(29 * 15, np.float32), rng.integers(0, 29 * 15, 17 * 21)


@pytest.mark.parametrize('sweeps', [1, 3])
@pytest.mark.parametrize('left_out', [False, True])
def test_matches_are_those_of_the_numpy_version_with_any_threads(found, integers, threads, sweeps, left_out):
    u, v, b, guess = integers
    b[:3] = b[7::2] = 1 - left_out
    S = np.rint(9 * brute_force(u, v)) + np.where(b > 0, 0, -np.inf)[:, None]               # (j, i)
    expected = nearly(S, (17, 21), (29, 15), guess, sweeps, (5 << 32) + 7)
    for count in (1, 2, 5):
        threads(count)
        assert (found(u, v, b, guess, sweeps, (5 << 32) + 7) == expected).all()
    share = (expected == S.argmax(axis=0)).mean()
    assert (b[expected] > 0).all() and (expected != nearly(S, (17, 21), (29, 15), guess, sweeps, 0)).any()
    assert .002 * (1 + sweeps) < share < .9                             # of chance it would be .002


def test_what_does_not_fit_is_refused(found, integers):
    u, v, b, guess = integers
    for bad in ((u[:2], v, b, guess), (u[:, :, :9], v, b, guess), (u, v, b[1:], guess), (u, v, b, guess[1:]),
                (u, v, b, guess - 999), (u, v, b, guess + 999)):
        with pytest.raises(ValueError):
            found(*bad, 1, 0)


def test_without_sweeps_matches_are_exact(found, integers):
    u, v, b, _ = integers
    assert (found(u, v, b, np.zeros(0, int), 0, 9) == np.rint(9 * brute_force(u, v)).argmax(axis=0)).all()


def test_enlarged_matches_stay_where_they_were_in_the_picture_and_in_its_copies(doodle):
    y, x = np.mgrid[:30, :41]
    image, (h, w) = (32, 43), (24, 35)
    copy = (y + x) % 2                                                  # of two: that of (24, 35), or one of (21, 40)
    row, column = np.rint(y * 18 / 29).astype(int), np.rint(x * 32 / 40).astype(int)
    matches = ((row + 24 * copy) * 38 + column).ravel()
    large_image, large = (66, 86), [(48, 70), (41, 79)]
    found = doodle.enlarged_matches(matches, (image, [(h, w), (21, 40)]), (large_image, large))
    row, column = np.divmod(found.reshape(64, 84), 77)
    there = row >= 48
    assert there.mean() == pytest.approx(.5, abs=.05)
    Y, X = np.mgrid[:64, :84]
    assert abs(row - 48 * there - Y * 36 / 62).max() < 3 and abs(column - X * 64 / 82).max() < 4
    assert (row[~there] <= 45).all() and (column[~there] <= 67).all() and (row[there] <= 48 + 38).all()
    again = doodle.enlarged_matches(matches, (image, [(h, w), (21, 40)]), (image, [(h, w), (21, 40)]))
    assert (again == matches).all()


# ---- in a run --------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def objective(doodle):
    """Builds an objective with --matching=near, or another."""
    weights = doodle.Weights('vgg19', {name[4:]: pair for name, pair in thin_weights().items()}, '', '')

    def built(*arguments, fast=True):
        options = doodle.parse_options(['--style=-', '--style-layers=2_1', '--content-weight=0', '--matching=near',
                                        '--random-seed=3', *arguments])
        return doodle.Objective(weights, options, False, False, fast)
    return built


@pytest.fixture
def begin(doodle, monkeypatch):
    """Sets an objective to one of two phases, of which the second is searched nearly."""
    monkeypatch.setattr(doodle, 'NEAR_PAIRS', 1)
    style = np.random.default_rng(1).uniform(0, 255, (3, 80, 72))
    return lambda objective, phase: objective.set_phase(None, style[:, ::2 - phase, ::2 - phase], None, None, (
        30 << phase, 40 << phase), None, phase > 0)


def images(doodle, count):
    """Noise of the first phase, and images of the second, each near the one before."""
    rng = np.random.default_rng(2)
    image = rng.uniform(0, 255, (3, 40, 30))
    steps = [doodle.enlarged(image, (60, 80)), *rng.normal(0, 3, (count - 1, 3, 80, 60))]
    return image, np.cumsum(steps, axis=0).clip(0, 255)


@pytest.mark.slow
def test_a_resumed_run_makes_the_same_draws(doodle, objective, begin):
    ours, (small, large) = objective(), images(doodle, 4)
    begin(ours, 0)
    ours(small)
    begin(ours, 1)
    states, losses = [], []
    for image in large:
        states.append(ours.state())
        losses.append(ours(image).total)
    assert [state['draws 2_1'].tolist() for state in states] == [
        [sweeps, (3 << 32) + made] for sweeps, made in ((8, 0), (2, 8), (2, 10), (2, 12))]
    other = objective()                                                 # of a run that is resumed in the second phase
    for first in (2, 0):
        begin(other, 1)
        other.restore(states[first])
        assert [other(image).total for image in large[first:]] == losses[first:]
    assert ours(large[3]).total != losses[3] and not ours.pure          # goes on from the matches before


def test_matches_are_nearly_those_of_an_exact_run_whose_first_phase_is_the_same(doodle, objective, begin):
    runs, (small, large) = [objective(), objective('--matching=exact')], images(doodle, 10)
    matches = [], []
    for run, found in zip(runs, matches):
        begin(run, 0)
        run(small)
        found.append(run.style['2_1'].matches.get_value())
        begin(run, 1)
        for image in large:
            run(image)
            found.append(run.style['2_1'].matches.get_value())
    shares = [(ours == exact).mean() for ours, exact in zip(*matches)]
    assert shares[0] == 1 and .1 < shares[1] < shares[10] < 1 and runs[1].pure
    assert runs[0].matching_seconds() > 0


def test_a_run_goes_on_from_a_device_without_draws_and_on_it(doodle, objective, begin):
    """A GPU, whose matches are exact, has none."""
    ours, (small, large) = objective(), images(doodle, 1)
    begin(ours, 0)
    ours(small)
    begin(ours, 1)
    ours(large[0])
    state = ours.state()
    ours.restore({name: array for name, array in state.items() if not name.startswith('draws')})
    exact = objective('--matching=exact')
    begin(exact, 1)
    exact.restore(state)
    assert (exact.state()['matches 2_1'] == state['matches 2_1']).all()


@pytest.mark.parametrize('name, forged', [
    ('matches 2_1', lambda values: values[:-1]), ('matches 2_1', lambda values: values + 99999),
    ('draws 2_1', lambda values: values * 9), ('draws 2_1', lambda values: -values),
    ('draws 2_1', lambda values: values[:1]), ('draws 2_1', np.float64)])
def test_a_forged_state_is_refused_also_at_the_start_of_a_phase(doodle, objective, begin, name, forged):
    ours, (small, _) = objective(), images(doodle, 1)
    begin(ours, 0)
    first = ours.state()
    ours(small)
    begin(ours, 1)
    state = ours.state()
    with pytest.raises(doodle.UserError, match='its matches are not those of this run'):
        ours.restore(state | {name: forged(state[name])})
    ours.restore(state)
    begin(ours, 0)
    ours.restore(first)                                                 # nothing was matched then


@pytest.mark.parametrize('forged', [lambda values: values[:0], lambda values: values + 10 ** 6])
def test_forged_matches_that_only_the_next_phase_reads_do_no_harm(doodle, objective, begin, forged):
    ours, (small, large) = objective(), images(doodle, 1)
    begin(ours, 0)
    ours(small)
    ours.restore(ours.state() | {'matches 2_1': forged(ours.state()['matches 2_1']), 'fresh': np.array(True)})
    begin(ours, 1)
    assert np.isfinite(ours(large[0]).total)


@pytest.mark.parametrize('other', ['--variety=1', '--method=gatys'])
def test_variety_and_gatys_are_refused(refused, other):
    assert refused('--style=a.png', '--matching=near', other) == (
        '--matching=near is for patches, and not for --variety, which needs all their scores.',
        'leave one of them out.')
