"""What a run will need, as `--check` says: time by the count of operations, memory as measured."""
import re
import sys

import numpy as np
import pytest

from conftest import ROOT, mostly_slow

sys.path.insert(0, str(ROOT / 'samples'))
SQUARE = 2 * 2048 ** 3                                                  # operations of the product that `plan` times


@pytest.fixture
def planned(doodle, monkeypatch):
    """plan()'s lines for pictures of these sizes, on a machine that takes 100 s for its product."""
    def planned(size, style_size, *arguments):
        ticks = iter((7., 107.))
        monkeypatch.setattr(doodle.time, 'perf_counter', lambda: next(ticks))
        content, style = (np.zeros((*s[::-1], 3), np.uint8) for s in (size, style_size))
        inputs = doodle.Inputs(content, None, style, None, None, size, None, None)
        return doodle.plan(inputs, doodle.parse_options(['--style=-', *arguments]))
    return planned


LAYER = ['--style-layers=1_1', '--content-layers=1_1', '--phases=1']


@pytest.mark.parametrize('arguments, copies, searches', [
    ([], 1, 60), (['--cache=1'], 1, 1), (['--rotations=1', '--scales=1'], 9, 60), (['--style-weight=0'], 0, 60),
    (['--method=gatys', '--style-layers=1_1'], 0, 60)])
def test_time_is_that_of_the_network_and_twice_that_of_matching(planned, arguments, copies, searches):
    """By operations of the direct forms: there and back through conv1_1, and every pixel with every style pixel."""
    phase, total = planned((80, 60), (50, 40), *LAYER, '--iterations=60', *arguments)
    network, matching = 2 * 2 * 9 * 3 * 64 * 80 * 60, 2 * 64 * 80 * 60 * 50 * 40
    seconds = 100 * (60 * network + 2 * copies * searches * matching) / SQUARE
    assert float(re.search(r'60 evaluations of about ([\d,.]+) s', phase)[1]) == pytest.approx(seconds / 60, abs=.006)
    assert f'about {seconds / 60:.0f} minutes' in total and (seconds > 600 or not copies or searches == 1)


def test_time_is_the_sum_of_the_phases(planned):
    *phases, total = planned((320, 240), (200, 160), '--phases=3', '--iterations=10')
    sizes = [re.search(r'(\d+)x(\d+),', line).groups() for line in phases]
    seconds = [float(re.search(r'about ([\d,.]+) s', line)[1].replace(',', '')) for line in phases]
    assert sizes == [('80', '60'), ('160', '120'), ('320', '240')]
    assert seconds[2] > 4 * seconds[1] > 16 * seconds[0] > 0            # the network's grow by 4, matching's by 16
    assert f'about {10 * sum(seconds) / 60:.0f} minutes' in total


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
    ((448, 336), (320, 240), ['--rotations=1', '--scales=1'], 2),       # painting with some copies
    ((64, 48), (1280, 960), [], 1),                                     # a style far larger than the result
    ((64, 48), (256, 192), ['--rotations=2', '--scales=3'], 1),         # many copies
    ((64, 48), (60, 44), ['--auto-maps=4'], 1)]))                    # maps are painted
def test_memory_is_within_10_percent_of_the_measured_peak(doodle, measured, content, style, arguments, iterations):
    needed, peak = measured(content, style, *arguments, iterations=iterations)
    least = doodle.memory_needed((1, 1), (1, 1), doodle.parse_options(['--style=-', '--content=-']))
    assert needed == pytest.approx(peak, rel=.1) and peak > 1.25 * least
