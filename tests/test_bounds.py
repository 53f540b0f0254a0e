"""What is refused of pictures before it costs time or memory, starts a program, or may not be read."""
import io
import os
import pwd
import re
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageFile

import doodle
from conftest import ROOT

doodle.import_pillow()

NOISE = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)


def bytes_of(pixels, format, **how):
    content = io.BytesIO()
    (Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels).save(content, format, **how)
    return content.getvalue()


def refusal(content, name='a.png'):
    """The problem that is told of a file of this content, in one line."""
    Path(name).write_bytes(content)
    with pytest.raises(doodle.UserError) as error:
        doodle.read_picture(name)
    problem, _ = error.value.args
    assert '\n' not in problem
    return problem


def png(width, height):
    """A PNG that claims to have that many grey pixels, and has a few."""
    def chunk(kind, data):
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 0, 0, 0, 0)) + \
        chunk(b'IDAT', zlib.compress(bytes(1_000_000))) + chunk(b'IEND', b'')


def tiff(width, height, data=bytes(8), **tags):
    """A TIFF that claims to have that many grey pixels, in one strip, or as `tags` say."""
    tags = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: len(data),
            **{int(name[1:]): value for name, value in tags.items()}}
    entries = b''.join(struct.pack('<HHII', tag, 4, 1, value) for tag, value in sorted(tags.items()))
    return b'II*\0' + struct.pack('<I', 8 + len(data)) + data + struct.pack('<H', len(tags)) + entries + bytes(4)


def tiles(width, height, **tags):
    """As `tiff`, in tiles of that size, of 16x16 pixels."""
    return tiff(16, 16, _259=8, _322=width, _323=height, _324=8, _325=8, **tags)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doodle, 'memory_limit', lambda: 1 << 34)


# ---- formats ---------------------------------------------------------------------------------------------------------

EPS = b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) run\n%%EOF\n'
OTHERS = {'EPS': EPS, 'EPS in DOS': struct.pack('<3I', 0xc6d3d0c5, 32, len(EPS)).ljust(32, b'\0') + EPS,
          **{format: bytes_of(NOISE, format) for format in ('ICO', 'DDS', 'PDF')},
          'WMF': struct.pack('<IHhhhhHI', 0x9ac6cdd7, 0, 0, 0, 99, 99, 72, 0) + bytes(2) + b'\1\0\x09\0' + bytes(40),
          'FITS': b''.join(line.ljust(80) for line in (
              b'SIMPLE  =                    T', b'BITPIX  =                    8', b'NAXIS   =                    2',
              b'NAXIS1  =                    9', b'NAXIS2  =                    9', b'END')).ljust(2880) + bytes(2880)}


@pytest.mark.parametrize('kind', OTHERS)
@pytest.mark.parametrize('option', ['--style', '--content', '--seed'])
def test_what_pillow_gives_to_programs_and_odd_formats_are_refused_by_their_content(refused, monkeypatch, kind, option):
    def started(*arguments, **_):
        pytest.fail('a program is started')
    for place, name in ((subprocess, 'Popen'), (os, 'system'), (EpsImagePlugin, 'Ghostscript')):
        monkeypatch.setattr(place, name, started)
    Path('a.png').write_bytes(OTHERS[kind])
    Path('b.png').write_bytes(bytes_of(NOISE, 'PNG'))
    roles = {'--style': 'b.png', '--content': 'b.png', '--seed': 'b.png', option: 'a.png'}
    problem, _ = refused('--output=c.png', *map('='.join, roles.items()))
    assert problem.startswith("'a.png' cannot be read as a picture: ")


# ---- sizes -----------------------------------------------------------------------------------------------------------

BOMBS = {'PNG': png(20_000, 20_000), 'TIFF': tiff(12_000, 11_750), 'tiles': tiles(1 << 14, 1 << 14),
         'wide tiles': tiles(1 << 30, 16), 'broad': tiff(1 << 27, 1), 'deep': tiff(12_000, 11_750, _258=32, _339=3)}


@pytest.mark.parametrize('kind', BOMBS)
def test_a_small_file_that_claims_to_be_large_is_refused_at_once_and_not_decoded(monkeypatch, kind):
    monkeypatch.setattr(ImageFile.ImageFile, 'load', lambda image: pytest.fail('decoded'))
    content, begin = BOMBS[kind], time.monotonic()
    assert len(content) < 2000
    assert re.fullmatch("'a.png' says that it has [0-9,]+ million pixels, "
                        'and a file of [0-9,]+ bytes is good for 67 million.', refusal(content))
    assert time.monotonic() - begin < 1


@pytest.mark.parametrize('megapixels, file_bytes, memory, reason', [
    (67, 100, 1 << 34, None), (68, 100, 1 << 34, 'a file of 100 bytes'), (200, 25_000, 1 << 34, None),
    (200, 24_000, 1 << 34, 'a file of 24,000 bytes'), (300, 4_000_000, 1 << 34, 'a file of 4,000,000 bytes'),
    (300, 5_000_000, 1 << 34, None), (200, 10 ** 8, 6e9, None), (200, 10 ** 8, 5e9, 'the free memory'),
    (1, 10 ** 8, 1 << 24, 'the free memory')])
def test_a_picture_may_be_as_large_as_memory_and_its_file_make_likely(
        monkeypatch, megapixels, file_bytes, memory, reason):
    monkeypatch.setattr(os.path, 'getsize', lambda path: file_bytes)
    monkeypatch.setattr(doodle, 'memory_limit', lambda: int(memory))
    file = SimpleNamespace(size=(1000 * megapixels, 1000))
    if not reason:
        return doodle.check_pixels(file, 'a.png')
    with pytest.raises(doodle.UserError, match=f'{megapixels} million pixels, and {reason} is good for '):
        doodle.check_pixels(file, 'a.png')


def test_too_little_memory_is_told_before_a_picture_is_decoded(monkeypatch):
    content = bytes_of(NOISE, 'PNG')
    monkeypatch.setattr(doodle, 'memory_limit', lambda: 64 * 64 * doodle.PIXEL_BYTES - 1)
    monkeypatch.setattr(ImageFile.ImageFile, 'load', lambda image: pytest.fail('decoded'))
    assert 'the free memory is good for' in refusal(content)


PEAK = '''if True:
    import re, doodle
    doodle.import_pillow()
    def peak(name):
        size = doodle.read_picture(name).pixels.size / 3
        return size, 1024 * int(re.search('VmHWM:[^0-9]*([0-9]+)', open('/proc/self/status').read())[1])
    (few, before), (many, after) = peak('small'), peak('large')
    print((after - before) / (many - few))'''


@pytest.mark.slow
@pytest.mark.parametrize('format, channels, how', [
    ('PNG', 1, {}), ('PNG', 3, {}), ('PNG', 4, {}), ('TIFF', 4, {'compression': 'tiff_lzw'}),
    ('JPEG', 3, {'progressive': True, 'subsampling': 0}), ('WEBP', 4, {'lossless': True, 'method': 0}),
    ('JPEG2000', 4, {})])
def test_no_format_takes_more_memory_than_is_counted_for_a_pixel(format, channels, how):
    for name, side in (('small', 8), ('large', 2500)):
        values = np.random.default_rng(0).integers(0, 256, (side, side, channels), dtype=np.uint8)
        Path(name).write_bytes(bytes_of(values.squeeze(), format, **how))
    answer = subprocess.run([sys.executable, '-c', PEAK], env=os.environ | {'PYTHONPATH': str(ROOT)}, text=True,
                            capture_output=True, check=True)
    assert float(answer.stdout) < doodle.PIXEL_BYTES


# ---- scans of a JPEG -------------------------------------------------------------------------------------------------

def scans(count, hidden=b'', format='JPEG'):
    """A progressive JPEG whose last scan is repeated until it has `count`, each with `hidden` before its restarts."""
    more = {'save_all': True, 'append_images': [Image.fromarray(NOISE)]} if format == 'MPO' else {}
    content = bytes_of(NOISE, format, progressive=True, restart_marker_blocks=16, **more)
    end = content.index(b'\xff\xd9')
    last = content.rindex(b'\xff\xda', 0, end)
    scan = content[last:end].replace(b'\xff\xd0', hidden + b'\xff\xd0')
    return content[:last] + scan * (count - content.count(b'\xff\xda', 0, last)) + content[end:]


@pytest.mark.parametrize('hidden', [b'', b'\xff\x02\xff\xff'])          # no segment: libjpeg looks for the next marker
@pytest.mark.parametrize('format', ['JPEG', 'MPO'])
def test_a_jpeg_of_too_many_scans_is_refused_before_it_is_decoded(monkeypatch, format, hidden):
    Path('a.jpg').write_bytes(scans(doodle.MOST_SCANS, hidden, format))
    with Image.open('a.jpg') as image:
        assert image.format == format
    assert doodle.read_picture('a.jpg').pixels.shape == (64, 64, 3)
    more = scans(doodle.MOST_SCANS + 1, hidden, format)
    monkeypatch.setattr(ImageFile.ImageFile, 'load', lambda image: pytest.fail('decoded'))
    assert 'it has 101 scans' in refusal(more, 'a.jpg')


def test_a_jpeg_of_too_many_scans_is_refused_in_a_tiff_as_well():      # by libtiff
    Path('a.tif').write_bytes(tiff(64, 64, scans(doodle.MOST_SCANS - 1), _259=7))
    assert doodle.read_picture('a.tif').pixels.shape == (64, 64, 3)
    assert 'cannot be read' in refusal(tiff(64, 64, scans(doodle.MOST_SCANS + 1), _259=7), 'a.tif')


# ---- broken files ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('format', [
    'PNG', 'JPEG', 'TIFF', 'WEBP', 'GIF', 'BMP', 'PPM', 'JPEG2000', 'SGI', 'PCX', 'TGA'])
@pytest.mark.parametrize('share', [.01, .5, .8])
def test_truncated_files_are_refused(format, share):
    whole = bytes_of(NOISE, format)
    assert 'cannot be read as a picture: ' in refusal(whole[:int(share * len(whole))])


@pytest.mark.parametrize('content', [
    tiff(64, 64, NOISE.tobytes(), _65000=1, _700=9, _34675=7, _296=9), tiff(64, 64, scans(200), _259=7),
    tiff(64, 64, zlib.compress(NOISE.tobytes())[:-900], _259=8), bytes_of(NOISE, 'TIFF', compression='tiff_lzw')[:-200],
    bytes_of(Image.fromarray(NOISE).convert('P'), 'PNG', transparency=b'\1'), png(12_000, 12_000)],
    ids=['odd tags', 'scans', 'deflate', 'lzw', 'transparency', 'bomb'])
def test_libraries_say_nothing_to_the_user(content):
    Path('a.png').write_bytes(content)
    program = ('import doodle\ndoodle.import_pillow()\n'
               'try: doodle.read_picture("a.png")\nexcept doodle.UserError: pass')
    answer = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True,
                            env=os.environ | {'PYTHONPATH': str(ROOT)})
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, '', '')


# ---- permissions -----------------------------------------------------------------------------------------------------

AS_NOBODY = '''if True:
    import os, sys, doodle, scipy.spatial
    doodle.import_pillow()
    doodle.Image.init()                                                 # while these can be read
    if not os.getuid():
        os.setgroups([]), os.setgid(65534), os.setuid(65534)
    sys.exit(doodle.main(sys.argv[1:]))'''


@pytest.mark.parametrize('closed, mode, right', [('file', '----------', 'r'), ('folder', 'drw-r--r--', 'x')])
@pytest.mark.parametrize('role', ['style', 'content', 'seed', 'style_sem', 'content_sem'])
def test_what_may_not_be_read_is_told_with_its_bits_and_owner(monkeypatch, role, closed, mode, right):
    with tempfile.TemporaryDirectory() as folder:                       # root's tmp_path is closed to others
        os.chmod(folder, 0o755)
        monkeypatch.chdir(folder)
        for name in ('style', 'content', 'seed', 'style_sem', 'content_sem'):
            Path(name + '.png').write_bytes(bytes_of(NOISE // 128 * 255, 'PNG'))
        place = Path(os.path.realpath(folder), 'closed' if closed == 'folder' else f'{role}.png')
        if closed == 'folder':
            place.mkdir()
            os.rename(f'{role}.png', place / f'{role}.png')
            os.symlink(place / f'{role}.png', f'{role}.png')
        os.chmod(place, 0o644 if closed == 'folder' else 0)
        answer = subprocess.run([sys.executable, '-B', '-c', AS_NOBODY, '--style=style.png', '--content=content.png',
                                 '--seed=seed.png', f'--output={tempfile.gettempdir()}/none.png', '--check',
                                 '--phases=1', '--save-every=0'],
                                capture_output=True, text=True, env=os.environ | {'PYTHONPATH': str(ROOT)})
        os.chmod(place, 0o755)
    user, owner = (pwd.getpwuid(number).pw_name for number in (os.getuid() or 65534, os.getuid()))
    assert answer.returncode == 2
    assert answer.stderr == (f"ERROR: '{role}.png' may not be read by user {user}: '{place}' is "
                             f"{mode} and of {owner}.\n"
                             f"  FIX: let all read it: chmod a+{right} {place}.\n")


@pytest.mark.parametrize('path', ['none.png', 'none/a.png', 'a\0b', 'x' * 300, 'file/a.png'])
def test_what_cannot_be_there_is_not_there(path):
    Path('file').touch()
    assert not doodle.is_there(path)
    assert doodle.is_there('file') and doodle.is_there('.')
