"""L-BFGS-B and the way through the phases, on losses that need no network."""
import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from scipy import optimize

from conftest import ROOT, NoNetwork, first_quick, minimised
from golden_data import FOLDER
from test_twin import thin_weights

SHAPE = 3, 6, 5


class Quadratic:
    """sum s (x - target)^2, and what it was asked for; `sign` = -1 gives a gradient that points the wrong way."""

    def __init__(self, target, sign=1):
        self.target, self.sign, self.asked = target, sign, []
        self.slope = np.random.default_rng(0).uniform(.1, 5, SHAPE)

    def __call__(self, x):
        assert x.shape == SHAPE
        self.asked.append(x.copy())
        difference = x - self.target
        return (self.slope * difference ** 2).sum(), self.sign * 2 * self.slope * difference


def random(low=0, high=255, seed=1):
    return np.random.default_rng(seed).uniform(low, high, SHAPE)


def constant(asked):
    """A loss without a slope."""
    def evaluate(x):
        asked.append(x.copy())
        return 1., np.zeros(SHAPE)
    return evaluate


# ---- Minimiser -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('evaluations', [1, 2, 3, 10, 77])
def test_the_loss_is_evaluated_exactly_as_often_as_asked(doodle, evaluations):
    smooth, misleading, asked = Quadratic(random()), Quadratic(random(), sign=-1), []
    for evaluate in (smooth, misleading, constant(asked)):
        minimised(doodle.Minimiser(random(seed=2)), evaluate, evaluations)
    assert len(smooth.asked) == len(misleading.asked) == len(asked) == evaluations


def test_the_result_is_the_last_accepted_image(doodle):
    start, loss, images = random(), Quadratic(random(seed=2)), []
    before, minimiser = start.copy(), doodle.Minimiser(start)

    def evaluate(x):
        images.append(minimiser.image)
        return loss(x)
    minimised(minimiser, evaluate, 12)
    images = list({id(image): image for image in [*images, minimiser.image]}.values())
    values = [loss(x)[0] for x in images]
    assert len(images) > 4 and (start == before).all() and (images[0] == start).all()
    assert all(later < earlier for earlier, later in zip(values, values[1:]))          # none is a view of another
    assert all(any((x == asked).all() for asked in loss.asked[:12]) for x in images)


def test_where_no_step_is_better_the_start_stays(doodle):
    minimiser = minimised(doodle.Minimiser(random(seed=2)), Quadratic(random(), sign=-1), 60)
    np.testing.assert_allclose(minimiser.image, random(seed=2), atol=1e-9)


def test_the_minimum_is_found_within_0_and_255(doodle):
    target = random(-100, 355)
    loss = Quadratic(target)
    minimiser = minimised(doodle.Minimiser(random()), loss, 100)
    np.testing.assert_allclose(minimiser.image, target.clip(0, 255), atol=1e-3)
    assert np.min(loss.asked) == 0 and np.max(loss.asked) == 255


def rosenbrock(x):
    """A valley with a bend in it, whose minimum takes many line searches."""
    y = (x.ravel() - 100) / 50
    loss, gradient = optimize.rosen(y), optimize.rosen_der(y) / 50
    return loss, gradient.reshape(x.shape)


def test_it_asks_for_what_scipy_asks_for(doodle):
    ours, scipys = [], []
    minimised(doodle.Minimiser(random()), lambda x: (ours.append(x.copy()), rosenbrock(x))[1], 150)

    def evaluate(x):
        scipys.append(x.reshape(SHAPE).copy())
        loss, gradient = rosenbrock(scipys[-1])
        return loss, gradient.ravel()
    optimize.fmin_l_bfgs_b(evaluate, random().ravel(), bounds=[(0, 255)] * random().size, m=5, factr=0, pgtol=0,
                           maxfun=150, maxiter=150)
    assert len(scipys) >= 100 and all((a == b).all() for a, b in zip(ours, scipys))


@pytest.mark.parametrize('at', [0, 1, 2, 13, 30, 59])
def test_its_state_is_all_that_it_knows(doodle, at):
    whole, asked = [], []
    minimised(doodle.Minimiser(random()), lambda x: (whole.append(x.copy()), rosenbrock(x))[1], 60)
    first = minimised(doodle.Minimiser(random()), lambda x: (asked.append(x.copy()), rosenbrock(x))[1], at)
    second, state = doodle.Minimiser(random(seed=2)), {name: value.copy() for name, value in first.state().items()}
    minimised(first, rosenbrock, 3)                                                    # touches no copy
    second.restore(state)
    minimised(second, lambda x: (asked.append(x.copy()), rosenbrock(x))[1], 60 - at)
    assert len(asked) == 60 and all((a == b).all() for a, b in zip(asked, whole))


def test_a_loss_a_million_times_the_least_blows_up_and_is_recovered_from_once(doodle):
    minimiser = minimised(doodle.Minimiser(random()), rosenbrock, 20)
    image = minimiser.image
    for loss in (1e6 * max(1, rosenbrock(image)[0]) * 1.1, np.nan):
        minimiser.ask()
        with pytest.raises(FloatingPointError, match='blew up') as error:
            minimiser.tell(loss, np.zeros(SHAPE))
        if np.isfinite(loss):
            minimiser.recover(error.value)
            assert (minimiser.ask() == image).all() and minimiser.image is image
            minimised(minimiser, rosenbrock, 1)
        else:
            with pytest.raises(FloatingPointError):
                minimiser.recover(error.value)


class Jumping:
    """A loss that jumps where a match changes: of each row to one of two others, with the matches of another image."""

    def __init__(self):
        self.targets, self.slope = (random(seed=8), random(seed=9)), np.random.default_rng(0).uniform(.1, 5, SHAPE)

    def __call__(self, x, image):
        chosen = np.where(image.sum(axis=2, keepdims=True) // 20 % 2 > 0, *self.targets)
        return (self.slope * (x - chosen) ** 2).sum(), 2 * self.slope * (x - chosen)


def searched(minimiser, evaluations):
    """The kind of each evaluation, n(ew), h(eld) or, of what was accepted by held matches, a(fresh); the images."""
    loss, kinds, asked = Jumping(), '', []
    for _ in range(evaluations):
        x, held, accepted = minimiser.ask(), minimiser.held(), minimiser.task[0] == minimiser.NEW_X
        kinds += 'h' if held else 'a' if accepted else 'n'
        assert not accepted or (x == minimiser.image).all()
        asked.append(x.copy())
        minimiser.tell(*loss(x, minimiser.image if held else x))
    return kinds, asked


def held(doodle, holds=True):
    minimiser = doodle.Minimiser(random(seed=3))
    minimiser.holds = holds
    return minimiser


def test_a_line_search_holds_its_first_matches_from_the_third_evaluation_on(doodle):
    fresh, holding = held(doodle, False), held(doodle)
    assert set(searched(fresh, 200)[0]) == {'n'}
    kinds, _ = searched(holding, 200)
    assert kinds.count('a') > 20 and not re.search('(?<!nn)(?<!h)h|(?<!h)a|a(?!n)', kinds)
    fresh, holding = (Jumping()(image, image)[0] for image in (fresh.image, holding.image))
    assert holding < .9 * fresh


def test_an_accepted_image_goes_into_the_memory_with_its_new_matches(doodle):
    minimiser, loss = held(doodle), Jumping()
    while minimiser.task[0] != minimiser.NEW_X:
        before = minimiser.image
        minimiser.tell(*loss(minimiser.ask(), minimiser.image if minimiser.held() else minimiser.ask()))
    evaluation = loss(minimiser.image, minimiser.image)
    minimiser.tell(*evaluation)
    step, change = (minimiser.image - before).ravel(), (evaluation[1] - loss(before, before)[1]).ravel()
    n, m = step.size, minimiser.CORRECTIONS
    steps, changes = minimiser.work[:2 * n * m].reshape(2, m, n)
    np.testing.assert_allclose(steps[-1], step, atol=1e-9)
    np.testing.assert_allclose(changes[-1], change, atol=1e-9)
    np.testing.assert_allclose(minimiser.work[2 * n * m:][:m * m][-1], step @ change, rtol=1e-9)


@pytest.mark.parametrize('at', [20, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60])
def test_the_state_of_one_that_holds_is_all_that_it_knows(doodle, at):
    _, whole = searched(held(doodle), 80)
    first, second = held(doodle), doodle.Minimiser(random())
    searched(first, at)
    second.restore(first.state())
    _, asked = searched(second, 80 - at)
    assert all((ours == theirs).all() for ours, theirs in zip(asked, whole[at:], strict=True))


# ---- paint -----------------------------------------------------------------------------------------------------------

class Objective(NoNetwork):
    """A loss that knows nothing of networks: `pull` times the squared distance from an image of its own."""

    def __init__(self, doodle, pull=0., fails_at=None):
        self.doodle, self.pull, self.fails_at, self.phases, self.asked = doodle, pull, fails_at, [], []

    def set_phase(self, *arguments):
        super().set_phase()
        self.phases.append(arguments)

    def __call__(self, x):
        if len(self.asked) == self.fails_at:
            raise KeyboardInterrupt(2)
        self.asked.append(x.copy())
        self.fresh = False
        difference = x - 200 * np.cos(np.arange(x.size)).reshape(x.shape)
        total, gradient = (self.pull * difference ** 2).sum(), 2 * self.pull * difference
        return self.doodle.Evaluation(total, {}, {}, 0., gradient, 0., 0.)


@pytest.fixture
def painted(doodle, tmp_path, monkeypatch, handlers):
    """Paint with an objective; returns the journal, where the run got to, and the sizes of the images it saved."""
    monkeypatch.chdir(tmp_path)

    def painted(objective, *arguments):
        options = doodle.parse_options([
            f'--style={FOLDER / "face_style.png"}', f'--content={FOLDER / "face_content.png"}', '--output=out.png',
            '--save-every=0', '--print-every=0', *arguments])
        inputs, _ = doodle.read_inputs(options)
        at = doodle.Checkpoint({'random_seed': 5})
        journal = doodle.Journal(options, doodle.place_output(options), inputs, at)
        seen, save = SimpleNamespace(journal=journal, at=at, saved=[], inputs=inputs), journal.save
        monkeypatch.setattr(journal, 'save', lambda at, **how: (
            seen.saved.append(np.shape(at.minimiser.image)), save(at, **how))[1])
        try:
            with doodle.Signals() as signals:
                doodle.paint(objective, inputs, options, at, journal, signals)
        except KeyboardInterrupt:
            journal.save(at)
        return seen
    return painted


def test_each_phase_has_its_sizes_pictures_maps_and_evaluations(doodle, painted):
    objective = Objective(doodle, pull=.5)
    inputs = painted(objective, '--phases=3', '--iterations=4').inputs
    assert [x.shape for x in objective.asked] == 4 * [(3, 28, 24)] + 4 * [(3, 56, 48)] + 4 * [(3, 112, 96)]
    widths = zip(objective.phases, (24, 48, 96), (31, 62, 124))
    assert [near for *_, near in objective.phases] == [False, True, True]
    for (content, style, content_map, style_map, size, alpha, _), width, style_width in widths:
        assert size == (width, width * 7 // 6) and content.shape == (3, *size[::-1]) and style.shape[2] == style_width
        assert content_map is inputs.content_map and style_map is inputs.style_map and alpha is None
    content, style, *_ = objective.phases[-1]
    assert (content == inputs.content[:, :, ::-1].transpose(2, 0, 1)).all()
    assert (style == inputs.style[:, :, ::-1].transpose(2, 0, 1)).all()


def test_a_phase_starts_from_the_last_result_in_floating_point(doodle, painted):  # fault 6
    objective = Objective(doodle)                                                      # no slope: the noise stays
    seen = painted(objective, '--phases=2', '--iterations=1', '--seed-range=100:101')
    first, second = objective.asked
    assert 100 <= first.min() < first.max() <= 101
    assert 99.5 < second.min() < second.max() < 101.5 and len(np.unique(second)) > second.size / 2
    assert (second == doodle.enlarged(first, (96, 112))).all()
    assert seen.saved == [(3, 56, 48), (3, 112, 96)]                                   # also where no step was better


def test_the_result_is_written_after_every_phase_at_full_size(doodle, painted):
    seen = painted(Objective(doodle, pull=.5), '--phases=3', '--iterations=5')
    assert seen.saved == [(3, 28, 24), (3, 56, 48), (3, 112, 96)]
    written = doodle.read_picture('out.png').pixels
    assert (written == doodle.to_pixels(seen.at.minimiser.image, (96, 112))).all()


@pytest.mark.parametrize('evaluations', [5, 6, 7, 15, 20])
def test_an_interruption_leaves_the_last_accepted_image(doodle, painted, evaluations):  # fault 16
    objective = Objective(doodle, pull=.5, fails_at=evaluations)
    seen = painted(objective, '--phases=2', '--iterations=12', '--stop-when-converged=0')
    written = doodle.read_picture('out.png').pixels
    assert (written == doodle.to_pixels(seen.at.minimiser.image, (96, 112))).all()
    assert (written != doodle.to_pixels(objective.asked[0], (96, 112))).any()
    if evaluations > 13:
        assert (written != doodle.to_pixels(objective.asked[12], (96, 112))).any()


def test_an_interruption_before_the_first_evaluation_leaves_nothing(doodle, painted, tmp_path):
    seen = painted(Objective(doodle, fails_at=0), '--phases=1')
    assert seen.journal.save(seen.at) is False and not (tmp_path / 'out.png').exists()


def test_after_a_loss_that_is_no_number_the_matches_are_computed_anew(doodle):
    """With --cache=1 the matches are those of the phase's first image, until the run goes on from another one."""
    weights = doodle.Weights('vgg19', {name[4:]: pair for name, pair in thin_weights().items()}, '', '')
    options = doodle.parse_options(['--style=-', '--style-layers=2_1', '--content-weight=0', '--cache=1'])
    style, noise = (np.random.default_rng(seed).uniform(0, 255, (3, 24, 22)) for seed in (1, 2))

    def started(image):
        objective = doodle.Objective(weights, options, False, False, fast=True)
        objective.set_phase(None, style, None, None, (22, 24))
        at = doodle.Checkpoint({})
        at.begin(0, image, objective)
        return objective, at, lambda: doodle.evaluate(objective, at, SimpleNamespace(record=lambda *_: None),
                                                      SimpleNamespace(heard=contextlib.nullcontext))
    objective, at, evaluate = started(noise)
    for _ in range(8):
        evaluate()
    matches, image = objective.style['2_1'].matches.get_value(), at.minimiser.image
    assert (image != noise).any() and at.number == 8
    at.minimiser.ask()[:] = np.nan
    with pytest.raises(FloatingPointError) as error:
        evaluate()
    assert (objective.style['2_1'].matches.get_value() == matches).all() and at.number == 8
    at.minimiser.recover(error.value)
    evaluate()
    anew, _, evaluate_anew = started(image)
    evaluate_anew()
    found = objective.style['2_1'].matches.get_value()
    assert (found == anew.style['2_1'].matches.get_value()).all() and (found != matches).any()


@pytest.mark.parametrize('name, forged', first_quick([
    ('matches 2_1', lambda values: values[:-1]), ('matches 2_1', lambda values: values - values.max() - 1),
    ('matches 2_1', lambda values: values + 99), ('matches 2_1', lambda values: values[None]),
    ('matches 2_1', np.float64), ('fresh', np.int8), ('fresh', lambda values: values[None]), ('matches 3_1', np.array),
    ('history 2_1', lambda values: values[:-1]), ('history 2_1', lambda values: values * np.float32(np.nan)),
    ('history 2_1', np.float64)], 2))
def test_matches_of_a_forged_checkpoint_are_refused(doodle, name, forged):
    weights = doodle.Weights('vgg19', {name[4:]: pair for name, pair in thin_weights().items()}, '', '')
    options = ['--style=-', '--style-layers=2_1', '--content-weight=0', '--cache=1', '--variety=1']
    objective = doodle.Objective(weights, doodle.parse_options(options), False, False, fast=True)
    style, image = (np.random.default_rng(seed).uniform(0, 255, (3, 24, 22)) for seed in (1, 2))
    objective.set_phase(None, style, None, None, (22, 24))
    loss, state = objective(image).total, objective.state()
    with pytest.raises(doodle.UserError, match='its matches are not those of this run'):
        objective.restore(state | {name: forged(state.get(name))})
    objective.restore(state)
    assert objective(image).total == loss


# ---- what repeats ----------------------------------------------------------------------------------------------------

@pytest.fixture
def textured(doodle, tmp_path, monkeypatch, capsys, handlers):
    """Paint a small texture by the program with a thin network; some line searches fail from evaluation 70 on.

    textured('--resume', ..., stop=110) gets SIGTERM after evaluation 110. Returns the exit code, what was said, log
    (without header and seconds), frames and result, and how many evaluations were `computed`.
    """
    monkeypatch.chdir(tmp_path)
    weights = doodle.Weights('vgg19', {name[4:]: pair for name, pair in thin_weights().items()}, '', '')
    monkeypatch.setattr(doodle, 'find_weights', lambda _: (weights, []))
    monkeypatch.setattr(doodle, 'import_theano', lambda device: (device, None))

    def textured(*arguments, picture=5, stop=None):
        Image.fromarray(np.random.default_rng(picture).integers(0, 256, (32, 28, 3), np.uint8)).save('a.png')
        seen, evaluate, record = SimpleNamespace(computed=0), doodle.Objective.__call__, doodle.Journal.record

        def counted(objective, x, **how):
            seen.computed += 1
            return evaluate(objective, x, **how)

        def recorded(journal, at, *evaluation):
            record(journal, at, *evaluation)
            if at.number == stop:
                signal.raise_signal(signal.SIGTERM)
        with monkeypatch.context() as patched:
            patched.setattr(doodle.Objective, '__call__', counted)
            patched.setattr(doodle.Journal, 'record', recorded)
            seen.code = doodle.main(['--style=a.png', '--semantic-weight=0', '--style-layers=2_1', '--phases=1',
                                     '--iterations=120', '--random-seed=1', '--save-every=8', '--log=log', *arguments])
        seen.out = capsys.readouterr().out
        seen.log = [{name: value for name, value in json.loads(line).items() if 'seconds' not in name}
                    for line in Path('log').read_text().splitlines()[1:]]
        seen.files = {path.name: path.read_bytes() for path in [*Path('frames').glob('0*.png'), Path('output.png')]}
        if not seen.code:
            for path in (*Path('frames').iterdir(), 'log'):
                os.remove(path)
        return seen
    return textured


def converging(textured):
    """A picture whose phase converges in less than 300 evaluations, that run, and where it skips how many cycles.

    Which picture does depends on rounding, and so on the processor.
    """
    for picture in range(1, 20):
        run = textured('--iterations=300', picture=picture)
        for entry in run.log:
            if entry.get('skipped', 0) >= 2 * entry.get('cycle', 1):
                return picture, run, entry['evaluation'], entry['cycle'], entry['skipped']
    raise AssertionError('no picture converges')


@pytest.mark.slow
def test_what_was_evaluated_not_long_ago_is_not_computed_again_and_all_is_the_same(doodle, textured, monkeypatch):
    picture, _, at, cycle, _ = converging(textured)
    given = '--stop-when-converged=0', f'--iterations={at + 2 * cycle}'
    remembering, stopped, resumed = (
        textured(*given, *resume, picture=picture, stop=stop)
        for resume, stop in (([], None), ([], at + cycle // 2), (['--resume'], None)))
    monkeypatch.setattr(doodle, 'REMEMBERED', 0)
    forgetting = textured(*given, picture=picture)
    assert forgetting.computed == len(forgetting.log) == at + 2 * cycle and stopped.code == 143
    assert remembering.computed <= at                                   # from there on all comes again
    for run in (remembering, resumed):
        assert (run.code, run.log, run.files) == (0, forgetting.log, forgetting.files)


@pytest.mark.parametrize('room, length, computed', [(24, 24, 24), (24, 25, 75), (7, 9, 7 + 3 * 2), (1, 3, 1 + 3 * 2)])
def test_of_a_cycle_too_long_to_remember_a_part_is(doodle, monkeypatch, room, length, computed):
    """A part that is the same in each cycle; but what comes again only after 24 others is forgotten."""
    objective, options = Objective(doodle), doodle.parse_options(['--style=-'])
    memory = 21 * room * doodle.evaluation_memory(SHAPE[:0:-1], options)
    remembered, images = doodle.Remembered(objective, options, memory), [random(seed=k) for k in range(length)]
    for _ in range(2):                                                                 # nothing is left of a phase
        objective.asked.clear()
        remembered.set_phase(None, None, None, None, SHAPE[:0:-1], None)
        for image in 3 * images:
            remembered(image)
        assert len(objective.asked) == computed


@pytest.mark.parametrize('option', ['--variety=0.1', '--cache=1'])
def test_nothing_is_remembered_where_the_image_alone_does_not_tell(doodle, textured, option):
    done = textured(option, '--stop-when-converged=0', '--iterations=20', '--seed=content', '--content=a.png',
                    '--style-weight=0', '--content-weight=0', '--smoothness=0')        # it stays where it is
    assert done.computed == 20 and len({entry['gradient_max'] for entry in done.log}) == 1


def test_whole_cycles_are_counted_as_if_they_had_been_made(doodle):
    """The minimiser starts anew after 5, 9, 12, 16, 19, .. evaluations, from two images in turn."""
    gradients = [300., 7.] + 9 * [90., 2., .5, 31., 1., .2, 8.]                        # the largest; 7 in a cycle

    def walked(iterations, skipping, before):
        """A run of so many evaluations, that was to have so many `before` at first."""
        at, entries = doodle.Checkpoint({}, memory={'fresh': np.array(False)}), []
        journal = SimpleNamespace(skip=lambda at, *cycle: entries.append((at.evaluation, *cycle)))
        at.minimiser = SimpleNamespace(restart=lambda: at.evaluation > 2 and 'ba'[at.evaluation % 7 == 5]
                                       if at.evaluation % 7 in (2, 5) else None)
        while at.evaluation < iterations:
            if skipping:
                at.skip(iterations if at.evaluation >= before else before, journal)
            at.count(gradients[at.evaluation])
        return at, entries
    for iterations, before, skips in (
            (12, 1, {}), (13, 1, {}), (19, 1, {}), (20, 1, {12: 7}), (26, 1, {12: 7}), (27, 1, {12: 14}),
            (61, 1, {12: 42}), (61, 12, {12: 42}), (61, 13, {13: 42}), (61, 17, {17: 42}), (61, 30, {12: 14, 30: 28})):
        (at, entries), (other, _) = (walked(iterations, skipping, before) for skipping in (True, False))
        assert entries == [(evaluation, 7, skipped) for evaluation, skipped in skips.items()]
        assert (at.evaluation, at.number) == (other.evaluation, other.number) == (iterations, iterations)
        assert at.error == pytest.approx(other.error, rel=1e-12)


def test_a_phase_that_can_only_repeat_itself_ends_early_and_the_next_begins(doodle, painted, tmp_path, monkeypatch):
    bar = doodle.tqdm
    monkeypatch.setattr(doodle, 'tqdm', lambda **how: bar(**how | dict(disable=False, file=io.StringIO())))
    done, whole = (painted(Objective(doodle), '--phases=2', '--iterations=50', f'--log={option}',
                           f'--stop-when-converged={option}') for option in (1, 0))    # no slope: it stays at the noise
    logs = [[json.loads(line) for line in (tmp_path / name).read_text().splitlines()[1:]] for name in '10']
    skips = [dict(phase=phase, evaluation=2, cycle=1, skipped=47) for phase in (0, 1)]
    assert [entry for entry in logs[0] if 'skipped' in entry] == skips and len(logs[0]) == 8 and len(logs[1]) == 100
    assert all(entry in logs[1] for entry in logs[0] if 'skipped' not in entry) and logs[0][-1] == logs[1][-1]
    assert done.at.number == whole.at.number == done.journal.bar.n == whole.journal.bar.n == 100
    assert done.journal.bar.n - done.journal.bar.initial == 6 and done.at.number - done.journal.page.first == 3  # made
    assert (done.at.minimiser.image == whole.at.minimiser.image).all() and done.saved == whole.saved
    assert done.at.error == pytest.approx(whole.at.error, rel=1e-12) and done.at.error < 3


@pytest.mark.slow
def test_where_it_has_converged_all_is_as_if_every_evaluation_had_been_made(textured):
    """The minimiser starts anew, and after a cycle once more from the same image."""
    def kept(run):
        return [entry for entry in run.log if 'skipped' not in entry]
    picture, done, at, cycle, skipped = converging(textured)
    walked, stopped, resumed = (
        textured('--iterations=300', *option, picture=picture, stop=stop)
        for option, stop in ((['--stop-when-converged=0'], None), ([], at - cycle // 2), (['--resume'], None)))
    assert stopped.code == 143 and resumed.log == done.log and resumed.files == done.files
    assert [entry for entry in done.log if 'skipped' in entry] == [
        dict(phase=0, evaluation=at, cycle=cycle, skipped=(299 - at) // cycle * cycle)]
    made = [*range(at), *range(at + skipped, 300)]
    assert kept(done) == [walked.log[k] for k in made] and done.files == {
        name: content for name, content in walked.files.items() if name == 'output.png' or int(name[:-4]) in made}
    assert done.out.splitlines()[-1].split('average')[1] == walked.out.splitlines()[-1].split('average')[1]


def test_the_matches_of_the_line_search_s_start_are_put_back(doodle):
    """From one of the last three evaluations, or else they are computed."""
    class Matching(Objective):
        def __call__(self, x, held=False):
            self.history = self.history if held else x.sum(keepdims=True)
            return super().__call__(x)._replace(total=float(self.history.sum()))
    objective, options = Matching(doodle), doodle.parse_options(['--style=-', '--line-search=held'])
    remembered, images = doodle.Remembered(objective, options, 1e9), [np.float32(random(seed=k)) for k in range(5)]
    remembered.set_phase(None, None, None, None, SHAPE[:0:-1], None)
    totals = [remembered(image).total for image in images]
    for start, asked in ((2, 1), (2, 1), (4, 1), (1, 2), (1, 1)):
        objective.asked.clear()
        assert remembered.held(images[0], images[start]).total == totals[start] and len(objective.asked) == asked


@pytest.mark.slow
def test_a_run_that_holds_matches_is_resumed_bit_for_bit(doodle, textured, monkeypatch):
    """Also in a line search whose matches are held, which are those of an image from before: one more evaluation."""
    asked, held = [], doodle.Minimiser.held
    monkeypatch.setattr(doodle.Minimiser, 'held', lambda minimiser: asked.append(held(minimiser)) or asked[-1])
    whole = textured('--line-search=held')
    assert whole.computed == len(asked) == 120
    within = [number for number, holds in enumerate(asked) if holds]    # of evaluations, counted from 0
    assert within
    for stop in (84, 101, within[0], within[-1]):
        assert textured('--line-search=held', stop=stop).code == 143
        resumed = textured('--line-search=held', '--resume')
        assert resumed.log == whole.log and resumed.files == whole.files
        if stop in within:
            assert resumed.computed == 120 - stop + 1


@pytest.mark.slow
def test_what_held_matches_gain_can_be_measured(tmp_path):
    printed = subprocess.run(
        [sys.executable, ROOT / 'samples/measure_search.py', f'--weights={ROOT / "vgg16.npz"}', '--runs=texture',
         '--sizes=48', '--seeds=1', '--phases=1', '--iterations=30', '--pictures=both'],
        cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    (fresh, spent, held, held_spent, gain, _), = [
        map(float, row) for row in re.findall('^texture +48 +1 +25' + r' +([-+\d.]+)' * 6 + '$', printed, re.MULTILINE)]
    assert min(fresh, spent, held, held_spent) > 0 and gain == pytest.approx(100 * (1 - held / fresh), abs=.02)
    with Image.open(tmp_path / 'both/texture_48_1.png') as picture:
        assert picture.size == (2 * 48, 48)


@pytest.mark.slow
@pytest.mark.parametrize('option', ['--line-search=fresh', '--cache=1', '--variety=0.1', '--line-search=held'])
def test_a_run_that_ended_goes_on_bit_for_bit(textured, option):
    """In the midst of line searches, and of a cycle whose evaluations were remembered."""
    whole = textured(option)
    textured(option, '--iterations=77', '--keep-checkpoint')
    for before, number in ((77, 101), (101, 120)):
        more = textured(option, '--resume', '--keep-checkpoint', f'--iterations={number}')
        assert (more.code, more.log) == (0, whole.log[before:number])
        frames = {name: content for name, content in more.files.items() if name != 'output.png' or number == 120}
        assert frames == {name: whole.files[name] for name in frames} and len(frames) > 1


@pytest.mark.slow
def test_a_second_phase_with_near_matches_goes_on_bit_for_bit(doodle, textured, monkeypatch):
    """After a run that ended as after one that was stopped."""
    monkeypatch.setattr(doodle, 'NEAR_PAIRS', 0)
    given = '--matching=near', '--phases=2', '--rotations=1', '--keep-checkpoint'
    stopped, other = (textured(*given, *option, stop=stop)
                      for option, stop in ((['--iterations=30'], 43), (['--resume', '--iterations=50'], None)))
    ended, more = (textured(*given, *option) for option in (['--iterations=30'], ['--resume', '--iterations=50']))
    assert stopped.code == 143 and ended.code == 0 and len(other.log) == 30 + 50
    assert more.log == other.log[60:] and more.files['output.png'] == other.files['output.png']
    assert ended.log == other.log[:60]


@pytest.mark.slow
def test_a_run_that_has_converged_says_so_at_once_when_it_goes_on(textured):
    """In the midst of a cycle, which is known, but of which not all is left to do."""
    picture, whole, at, cycle, _ = converging(textured)
    numbers = at + cycle // 3, at + cycle // 2, 300
    ended, short, more = (textured('--keep-checkpoint', f'--iterations={number}', *option, picture=picture)
                          for number, option in zip(numbers, ([], ['--resume'], ['--resume'])))
    assert 'converged' not in ended.out and len(ended.log) == numbers[0]
    for run in (short, more):
        assert f' Phase #0 has converged: it only repeats its last {cycle} evaluations.\n' in run.out
    assert len(short.log) == numbers[1] - numbers[0] and 'this phase' not in short.out
    skipped = (299 - numbers[1]) // cycle * cycle
    assert more.log[0] == dict(phase=0, evaluation=numbers[1], cycle=cycle, skipped=skipped)
    assert len(more.log) == 1 + 300 - numbers[1] - skipped                             # it skips at once
    last = min(len(more.log) - 1, cycle // 2)
    assert more.log[-last:] == textured('--stop-when-converged=0', '--iterations=300', picture=picture).log[-last:]
    assert more.files['output.png'] == whole.files['output.png']
    assert more.out.splitlines()[-1].split('average')[1] == whole.out.splitlines()[-1].split('average')[1]
