"""Every kind of hostile file in every role, and every absurd value of every option: refused in two lines, or accepted.

An entry of the table is a role and a kind. A refusal has exit code 2, one ERROR and one FIX, no traceback, takes a
few seconds at most, and touches no file that was there before. What is accepted is painted: one evaluation of a loss
without a network, on the picture that was meant.
"""
import bz2
import io
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from conftest import ROOT, NoNetwork, mostly_slow

SIZE = 64, 48                                                                           # width, height


def noise(width=SIZE[0], height=SIZE[1], seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def halves(width=SIZE[0], height=SIZE[1]):
    """A map of two colours, green above red."""
    colours = np.zeros((height, width, 3), np.uint8)
    colours[:height // 2, :, 1] = colours[height // 2:, :, 0] = 255
    return colours


# ---- kinds of picture ------------------------------------------------------------------------------------------------

def saved(pixels, path, **how):
    """`pixels` in the format of `how`, PNG if it names none, whatever the ending of `path`."""
    picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    picture.save(path, **{'format': 'PNG', **how})


def bytes_of(pixels, **how):
    content = io.BytesIO()
    saved(pixels, content, **how)
    return content.getvalue()


def write(content):
    """A kind of file that has this content, whatever the pixels."""
    return lambda pixels, path: path.write_bytes(content)


def bomb(pixels, path, side=30_000):
    """A PNG of side x side pixels of one colour, 1 bit each, in some 100 kB."""
    def chunk(kind, data):
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    rows = zlib.compress(bytes((1 + (side + 7) // 8) * side), 1)
    path.write_bytes(b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', side, side, 1, 0, 0, 0, 0)) +
                     chunk(b'IDAT', rows) + chunk(b'IEND', b''))


def fax(pixels, path, side=11_875):
    """A TIFF of side x side white pixels in some 4 kB."""
    Image.new('1', (side, side), 255).save(path, 'TIFF', compression='group4')


def rotated(pixels, path):
    """Lying on its side, with an EXIF orientation that turns it upright."""
    picture = Image.fromarray(np.ascontiguousarray(np.rot90(pixels)))
    exif = Image.Exif()
    exif[0x112] = 6
    saved(picture, path, exif=exif)


def animated(pixels, path):
    saved(pixels, path, save_all=True, append_images=[Image.new('RGB', SIZE)] * 3)


def linked(pixels, path):
    saved(pixels, path.with_name('target of a link.png'))
    path.symlink_to('target of a link.png')


def cut(format):
    return lambda pixels, path: path.write_bytes((whole := bytes_of(pixels, format=format))[:len(whole) // 2])


def broken(pixels, path):
    content = bytearray(bytes_of(pixels))
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def broken_tiff():
    content = bytearray(bytes_of(halves(), format='TIFF', compression='tiff_adobe_deflate'))
    content[12:40] = bytes(28)
    return bytes(content)


def named(name):
    """A kind that stands under another name, which the run is given."""
    def make(pixels, path):
        saved(pixels, path.with_name(name))
        return path.with_name(name)
    return make


REFUSED = {
    'empty': write(b''), 'text': write(b'no picture'), 'a PNG cut off': cut('PNG'), 'a JPEG cut off': cut('JPEG'),
    'a PNG with a broken byte': broken,
    'a bomb': bomb, 'zeros': write(bytes(10_000)), 'a PNG header alone': write(b'\x89PNG\r\n\x1a\n'),
    'a pickle': write(pickle.dumps(noise())), 'HTML': write(b'<!DOCTYPE html><title>404</title>'),
    'a folder': lambda p, path: path.mkdir(), 'a FIFO': lambda p, path: os.mkfifo(path),
    'a link to nothing': lambda p, path: path.symlink_to('nothing'),
    'a link to itself': lambda p, path: path.symlink_to(path),
    'a device': lambda p, path: path.symlink_to('/dev/zero'), 'missing': lambda p, path: None,
    '1x1': lambda p, path: saved(p[:1, :1], path),
    '1x5000': lambda p, path: saved(np.tile(p[:1, :1], (5000, 1, 1)), path),
    'a wide line': lambda p, path: saved(np.tile(p[:1, :1], (1, 5000, 1)), path),
    'no pixels': write(b'P6 0 0 255\n'), 'a PostScript': write(b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n'),
    'a bomb of a TIFF': fax, 'a TIFF that libtiff complains of': write(broken_tiff()),
    'a bomb of a WEBP': lambda p, path: Image.new('RGB', (9000, 9000)).save(path, 'WEBP', lossless=True, method=0),
}
ACCEPTED = {
    'PNG': saved, 'JPEG': lambda p, path: saved(p, path, format='JPEG', quality=95),
    'a link': linked, 'turned by EXIF': rotated, 'animated': animated,
    'CMYK': lambda p, path: saved(Image.fromarray(p).convert('CMYK'), path, format='TIFF'),
    '16 bits': lambda p, path: saved(Image.fromarray(p[:, :, 0].astype(np.uint16) * 257), path),
    'a palette': lambda p, path: saved(Image.fromarray(p).quantize(64), path),
    'grey': lambda p, path: saved(p[:, :, 1], path),
    '1 bit': lambda p, path: saved(Image.fromarray(p).convert('1'), path),
    'transparent': lambda p, path: saved(np.dstack([p, p[:, :, 0]]), path),
    'GIF': lambda p, path: saved(p, path, format='GIF'),
    'WEBP': lambda p, path: saved(p, path, format='WEBP', lossless=True),
    'BMP': lambda p, path: saved(p, path, format='BMP'),
}
NAMES = {name: named(name) for name in (
    'a name with spaces.png', 'ünïcödé ☂.png', '100%s %d %(x)s.png', 'a\nline.png', "quote'\"s.png", '-dash.png',
    '*?[a-z].png', '{brace} `tick` $HOME.png', 'dots...png', 'long' * 60 + '.png', os.fsdecode(b'not \xff utf-8.png'))}
ROLES = ('content', 'style', 'content_map', 'style_map', 'seed')
FINE = [('seed', '1x1'), ('seed', '1x5000'), ('seed', 'a wide line'),                   # seeds are resized, and so are
        ('content_map', '1x1'), ('style_map', '1x1')]                                   # maps of nearly the same shape


def table():
    """The entries: role, kind, how to make it, whether it is refused."""
    for role in ROLES:
        for kind, make in REFUSED.items():
            yield role, kind, make, (role, kind) not in FINE
        for kind, make in ACCEPTED.items():
            yield role, kind, make, False
        for kind, make in NAMES.items() if not role.endswith('map') else ():
            yield role, kind, make, False


ENTRIES = list(table())
IDS = [f'{role}-{kind!a:.40}' for role, kind, *_ in ENTRIES]


# ---- the program, all that is expensive cut off ----------------------------------------------------------------------

@pytest.fixture
def paint(doodle, tmp_path, monkeypatch, capsys, handlers):
    """paint('--style=a.png', ...) -> exit code, stdout, stderr, what the loss was given; a loss without a network."""
    monkeypatch.chdir(tmp_path)

    class Objective(NoNetwork):
        def set_phase(self, content, style, content_map, style_map, size, style_alpha, near):
            given_to.append((content, style, content_map, style_map, size))
            super().set_phase()

        def __call__(self, x):
            assert np.isfinite(x).all() and x.shape == (3, *given_to[-1][-1][::-1])
            given_to.append(x)
            return doodle.Evaluation(1., {}, {}, 0., np.zeros(x.shape), 0., 0.)
    given_to = []
    monkeypatch.setattr(doodle, 'Objective', Objective)
    monkeypatch.setattr(doodle, 'import_theano', lambda device: (device, None))
    find = doodle.find_weights
    monkeypatch.setattr(doodle, 'find_weights', lambda options: find(options) if options.weights else (
        doodle.Weights('vgg16', None, 'a file', 'checksum'), []))

    def paint(*arguments):
        given_to.clear()
        code = doodle.main([*map(str, arguments)])
        return code, *capsys.readouterr(), given_to
    return paint


def contents(folder):
    """What is in a folder and must not change; FIFOs and devices would block."""
    return {path: path.read_bytes() if path.is_file() and not path.is_symlink() else os.lstat(path).st_mode
            for path in folder.rglob('*')}


def assert_refused(code, err):
    assert code == 2 and re.fullmatch(r'ERROR: [^\n]+\n  FIX: [^\n]+\n', err), err
    assert 'Traceback' not in err and 'Error(' not in err


@pytest.fixture
def pictures(tmp_path):
    """{role: path} of good pictures; those of a role under test are made anew."""
    paths = {role: tmp_path / f'{role}.png' for role in ('content', 'style', 'seed')}
    for number, path in enumerate(paths.values()):
        saved(noise(seed=number), path)
    paths |= {f'{role}_map': tmp_path / f'{role}_sem.png' for role in ('content', 'style')}
    for role in ('content_map', 'style_map'):
        saved(halves(), paths[role])
    return paths


@pytest.mark.parametrize('role, kind, make, refused', mostly_slow(
    ENTRIES, *(entry for entry in ENTRIES if entry[0] == 'style')), ids=IDS)
def test_table(paint, pictures, tmp_path, role, kind, make, refused):
    path = pictures[role]
    path.unlink()
    pixels = halves() if role.endswith('map') else noise(seed=9)
    path = make(pixels, path) or path
    if kind in NAMES and role != 'seed':                                                # maps go with the name
        shutil.copy(pictures['style_map'], os.path.splitext(path)[0] + '_sem.png')
    output = tmp_path / 'earlier.png'
    saved(noise(seed=5), output)
    pictures[role] = path if not role.endswith('map') else pictures[role]
    before, start = contents(tmp_path), time.time()
    code, _, err, given_to = paint(
        f'--style={pictures["style"]}', f'--content={pictures["content"]}', f'--seed={pictures["seed"]}',
        '--output=earlier.png', '--phases=1', '--iterations=1', '--save-every=0', '--style-layers=1_1',
        '--content-layers=1_1')
    assert time.time() - start < 10
    if refused:
        assert_refused(code, err)
        assert contents(tmp_path) == before and not given_to
        return
    assert (code, err) == (0, '')
    (content, style, content_map, style_map, size), x = given_to
    assert size == SIZE and content.shape == style.shape == x.shape == (3, *SIZE[::-1])
    shown = {'content': content, 'style': style, 'seed': x}.get(role)
    if shown is not None and kind in ('PNG', 'a link', 'turned by EXIF', 'animated', 'BMP', 'WEBP', *NAMES):
        assert (np.moveaxis(shown, 0, 2)[:, :, ::-1] == pixels).all()                   # that very picture
    if role.endswith('map') and kind in ('PNG', 'a link', 'turned by EXIF', 'animated', 'BMP', 'WEBP', 'GIF'):
        channels = {'content_map': content_map, 'style_map': style_map}[role]
        assert (channels == pixels).all()
    assert {name: old for name, old in contents(tmp_path).items() if name in before and name != output} == {
        name: old for name, old in before.items() if name != output}


def test_the_table_is_long_enough_and_every_role_has_both():
    assert len(ENTRIES) >= 200
    for role in ROLES:
        assert {refused for entry_role, _, _, refused in ENTRIES if entry_role == role} == {True, False}


# ---- weights ---------------------------------------------------------------------------------------------------------

class Runs:
    """A pickle that touches a file as it is read."""

    def __reduce__(self):
        return os.system, ('touch touched',)


def npz(**arrays):
    content = io.BytesIO()
    np.savez(content, **arrays)
    return content.getvalue()


def first(W=(64, 3, 3, 3), b=(64,)):
    return npz(**{'conv1_1.W': np.zeros(W, np.float32), 'conv1_1.b': np.zeros(b, np.float32)})


WEIGHTS = {
    'empty.npz': b'', 'text.npz': b'weights', 'cut.npz': first()[:3000], 'shapes.npz': first((64, 4, 3, 3)),
    'widths.npz': first((63, 3, 3, 3), (63,)), 'bias.npz': first(b=(3,)), 'nothing.npz': npz(),
    'flat.npz': first((64, 27)), 'one.npz': npz(**{'conv1_1.W': np.zeros((64, 3, 3, 3))}),
    'objects.npz': npz(**{'conv1_1.W': np.array([Runs()]), 'conv1_1.b': np.zeros(64)}),
    'words.npz': npz(**{'conv1_1.W': np.array(['a']), 'conv1_1.b': np.array(['b'])}),
    'runs.pkl': pickle.dumps([Runs()] * 32), 'runs.pkl.bz2': bz2.compress(pickle.dumps(Runs())),
    'cut.pkl.bz2': bz2.compress(pickle.dumps([np.zeros(3)] * 32))[:-9], 'numbers.pkl': pickle.dumps(list(range(32))),
    'empty.pkl': b'', 'empty.h5': b'', 'text.h5': b'weights', 'vgg.dat': b'\x80\x04.', 'picture.npz': bytes_of(noise()),
    'deep.pkl': b'(' * 100_000 + b'.', 'huge.pkl': b'\x80\x04\x95' + b'\xff' * 8 + b'.',
}


@pytest.mark.parametrize('name', [*WEIGHTS, 'folder.npz', 'folder.pkl', 'missing.npz', 'fifo.npz', 'loop.pkl'])
def test_weights_that_are_none_are_refused_and_run_nothing(paint, pictures, tmp_path, name):
    path = tmp_path / name
    if name in WEIGHTS:
        path.write_bytes(WEIGHTS[name])
    elif name.startswith('folder'):
        path.mkdir()
    elif name.startswith('fifo'):
        os.mkfifo(path)
    elif name.startswith('loop'):
        path.symlink_to(path)
    before = contents(tmp_path)
    code, _, err, given_to = paint(*TEXTURE, f'--weights={name}')
    assert_refused(code, err)
    assert contents(tmp_path) == before and not given_to


TEXTURE = ['--style=style.png', '--phases=1', '--iterations=1', '--save-every=0', '--style-layers=1_1',
           '--semantic-weight=0']


def test_what_the_following_vary_is_accepted(paint, pictures):
    assert paint(*TEXTURE, '--output=o.png')[0] == 0


# ---- output ----------------------------------------------------------------------------------------------------------

OUTPUTS = {'a folder': 'folder.png', 'in a file': 'style.png/o.png', 'the style': 'style.png', 'by a link': 'link.png',
           'the content': './content.png', "the style's map": 'style_sem.png', "the content's map": 'content_sem.png',
           'the seed': 'seed.png', 'no ending': 'output', 'a strange ending': 'o.xyz', 'no name': 'folder.png/',
           'a film': 'o.mp4', 'in /proc': '/proc/none/o.png', 'too long': 'x' * 300 + '.png', 'nothing': ''}


@pytest.mark.parametrize('kind', OUTPUTS)
def test_an_output_that_cannot_be_or_must_not_be_is_refused(paint, pictures, tmp_path, kind):
    (tmp_path / 'folder.png').mkdir()
    (tmp_path / 'link.png').symlink_to('style.png')
    before = contents(tmp_path)
    code, _, err, given_to = paint(*TEXTURE, '--content=content.png', '--seed=seed.png', '--content-layers=1_1',
                                   '--semantic-weight=1', f'--output={OUTPUTS[kind]}')
    assert_refused(code, err)
    assert contents(tmp_path) == before and not given_to


@pytest.mark.parametrize('name', [*NAMES, 'o.JPG', 'o.tiff', 'o.webp', 'a/b/c.png'])
def test_an_output_of_any_name_is_written(paint, pictures, tmp_path, name):
    if len(name) > 240:
        name = name[-200:]
    code, _, err, _ = paint(*TEXTURE, '--save-every=1', f'--output={name}', f'--frames=frames of {name}',
                            f'--log=log of {os.path.basename(name)}')
    assert (code, err) == (0, '') and Image.open(name).size == SIZE


# ---- options ---------------------------------------------------------------------------------------------------------

WORDS = ['', ' ', 'nan', '-1', '1e99', 'ten', '0x10', '٣', '1,2', '--style', '%s', '\n', '9' * 99, 'None', '1/2']
NUMBERS = ['phases', 'iterations', 'slices', 'max-size', 'save-every', 'print-every', 'random-seed', 'cache',
           'output-size', 'seed-range', 'style-layers', 'content-layers', 'device', 'network']
ABSURD = ['--phases=40', '--style-layers=9_9', '--output-size=12', '--output-size=999999x999999', '--output-size=1x1',
          '--max-size=1', '--style-layers=3_1,', '--frames=', '--frames=style.png', '--frames=style.png/deep',
          '--log=style.png', '--log=.', '--log=output.png', '--seed=content', '--seed=', '--seed=nothing.png',
          '--style=', '--content=nothing.png', '--content=.', '--nonsense=1', 'stray', '--phases', '--network=vgg19 ',
          '--resume=1',
          '--output=o.png.checkpoint', '--style-weight=inf', '--variety=-0.1', '--semantic-weight=-inf',
          '--smoothness=1e999', '--content-weight=1_0_', '--weights=', '--device=cpu:0', '--output-size=99999x99999']


@pytest.mark.parametrize('option', ABSURD + [f'--{name}={word}' for name in NUMBERS for word in WORDS])
def test_absurd_options_are_refused(paint, pictures, tmp_path, option):
    before, start = contents(tmp_path), time.time()
    code, _, err, given_to = paint(*TEXTURE, *['--save-every=1'] * ('--frames' in option), option)
    assert_refused(code, err)
    assert contents(tmp_path) == before and not given_to and time.time() - start < 10


PLAUSIBLE = ['0', '1', '2', '7', '0.5', '1e-30', '3_1', '1_1,2_2', '16:240', '40x30', 'cpu']
VALUES = st.one_of(st.sampled_from(WORDS + PLAUSIBLE), st.text(max_size=8), st.integers(-5, 10 ** 7).map(str),
                   st.floats().map(str))


@settings(max_examples=100)
@given(data=st.data(), width=st.integers(1, 40), height=st.integers(1, 40))
def test_whatever_the_options_and_the_size_it_paints_or_says_why_not(doodle, paint, tmp_path, data, width, height):
    names = [flag for rows in doodle.OPTIONS.values() for flag, _, kind, *_ in rows
             if kind not in (str, bool, 'version', doodle.parse_path)]
    options = data.draw(st.dictionaries(st.sampled_from(names), VALUES, max_size=3))
    saved(noise(width, height), tmp_path / 'style.png')
    for stale in tmp_path.glob('o.png*'):
        stale.unlink()
    arguments = [f'{name}={value}' for name, value in {'--iterations': 1, '--phases': 1, **options}.items()]
    assume(not re.fullmatch('[0-9]{2,}', options.get('--iterations', '')))              # would take its time
    shutil.rmtree('frames', ignore_errors=True)
    code, _, err, given_to = paint('--style=style.png', '--output=o.png', *arguments)
    if code:
        assert_refused(code, err)
        assert not os.path.exists('o.png')
    else:
        assert Image.open('o.png').size == given_to[-2][-1] and err == ''


# ---- as processes ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('arguments', [
    ['--style=bomb.png'], ['--style=broken.tif'], ['--style=/dev/zero'], ['--style=fifo'],
    ['--style=style.png', '--weights=runs.pkl'], [b'--style=not \xff there.png'], ['--style=style.png', '--phases=40']])
def test_the_process_ends_with_2_within_seconds(tmp_path, pictures, arguments):
    bomb(None, tmp_path / 'bomb.png')
    (tmp_path / 'broken.tif').write_bytes(broken_tiff())                                # libtiff would write to stderr
    os.mkfifo(tmp_path / 'fifo')
    (tmp_path / 'runs.pkl').write_bytes(WEIGHTS['runs.pkl'])
    done = subprocess.run([sys.executable, ROOT / 'doodle.py', *arguments, '--save-every=0'], cwd=tmp_path, text=True,
                          capture_output=True, timeout=60)
    assert_refused(done.returncode, done.stderr)
    assert not (tmp_path / 'touched').exists() and not (tmp_path / 'output.png').exists()
