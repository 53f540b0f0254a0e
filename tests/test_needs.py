"""What a run will need, as `--check` says: time by the count of operations, memory as measured."""
import re
import subprocess
import sys

import numpy as np
import pytest

from conftest import ROOT, mostly_slow

sys.path.insert(0, str(ROOT / 'samples'))


@pytest.fixture
def planned(doodle, monkeypatch):
    """plan()'s lines for pictures of these sizes, on two cores that make 1e9 multiply-adds a second."""
    monkeypatch.setattr(doodle, 'product_rate', lambda: 1e9)
    monkeypatch.setattr(doodle, 'allowed_cores', lambda: 2)
    monkeypatch.setattr(doodle, 'has_dot', lambda: True)

    def planned(size, style_size, *arguments):
        content, style = (np.zeros((*s[::-1], 3), np.uint8) for s in (size, style_size))
        inputs = doodle.Inputs(content, None, style, None, None, size, None, None)
        options = doodle.parse_options(['--style=-', '--content=-', *arguments])
        return doodle.plan(inputs, options, doodle.Checkpoint({}))
    return planned


LAYER = ['--style-layers=1_1', '--content-layers=1_1', '--phases=1']


@pytest.mark.parametrize('arguments, expected', [
    ([], {'byte scores': 64 * 4800 * 2000, 'features': 64 * 4800}),
    (['--variety=1'], {'scores': 64 * 4800 * 2000, 'features': 64 * 4800}),
    (['--cache=1'], {'byte scores': 64 * 4800 * 2000 / 60, 'features': 64 * 4800}),
    (['--method=li-wand', '--rotations=0', '--scales=1'],               # of 50x40, 47x38 and 52x42 pixels
     {'scores': 64 * 4800 * 52 * 120, 'features': 64 * 4800}),
    (['--style-weight=0'], {}),
    (['--method=gatys', '--style-layers=1_1'], {'gram': 64 ** 2 * 4800, 'features': 64 * 4800})])
def test_time_is_that_of_the_work(doodle, planned, arguments, expected):
    phase, total = planned((80, 60), (50, 40), *LAYER, '--iterations=60', *arguments)
    expected |= {'products': 2 * 9 * 3 * 64 * 4800, 'transforms': 2 * 67 * 4800, 'pixels': 4800, 'calls': 1}
    assert {name: amount for name, amount in doodle.work((80, 60), (50, 40), doodle.parse_options(
        ['--style=-', '--content=-', *LAYER, '--iterations=60', *arguments])).items() if amount} == expected
    seconds = sum(doodle.COSTS[name] * amount * (2 if name in doodle.ON_ONE_CORE else 1)
                  for name, amount in expected.items()) / 1e9
    assert float(re.search(r'60 evaluations of about ([\d,.]+) s', phase)[1]) == pytest.approx(seconds, abs=.006)
    assert float(re.search(r'about (\d+) minutes', total)[1]) == pytest.approx((7 + 60 * seconds) / 60, abs=.6)


@pytest.mark.parametrize('flags, key', [('fma avx512_vnni avx512_bitalg', 'byte scores'), ('fma avx512f', 'scores'),
                                        ('asimd asimddp', 'byte scores'), ('asimd', 'scores')])
def test_scores_are_cheaper_where_the_processor_multiplies_bytes(doodle, monkeypatch, flags, key):
    monkeypatch.setattr(doodle, 'text_of', lambda path: f'processor: 0\nflags: {flags}\n')
    monkeypatch.setattr(doodle, 'has_dot', doodle.has_dot.__wrapped__)  # which is not asked twice
    amounts = doodle.work((80, 60), (50, 40), doodle.parse_options(['--style=-', '--content=-']))
    assert {name for name in ('scores', 'byte scores') if amounts[name]} == {key}
    assert doodle.COSTS['byte scores'] < doodle.COSTS['scores']


def test_time_is_the_sum_of_the_phases(doodle, planned, monkeypatch):
    monkeypatch.setitem(doodle.COSTS, 'calls', 0.)                      # which do not grow
    *phases, total = planned((320, 240), (200, 160), '--phases=3', '--iterations=10')
    sizes = [re.search(r'(\d+)x(\d+),', line).groups() for line in phases]
    seconds = [float(re.search(r'about ([\d,.]+) s', line)[1].replace(',', '')) for line in phases]
    assert sizes == [('80', '60'), ('160', '120'), ('320', '240')]
    assert seconds[2] > 4 * seconds[1] > 16 * seconds[0] > 0            # the network's grow by 4, matching's by 16
    minutes = float(re.search(r'about (\d+) minutes', total)[1])
    assert 10 * sum(seconds) - 30 < 60 * minutes < 11 * sum(seconds) + 37                   # minutes are rounded


def test_what_is_left_to_do_has_the_preparation_of_each_phase_to_come(doodle, planned, black):
    inputs = black(1024)
    options = doodle.parse_options(['--style=-', '--content=-', '--phases=3', '--iterations=10'])
    _, (middle, _), (last, each) = doodle.efforts(inputs, options)
    for at, lines, effort in ((dict(phase=2, evaluation=10, number=30), 0, last),
                              (dict(phase=1, evaluation=10, number=20), 1, middle + last + 10 * each)):
        *phases, total = doodle.plan(inputs, options, doodle.Checkpoint({}, **at))
        assert len(phases) == lines and effort > 60e9
        assert total.startswith(f'On this CPU at most about {doodle.in_words(7 + effort / 1e9)} and ')


def test_what_one_core_does_counts_as_often_as_there_are_threads(doodle, monkeypatch, black):
    inputs = black(64)
    options = doodle.parse_options(['--style=-', '--content=-'])
    monkeypatch.setenv('OMP_NUM_THREADS', '2')
    two = doodle.efforts(inputs, options)
    monkeypatch.setattr(doodle, 'allowed_cores', lambda: 64)
    assert doodle.efforts(inputs, options) == two
    monkeypatch.delenv('OMP_NUM_THREADS')
    assert doodle.efforts(inputs, options)[-1][1] > 2 * two[-1][1]


@pytest.mark.parametrize('seconds, words', [(0, '1 minute'), (89, '1 minute'), (91, '2 minutes'), (7100, '118 minutes'),
                                            (7200, '2.0 hours'), (36000, '10.0 hours')])
def test_times_are_said_in_minutes_or_hours(doodle, seconds, words):
    assert doodle.in_words(seconds) == words


def test_time_is_the_most_where_phases_may_converge(planned):
    assert planned((80, 60), (50, 40))[-1].startswith('On this CPU at most about ')
    assert planned((80, 60), (50, 40), '--stop-when-converged=0')[-1].startswith('On this CPU about ')


@pytest.mark.parametrize('arguments, told', [
    (['--iterations=1000'], True), (['--iterations=1000', '--line-search=held'], False),
    (['--iterations=1'], False), (['--iterations=1000', '--matching=near'], False),
    (['--iterations=1000', '--variety=1'], False), (['--iterations=1000', '--method=gatys'], False),
    (['--iterations=1000', '--phases=1'], False)])
def test_nothing_is_refused_for_its_time_but_a_long_exact_search_is_told(doodle, planned, monkeypatch, capsys, tmp_path,
                                                                         handlers, arguments, told):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doodle, 'memory_limit', lambda: np.inf)
    doodle.Image.new('RGB', (2048, 2048)).save('a.bmp')
    assert doodle.main(['--style=a.bmp', '--content=a.bmp', '--check', *arguments]) == 0
    found = re.fullmatch(r'  - With exact matching this takes about ([\d.]+) hours on this CPU, with --matching=near '
                         r'about ([\d.]+) hours\.', capsys.readouterr().out.splitlines()[-1])
    assert bool(found) is told
    if told:
        exact, near = map(float, found.groups())
        faster = planned((2048, 2048), (2048, 2048), *arguments, '--matching=near')[-1]
        assert exact > 4 * near and f'about {near} hours' in faster


@pytest.mark.parametrize('device, arguments, said', [
    ('cuda0', ['--matching=near'], ['On a GPU all matches are exact: --matching=near is for the CPU.']),
    ('cuda0', [], []), ('cpu', ['--matching=near'], []), ('cpu', [], ['With exact matching']),
    ('cpu', ['--matching=near', '--phases=1'], ['All matches will be exact: near ones are for large pictures, '])])
def test_a_run_says_at_its_start_how_long_exact_matching_takes(doodle, planned, device, arguments, said):
    inputs = doodle.Inputs(None, None, np.zeros((2048, 2048, 3), np.uint8), None, None, (2048, 2048), None, None)
    options = doodle.parse_options(['--style=-', '--iterations=1000', *arguments])
    lines = doodle.matching_remarks(inputs, options, device, doodle.Checkpoint({}))
    assert len(lines) == len(said) and all(line.startswith(start) for line, start in zip(lines, said))
    going_on = doodle.Checkpoint({}, number=1)                          # where --matching must stay as it is
    assert doodle.matching_remarks(inputs, options, device, going_on) == [line for line in lines if 'GPU' in line]
    assert not [line for line in doodle.plan(inputs, options, going_on) if line.startswith('With exact')]


@pytest.mark.slow
def test_costs_can_be_measured():
    printed = subprocess.run([sys.executable, ROOT / 'samples/measure_time.py', '1'], capture_output=True, text=True,
                             check=True).stdout
    assert len(re.findall(r'^ +[\d.]+ s +[\d.]+ s +[\d.]+ s \([-+]\d+%\) +\d+ \d+$', printed, re.MULTILINE)) == 3
    costs = dict(re.findall(r"'([a-z ]+)': ([-\d.e+]+)", printed[printed.index('Fitted'):]))
    assert max(float(costs['scores']), float(costs['byte scores'])) > 0 and float(costs['pixels']) > 0


# ---- memory ----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def measured(doodle, tmp_path_factory):
    """What a run was said to need, and its measured peak, by sizes of content and style and by options."""
    import measure_memory
    folder = tmp_path_factory.mktemp('memory')
    measure_memory.save_weights(folder / 'weights.npz')
    return lambda *run, iterations: measure_memory.needed_and_peak(folder, *run, iterations=iterations)[:2]


@pytest.mark.parametrize('content, style, arguments, iterations', mostly_slow([
    ((512, 384), (128, 96), [], 8),                                     # an ordinary run, as long as memory grows
    ((448, 336), (320, 240), ['--rotations=1', '--scales=1'], 8),       # painting with some copies
    ((64, 48), (1280, 960), [], 1),                                     # a style far larger than the result
    ((64, 48), (256, 192), ['--rotations=2', '--scales=3'], 1),         # many copies
    ((64, 48), (60, 44), ['--auto-maps=4'], 1)]))                    # maps are painted
def test_memory_is_within_10_percent_of_the_measured_peak(doodle, measured, content, style, arguments, iterations):
    needed, peak = measured(content, style, *arguments, iterations=iterations)
    least = doodle.memory_needed((1, 1), (1, 1), doodle.parse_options(['--style=-', '--content=-']))
    assert needed == pytest.approx(peak, rel=.1) and peak > 1.25 * least
