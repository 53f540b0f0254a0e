"""What a run costs a GPU: transfers, launches, waits, memory; and its Ops. On cuda_on_cpu.cpp, which counts them."""
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import twin
from conftest import ROOT
from test_engine import FILTERS, normal
from test_matching import brute_force

RUN = [f'--style={ROOT / "samples/astronaut.png"}', f'--content={ROOT / "samples/hopper.png"}', '--network=vgg16',
       '--device=gpu0', '--random-seed=1', '--output=output.png']
# Prints counts after each evaluation and its bookkeeping.
COUNTED = '''
import ctypes, json, sys
import doodle
evaluate = doodle.evaluate
def counted(*arguments):
    evaluate(*arguments)
    card = ctypes.CDLL('libcuda.so.1')
    card.emu_counts.restype = ctypes.c_char_p
    print('COUNTS', card.emu_counts().decode(), flush=True)
    card.emu_reset()
doodle.evaluate = counted
sys.exit(doodle.main(sys.argv[1:]))
'''


def counts(card, folder, *arguments, **switches):
    """Output, and counts of each evaluation, of a run on the card."""
    done = subprocess.run([sys.executable, '-c', COUNTED, *RUN, *arguments], cwd=folder, env=card | switches, text=True,
                          capture_output=True)
    return done, [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith('COUNTS ')]


@pytest.mark.slow
@pytest.mark.parametrize('slices', [1, 3])
def test_the_image_goes_to_the_card_its_gradient_and_losses_come_back_and_nothing_waits(card, tmp_path, slices):
    done, found = counts(card, tmp_path, '--style-layers=2_1,3_1', '--content-layers=3_1', '--variety=0.1',
                         '--phases=2', '--max-size=48', '--iterations=5', '--save-every=4', '--log=log',
                         f'--slices={slices}')
    assert done.returncode == 0 and len(found) == 10, done.stderr
    for number, count in enumerate(found):
        saved = number in (4, 8)                                        # matches and history of two layers as well
        if number % 5:                                                  # not the first of its phase
            assert count['to card'][0] == 1 and count['from card'][0] == 2 + 4 * saved, (number, count)
        assert 'synchronise' not in count, (number, count)
    assert found[-1]['launch'][0] < 210 + 4 * slices and found[-1]['blas'][0] == 18 * 5 + 2 * slices, found[-1]


# ---- the Ops ---------------------------------------------------------------------------------------------------------

def on_card(card, code, folder, **arrays):
    """Arrays `results` that code computes on the card from `arrays`."""
    np.savez(folder / 'given.npz', **arrays)
    before = ('import ctypes, json, numpy as np, doodle\ndoodle.import_pillow()\ndoodle.import_theano("cuda0")\n'
              'T, theano, given, results = doodle.T, doodle.theano, np.load("given.npz"), {}\n')
    subprocess.run([sys.executable, '-c', before + code + '\nnp.savez("found.npz", **results)'], cwd=folder, env=card,
                   check=True)
    return np.load(folder / 'found.npz')


MATCH = '''
card = ctypes.CDLL('libcuda.so.1')
card.emu_counts.restype = ctypes.c_char_p
u, v, history, variety = T.tensor3(), T.tensor3(), T.vector(), np.float32(.3)
for slices in 1, 3, 64, 1000:
    varied = theano.function([u, v, history], doodle.gpu_match(slices, u, v, variety, history))
    plain = theano.function([u, v], doodle.gpu_match(slices, u, v)[0])
    for name in 'random', 'ties':
        given_u, given_v, given_history = (given[name + ' ' + array] for array in ('u', 'v', 'history'))
        results[f'{name} {slices} j'] = plain(given_u, given_v)
        card.emu_reset()
        results[f'{name} {slices} varied'], results[f'{name} {slices} new'] = varied(given_u, given_v, given_history)
        results[f'{name} {slices} peak'] = json.loads(card.emu_counts())['memory'][1]
'''


@pytest.mark.slow
def test_matches_are_those_of_brute_force_in_any_number_of_slices(card, tmp_path):      # fault 7
    rng, given = np.random.default_rng(1), {}
    given |= {'random u': normal(rng, 13, 17, 5), 'random v': normal(rng, 70, 9, 5)}
    given |= {f'ties {name}': np.float32(rng.integers(0, 2, (side, 11, 3))) for name, side in (('u', 9), ('v', 70))}
    given['random v'][-3:, -3:] = given['random u'][3:6, 2:5]           # the very last style patch is a copy
    for name in 'random', 'ties':
        h, w = (side - 2 for side in given[f'{name} v'].shape[:2])
        given[f'{name} history'] = np.float32(rng.random(h * w))
    found = on_card(card, MATCH, tmp_path, **given)
    for name in 'random', 'ties':
        S = brute_force(given[f'{name} u'], given[f'{name} v'])
        varied = S - 0.3 * given[f'{name} history'][:, None]
        for slices in 1, 3, 64, 1000:
            j, new, other = (found[f'{name} {slices} {what}'] for what in ('j', 'new', 'varied'))
            assert (S.max(axis=0) - S[j, np.arange(S.shape[1])]).max() < 1e-5
            assert name == 'random' or (j == S.round(4).argmax(axis=0)).all()               # of equal scores the first
            assert (varied.max(axis=0) - varied[other, np.arange(S.shape[1])]).max() < 1e-5
            np.testing.assert_allclose(new, S.max(axis=1), atol=1e-5)
    assert found['random 1 j'][3 * 15 + 2] == 68 * 7 - 1
    assert found['random 64 peak'] < found['random 3 peak'] < found['random 1 peak']


CONVOLVE = '''
for k in range(int(given['count'])):
    W, b, pool = (given[f'{k} {name}'] for name in ('W', 'b', 'pool'))
    x, weight = T.tensor3(), T.tensor3()
    y = doodle.gpu_convolution(W, b, bool(pool))(x.dimshuffle('x', 2, 0, 1)).dimshuffle(2, 3, 1)
    f = theano.function([x, weight], [y, theano.grad(T.sum(y * weight), x)])
    for number in range(int(given['sizes'])):
        doodle.STRIP = (1 << 23, 1, 2000)[(k + number) % 3]             # the whole image, single lines, and some
        results[f'{k} {number} y'], results[f'{k} {number} dx'] = f(given[f'{k} {number} x'], given[f'{k} {number} dy'])
'''


@pytest.mark.slow
def test_convolution_and_its_gradient_are_those_of_the_twin(card, tmp_path):
    rng, sizes = np.random.default_rng(0), [(2, 3), (4, 4), (5, 9), (23, 31)]
    given = dict(count=len(FILTERS), sizes=len(sizes))
    for k, (C, K, pool) in enumerate(FILTERS):
        given |= {f'{k} W': normal(rng, K, C, 3, 3), f'{k} b': normal(rng, K), f'{k} pool': pool}
        for number, (H, W) in enumerate(sizes):
            given |= {f'{k} {number} x': normal(rng, H, W, C), f'{k} {number} dy': normal(rng, H >> pool, W >> pool, K)}
    found = on_card(card, CONVOLVE, tmp_path, **given)
    for k, (*_, pool) in enumerate(FILTERS):
        W, b = given[f'{k} W'].astype(float), given[f'{k} b']
        for number in range(len(sizes)):
            x, dy = (np.moveaxis(given[f'{k} {number} {name}'].astype(float), 2, 0) for name in ('x', 'dy'))
            y, dx = (np.moveaxis(found[f'{k} {number} {name}'], 2, 0) for name in ('y', 'dx'))
            expected = np.maximum(twin.conv2d(twin.average_pool(x) if pool else x, W, b), 0)
            np.testing.assert_allclose(y, expected, atol=3e-5 * max(1e-6, expected.max()))
            if ((y > 0) == (expected > 0)).all():                       # no rectifier flipped
                back = twin.conv2d_backward(dy * (expected > 0), W)
                back = twin.average_pool_backward(back, x.shape) if pool else back
                np.testing.assert_allclose(dx, back, atol=3e-5 * max(1e-6, np.abs(back).max()))


# ---- memory ----------------------------------------------------------------------------------------------------------

LARGE = ['--style-weight=10', '--phases=1', '--iterations=2', '--save-every=0']


@pytest.mark.slow
def test_what_does_not_fit_the_card_is_refused_with_the_size_that_does(doodle, card, tmp_path):
    for name in 'content', 'style':
        doodle.Image.new('RGB', (2400, 2000)).save(tmp_path / f'{name}.png')
    given = ['--content=content.png', '--style=style.png', *LARGE]
    flags = card['THEANO_FLAGS'].replace('preallocate=-1', 'preallocate=0')                 # as a run has it
    switches = dict(EMU_MEMORY='8e9', EMU_RUN='0', THEANO_FLAGS=flags)
    run = [arguments for arguments in RUN if not arguments.startswith(('--style', '--content'))]

    def painted(*arguments):
        done = subprocess.run([sys.executable, '-c', COUNTED, *run, *given, *arguments], cwd=tmp_path, text=True,
                              env=card | switches, capture_output=True)
        return done, [json.loads(line[7:])['memory'][1] for line in done.stdout.splitlines() if line[:7] == 'COUNTS ']
    done, _ = painted()
    refused = re.fullmatch(r'ERROR: 2400x2000 pixels .* on cuda0\.\n  FIX: --max-size=(\d+)\.\n', done.stderr)
    assert done.returncode == 2 and refused and not done.stdout.split('Compiling ..')[-1].strip(), done.stderr
    longest = int(refused[1])
    done, peaks = painted(f'--max-size={longest + 1}')
    assert done.returncode == 2 and not peaks
    done, peaks = painted(f'--max-size={longest}')
    assert done.returncode == 0 and .75 * 8e9 < max(peaks) < 8e9, (longest, peaks, done.stderr)


def chosen(doodle, monkeypatch, side, free, *arguments):
    """Slices for squares in a style as large, on a card with so many free bytes."""
    monkeypatch.setattr(doodle.theano, 'gpuarray', SimpleNamespace(
        get_context=lambda name: SimpleNamespace(free_gmem=free), pygpu=SimpleNamespace(empty=lambda *_, **__: 0)),
        raising=False)
    picture = np.zeros((side, side, 3), np.uint8)
    inputs = dict.fromkeys(doodle.Inputs._fields) | dict(content=picture, style=picture, size=(side, side))
    options = doodle.parse_options(['--style=-', '--content=-', *arguments])
    return doodle.choose_slices(doodle.Inputs(**inputs), options, 'cuda0')


def test_slices_fit_the_free_memory(doodle, monkeypatch):
    options, side = doodle.parse_options(['--style=-', '--content=-']), (1024, 1024)
    slices = [chosen(doodle, monkeypatch, 1024, free) for free in (80e9, 40e9, 24e9, 16e9, 12e9, 8e9)]
    assert slices == sorted(slices) and slices[0] == 1 < slices[-1]
    for count, free in zip(slices, (80e9, 40e9, 24e9, 16e9, 12e9, 8e9)):
        assert doodle.gpu_memory_needed(side, side, options, count) <= free
        assert count == 1 or doodle.gpu_memory_needed(side, side, options, count - 1) > free
    assert chosen(doodle, monkeypatch, 512, 4e9, '--slices=9') == 9
    assert chosen(doodle, monkeypatch, 2048, 80e9)


def test_a_picture_that_does_not_fit_is_refused(doodle, monkeypatch):
    with pytest.raises(doodle.UserError, match='on cuda0') as error:
        chosen(doodle, monkeypatch, 2048, 8e9)
    longest = int(re.fullmatch(r'--max-size=(\d+)', error.value.fix)[1])
    chosen(doodle, monkeypatch, longest, 8e9)
    with pytest.raises(doodle.UserError):
        chosen(doodle, monkeypatch, longest + 1, 8e9)
    with pytest.raises(doodle.UserError) as error:
        chosen(doodle, monkeypatch, 2048, 2e8)
    assert '--device=cpu' in error.value.fix
