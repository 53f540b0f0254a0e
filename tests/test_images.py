"""Pictures and maps, from their files to what the network and the matching see."""
import contextlib
import hashlib
import io
import os
import re
import shutil
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
from PIL import Image
from PIL._util import DeferredError

import doodle
import golden_data
import icc
import twin
from conftest import ROOT
from golden_data import FOLDER

doodle.import_pillow()

COLOURS = np.array([[(255, 0, 0), (0, 255, 0), (0, 0, 255)],
                    [(12, 200, 77), (0, 0, 0), (255, 255, 255)]], np.uint8)            # (2, 3, 3) RGB
GREYS = np.array([[0, 1, 100], [128, 254, 255]], np.uint8)


def three(grey):
    """(H, W) -> (H, W, 3)."""
    return np.repeat(np.asarray(grey)[:, :, None], 3, axis=2)


def painted(path, rows, unit=1):
    """Write a map of squares, one for each colour of `rows`, and return it."""
    colours = np.kron(np.array(rows, np.uint8), np.ones((unit, unit, 1), np.uint8))
    Image.fromarray(colours).save(path)
    return colours


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """The golden pictures and maps in the folder where we are."""
    monkeypatch.chdir(tmp_path)
    for path in FOLDER.glob('*.png'):
        shutil.copy(path, tmp_path)
    return tmp_path


def inputs(*arguments):
    return doodle.read_inputs(doodle.parse_options(['--phases=1', *arguments]))[0]


# ---- pictures --------------------------------------------------------------------------------------------------------

def png(values, bits, kind=0, key=b''):
    """A PNG of (H, W) greys, or (H, W, 3) RGB (kind 2), of so many bits, by hand; `key` is its tRNS."""
    def chunk(kind, data):
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    height, width = values.shape[:2]
    rows = [row.astype('>u2').tobytes() if bits == 16 else
            np.packbits(np.unpackbits(np.uint8(row).reshape(-1, 1), axis=1)[:, -bits:]).tobytes() for row in values]
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, bits, kind, 0, 0, 0)) + \
        chunk(b'tRNS', key) * bool(key) + chunk(b'IDAT', zlib.compress(b'\0' + b'\0'.join(rows))) + chunk(b'IEND', b'')


def tiff(values, code='<', photometric=1, bits=None, **tags):
    """A TIFF of (H, W) greys as they lie, by hand: of any type and byte order, and 0 may be white."""
    height, width = values.shape
    kind = {'u': 1, 'i': 2, 'f': 3}[values.dtype.kind]
    data = values.astype(values.dtype.newbyteorder(code)).tobytes()
    tags = {256: width, 257: height, 258: bits or 8 * values.itemsize, 259: 1, 262: photometric, 273: 8, 277: 1,
            278: height, 279: len(data), 339: kind, **{int(name[1:]): value for name, value in tags.items()}}
    entries = b''.join(struct.pack(code + 'HHII', tag, 4, 1, value) for tag, value in sorted(tags.items()))
    return {'<': b'II*\0', '>': b'MM\0*'}[code] + struct.pack(code + 'I', 8 + len(data)) + data + \
        struct.pack(code + 'H', len(tags)) + entries + bytes(4)


def stored(content, name='a.png'):
    """The path of a new file in the folder where we are."""
    Path(name).write_bytes(content)
    return name


def saved(image, format='PNG', **how):
    """The bytes of a Pillow image."""
    content = io.BytesIO()
    image.save(content, format, **how)
    return content.getvalue()


ALPHA = np.array([[0, 1, 255], [255, 0, 128]], np.uint8)


def with_alpha(mode):
    """COLOURS, or GREYS for LA, under ALPHA."""
    return Image.fromarray(np.dstack([GREYS if mode == 'LA' else COLOURS, ALPHA]), mode)


def on_white(colours, alpha):
    """(H, W, 3) uint8, with `alpha` (H, W) from 0 to 255 above white."""
    share = np.asarray(alpha)[:, :, None] / 255
    return np.uint8(colours * share + 255 * (1 - share) + .5)


def palette(**info):
    """COLOURS as numbers in a palette; `info` as of a PNG's transparency."""
    image = Image.fromarray(COLOURS).quantize(6)
    image.info.update(info)
    return image


BLACK_AND_WHITE = Image.fromarray(GREYS).point(lambda grey: 255 * (grey > 99)).convert('1')
DEEP = np.array([[0, 128, 129], [257 * 100, 65535, 257 * 254 + 128]], np.uint16)       # halves of a grey go down
FEW = palette()
FEW_ALPHA = np.array([0, 1, 255, 255, 255, 255], np.uint8)
RED_IS_CLEAR = 255 * (COLOURS != (255, 0, 0)).any(axis=2)
MODES = {                                                                              # colours, and alpha where it is
    '1': (BLACK_AND_WHITE, 'png', three(np.uint8(255 * (GREYS > 99))), None),
    'L': (Image.fromarray(GREYS), 'png', three(GREYS), None),
    'L with transparency': (Image.fromarray(GREYS), 'png', three(GREYS), 255 * (GREYS != 100)),
    'LA': (with_alpha('LA'), 'png', three(GREYS), ALPHA),
    'P': (palette(), 'png', COLOURS, None),
    'P with transparency': (palette(transparency=bytes(FEW_ALPHA)), 'png', COLOURS, FEW_ALPHA[np.asarray(FEW)]),
    'P with one transparent colour': (palette(transparency=3), 'gif', COLOURS, 255 * (np.asarray(FEW) != 3)),
    'PA': (with_alpha('RGBA').convert('PA'), 'tiff', None, ALPHA),
    'RGB': (Image.fromarray(COLOURS), 'png', COLOURS, None),
    'RGB with transparency': (Image.fromarray(COLOURS), 'png', COLOURS, RED_IS_CLEAR),
    'RGBA': (with_alpha('RGBA'), 'png', COLOURS, ALPHA),
    'RGBA TIFF': (with_alpha('RGBA'), 'tiff', COLOURS, ALPHA),
    'RGBA, opaque': (Image.fromarray(COLOURS).convert('RGBA'), 'png', COLOURS, None),
    'CMYK': (Image.fromarray(COLOURS).convert('CMYK'), 'tiff', COLOURS, None),
    'I;16': (Image.fromarray(DEEP), 'png', three([[0, 0, 1], [100, 255, 254]]), None),
    'I;16, dark': (Image.fromarray(np.uint16(GREYS)), 'png', three([[0, 0, 0], [0, 1, 1]]), None),
    'I;16 TIFF': (Image.fromarray(DEEP), 'tiff', three([[0, 0, 1], [100, 255, 254]]), None),
    'I': (Image.fromarray(np.int32(DEEP)), 'tiff', three([[0, 0, 1], [100, 255, 254]]), None),
}


@pytest.fixture(params=MODES)
def any_mode(request, tmp_path):
    """The path of a picture of a mode, its colours, and its alpha or None."""
    image, ending, expected, alpha = MODES[request.param]
    path = str(tmp_path / f'a.{ending}')
    how = {'L with transparency': dict(transparency=100), 'RGB with transparency': dict(transparency=(255, 0, 0))}
    image.save(path, **how.get(request.param, image.info))
    assert Image.open(path).mode == request.param.split()[0].rstrip(',')
    return path, np.asarray(image.convert('RGB')) if expected is None else expected, alpha


@pytest.mark.filterwarnings('error::UserWarning')
def test_pictures_of_any_mode_mean_their_colours_on_white(any_mode):  # fault 3
    path, colours, alpha = any_mode
    read = doodle.read_picture(path)
    assert read.pixels.dtype == np.uint8
    assert read.pixels.tolist() == (colours if alpha is None else on_white(colours, alpha)).tolist()
    assert (read.alpha is None) == (alpha is None) and (alpha is None or (read.alpha[:, :, 0] == alpha).all())
    told = [f'{100 * np.mean(alpha < 255):.3g}% of `{path}` is transparent: it is laid on white.' for alpha in (
        [] if alpha is None else [alpha])]
    assert [line for line in read.remarks if 'transparent' in line] == told


@pytest.mark.filterwarnings('error::UserWarning')
def test_maps_of_any_mode_mean_their_colours_without_alpha(any_mode):  # fault 3
    path, colours, _ = any_mode
    image = doodle.decoded(path)
    (read,), _ = doodle.map_pixels([image])
    if image.mode[0] == 'I':                                            # labels: bytes as they are, others numbered
        values = np.asarray(image)
        colours = three(values if values.max() < 256 else np.searchsorted(np.unique(values), values))
    assert read.dtype == np.uint8 and read.tolist() == colours.tolist()


@pytest.mark.parametrize('bits, kind, values, key, alpha', [
    (1, 0, [[0, 1]], (1,), [[255, 0]]), (2, 0, [[1, 3]], (1,), [[0, 255]]), (4, 0, [[9, 15]], (15,), [[255, 0]]),
    (8, 0, [[9, 15]], (9,), [[0, 255]]), (16, 0, [[0x1234, 0x3434]], (0x1234,), [[0, 255]]),
    (8, 2, [[(1, 2, 3), (3, 2, 1)]], (3, 2, 1), [[255, 0]]),
    (16, 2, [[(0x1234, 0x5678, 0x9abc), (0x3400, 0x7800, 0xbc00)]], (0x1234, 0x5678, 0x9abc), [[0, 255]])])
def test_the_transparent_colour_of_a_png_is_known_at_any_depth(tmp_path, monkeypatch, bits, kind, values, key, alpha):
    monkeypatch.chdir(tmp_path)
    content = png(np.array(values), bits, kind, struct.pack(f'>{len(key)}H', *key))
    assert doodle.read_picture(stored(content)).alpha[:, :, 0].tolist() == alpha


def test_16_bits_a_colour_are_scaled_within_a_step(tmp_path):  # fault 3
    values = np.random.default_rng(0).integers(0, 65536, (4, 5, 3))
    (tmp_path / 'a.png').write_bytes(png(values, 16, 2))
    assert np.abs(doodle.read_picture(str(tmp_path / 'a.png')).pixels - values / 257).max() <= 1


RAMP = np.linspace(0, 1, 3000).reshape(50, 60)
HOT, BAD = RAMP.copy(), RAMP.copy()
HOT[7, 7], BAD[7, 7] = 3e4, np.nan
BYTES = np.uint8(np.floor(RAMP * 255 + .5))
DEEP_GREYS = {          # values, how they lie, what they are as bytes or why they are refused, what is said
    'floats 0..1': (np.float32(RAMP), {}, BYTES, '1 is white'),
    'doubles 0..1': (RAMP, {}, 'cannot be read', None),
    'floats 0..1, big end first': (np.float32(RAMP), dict(code='>'), BYTES, '1 is white'),
    'floats 0..1, 0 is white': (np.float32(RAMP), dict(photometric=0), 255 - BYTES, '1 is white'),
    'floats 0..255': (np.float32(RAMP * 255), {}, BYTES, '255 is white'),
    'floats 0..65535': (np.float32(RAMP * 65535), {}, BYTES, '65535 is white'),
    'floats with a hot pixel': (np.float32(HOT), {}, np.where(HOT > 1, 255, BYTES), '1 is white'),
    'floats a little below 0': (np.float32(np.where(RAMP > 0, RAMP, -1e-3)), {}, BYTES, '1 is white'),
    'floats 0..8': (np.float32(RAMP * 8), {}, 'from 0 to 8', None),
    'floats 0..1e6': (np.float32(RAMP * 1e6), {}, 'from 0 to 1e+06', None),
    'floats -1..1': (np.float32(2 * RAMP - 1), {}, 'from -1 to 1', None),
    'floats, one NaN': (np.float32(BAD), {}, 'nan', None),
    'floats, one infinite': (np.float32(np.where(np.isnan(BAD), np.inf, BAD)), {}, 'inf', None),
    'floats, dark': (np.float32(RAMP / 100), {}, np.uint8(RAMP * 2.55 + .5), 'nearly black'),
    'int32 0..255': (np.int32(BYTES), {}, BYTES, '255 is white'),
    'int32 0..7': (np.int32(RAMP * 7), {}, np.uint8(RAMP * 7), '255 is white'),
    'int32 0..65535': (np.int32(RAMP * 65535), {}, BYTES, '65535 is white'),
    'int32 0..4095': (np.int32(RAMP * 4095), {}, 'from 0 to 4095', None),
    'int32 below 0': (np.int32(RAMP * 255 - 99), {}, 'from -99 to 156', None),
    'uint32': (np.uint32(RAMP * (2 ** 32 - 1)), {}, BYTES, '4294967295 is white'),
    'uint32 0..65535': (np.uint32(RAMP * 65535), {}, BYTES, '65535 is white'),
    'int16 0..255': (np.int16(BYTES), {}, BYTES, '255 is white'),
    'int16': (np.int16(RAMP * 65535 - 32768), {}, 'from -32768 to 32767', None),
    'int16, big end first': (np.int16(RAMP * 65535 - 32768), dict(code='>'), 'from -32768 to 32767', None),
    'int8': (np.int8(RAMP * 255 - 128), {}, 'from -128 to 127', None),
    'int8 0..127': (np.int8(RAMP * 127), {}, np.uint8(RAMP * 127), '255 is white'),
    'uint16': (np.uint16(RAMP * 65535), {}, BYTES, None),
    'uint16, big end first': (np.uint16(RAMP * 65535), dict(code='>'), BYTES, None),
    'uint16, 0 is white': (np.uint16(RAMP * 65535), dict(photometric=0), 255 - BYTES, None),
    'uint16 0..255': (np.uint16(BYTES), {}, np.uint8(BYTES > 128), 'nearly black'),
    'uint8, 0 is white': (BYTES, dict(photometric=0), 255 - BYTES, None),
}


@pytest.mark.parametrize('kind', DEEP_GREYS)
def test_deep_greys_are_scaled_or_refused_and_never_silently_black(tmp_path, monkeypatch, kind):
    values, how, expected, told = DEEP_GREYS[kind]
    monkeypatch.chdir(tmp_path)
    path = stored(tiff(values, **how), 'a.tif')
    if isinstance(expected, str):
        with pytest.raises(doodle.UserError) as refusal:
            doodle.read_picture(path)
        assert expected in refusal.value.args[0] and repr(path) in refusal.value.args[0]
        return
    pixels, alpha, remarks = doodle.read_picture(path)
    assert np.abs(pixels.astype(int) - np.asarray(expected)[:, :, None]).max() <= 1 and alpha is None
    assert [told in line for line in remarks] == [True] * bool(told)


def test_12_bits_reach_up_to_4095_and_16_bits_of_a_pgm_up_to_65535(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    twelve = np.repeat([[0x00, 0x07, 0xff, 0xff, 0xf8, 0x00]], 4, axis=0)              # 0, 2047, 4095, 2048 a row
    content = tiff(np.uint8(twelve), bits=12, _256=4, _339=1)
    assert doodle.read_picture(stored(content, 'a.tif')).pixels[0, :, 0].tolist() == [0, 127, 255, 128]
    dark = doodle.read_picture(stored(b'P5 3 1 65535\n' + np.array([0, 200, 255], '>u2').tobytes(), 'a.pgm'))
    assert dark.pixels[0, :, 0].tolist() == [0, 1, 1] and 'nearly black' in dark.remarks[0]


# A colour in the space of a profile, and the same in sRGB.
PROFILES = {
    'Display P3': (icc.P3, 'RGB', (234, 51, 35), (255, 0, 0)),
    'Adobe RGB': (icc.ADOBE, 'RGB', (144, 255, 60), (0, 255, 0)),
    'ProPhoto': (icc.PROPHOTO, 'RGB', (179, 70, 27), (255, 0, 0)), 'grey': (icc.LINEAR_GREY, 'L', 55, (128, 128, 128)),
    'CMYK': (icc.CMYK, 'CMYK', (255, 0, 0, 0), (162, 162, 162)),
}


@pytest.mark.parametrize('space, format', [
    *((space, format) for space in PROFILES for format in ('JPEG', 'TIFF')), ('grey', 'PNG'),
    *((space, format) for space in ('Display P3', 'Adobe RGB', 'ProPhoto') for format in ('PNG', 'WEBP')),
    ('Display P3', 'AVIF')])
def test_colours_of_another_space_become_those_of_srgb(tmp_path, monkeypatch, space, format):
    profile, mode, colour, expected = PROFILES[space]
    monkeypatch.chdir(tmp_path)
    how = {'JPEG': dict(quality=100, subsampling=0), 'AVIF': dict(quality=100, subsampling='4:4:4'),
           'WEBP': dict(lossless=True)}.get(format, {})
    path = stored(saved(Image.new(mode, (16, 16), colour), format, icc_profile=profile, **how), 'a')
    pixels, _, remarks = doodle.read_picture(path)
    assert np.abs(pixels.astype(int) - expected).max() <= 4                             # steps of ProPhoto are wide
    assert len(remarks) == 1 and 'are converted to sRGB from' in remarks[0]
    (as_it_lies,), _ = doodle.map_pixels([doodle.decoded(path)])                       # so a map is read
    assert (as_it_lies == np.asarray(Image.open(path).convert('RGB'))).all()


@pytest.mark.parametrize('mode, profile', [('RGB', icc.SRGB), ('RGBA', icc.SRGB), ('P', icc.SRGB)])
def test_srgb_is_left_as_it_is(tmp_path, monkeypatch, mode, profile):
    monkeypatch.chdir(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    image = Image.fromarray(noise).convert(mode)
    pixels, _, remarks = doodle.read_picture(stored(saved(image, icc_profile=profile)))
    assert remarks == [] and (pixels == np.asarray(image.convert('RGB'))).all()


def test_transparent_and_deep_pictures_have_profiles_as_well(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image = Image.new('RGBA', (2, 1), (234, 51, 35, 255))
    image.putpixel((1, 0), (234, 51, 35, 51))
    pixels = doodle.read_picture(stored(saved(image, icc_profile=icc.P3))).pixels
    assert np.abs(pixels.astype(int) - [[(255, 0, 0), (255, 204, 204)]]).max() <= 1
    deep = Image.fromarray(np.full((2, 2), 257 * 55, np.uint16))
    assert np.abs(doodle.read_picture(stored(saved(deep, icc_profile=icc.LINEAR_GREY))).pixels - 128.).max() <= 1


@pytest.mark.parametrize('mode, profile', [
    ('RGB', b'no profile'), ('RGB', icc.P3[:200]), ('RGB', icc.CMYK), ('RGB', icc.LINEAR_GREY), ('L', icc.P3),
    ('CMYK', icc.P3)])
def test_colours_stay_as_they_lie_where_a_profile_is_broken_or_of_another_mode(tmp_path, monkeypatch, mode, profile):
    monkeypatch.chdir(tmp_path)
    image = Image.fromarray(COLOURS).convert(mode)
    pixels, _, remarks = doodle.read_picture(stored(saved(image, 'TIFF', icc_profile=profile), 'a.tif'))
    assert (pixels == np.asarray(image.convert('RGB'))).all()
    assert len(remarks) == 1 and re.fullmatch('The colour profile of `a.tif` cannot be used, [^\n]+', remarks[0])


def test_without_littlecms_that_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doodle.ImageCms, 'core', DeferredError.new(ImportError('no _imagingcms')))
    pixels, _, remarks = doodle.read_picture(stored(saved(Image.fromarray(COLOURS), icc_profile=icc.P3)))
    assert (pixels == COLOURS).all() and 'no _imagingcms' in remarks[0] and len(remarks) == 1


def test_what_is_written_has_no_profile_of_what_was_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pixels = doodle.read_picture(stored(saved(Image.fromarray(COLOURS), icc_profile=icc.P3))).pixels
    for name in ('o.png', 'o.jpg', 'o.tif', 'o.webp'):
        doodle.write_picture(pixels, name)
        assert 'icc_profile' not in Image.open(name).info


@pytest.mark.parametrize('width, height, size, memory, accepted', [
    (16320, 12240, 60e6, 24e9, True), (16320, 12240, 36e3, 24e9, True),               # a telephone's; its map
    (16320, 12240, 60e6, 4e9, False), (16320, 12240, 8e3, 24e9, False), (12000, 11750, 8e3, 24e9, False),
    (8192, 8192, 40, 24e9, True), (8192, 8193, 40, 24e9, False), (30000, 30000, 113e3, 1e12, False),
    (30000, 30000, 20e6, 1e12, True), (30000, 30000, 20e6, 8e9, False), (1000, 1000, 9e6, 2e7, False)])
def test_pixels_are_bounded_by_the_memory_and_by_the_file(tmp_path, monkeypatch, width, height, size, memory, accepted):
    monkeypatch.setattr(doodle, 'memory_limit', lambda: int(memory))
    with open(tmp_path / 'a', 'wb') as file:
        file.truncate(int(size))
    with contextlib.nullcontext() if accepted else pytest.raises(doodle.UserError, match='million pixels'):
        doodle.check_pixels(SimpleNamespace(size=(width, height)), str(tmp_path / 'a'))


def scanned(count, size=(16, 16)):
    """A JPEG with so many scans: one of the luminance again and again."""
    content = saved(Image.new('L', size, 99), 'JPEG', progressive=True)
    scans = [match.start() for match in re.finditer(b'\xff\xda', content)]
    return content[:-2] + content[scans[1]:scans[2]] * (count - len(scans)) + b'\xff\xd9'


def test_a_jpeg_of_more_than_100_scans_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert doodle.read_picture(stored(scanned(100))).pixels.shape == (16, 16, 3)
    start = time.time()
    for content in (scanned(101), scanned(3000, (2000, 2000)), scanned(3000) + b'\xff\xd8 and more'):
        with pytest.raises(doodle.UserError, match='scans'):
            doodle.read_picture(stored(content))
    assert time.time() - start < 1


def test_scans_are_those_of_the_first_picture_itself(tmp_path, monkeypatch):
    """Not of a preview in its EXIF, of a profile that looks like them, or of what follows its end, as in films."""
    monkeypatch.chdir(tmp_path)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (99, 99, 3), np.uint8))
    for progressive, count in ((False, 1), (True, 10)):
        content = saved(noise, 'JPEG', progressive=progressive, icc_profile=b'\xff\xda\0\0' * 999, comment=scanned(99))
        assert doodle.scan_count(stored(content + scanned(3000))) == count
        doodle.decoded('a.png')
    first, second = (Image.new('RGB', (16, 16), colour) for colour in ('red', 'blue'))
    content = saved(first, 'MPO', save_all=True, append_images=[second])
    assert Image.open(stored(content)).format == 'MPO' and doodle.scan_count('a.png') == 1
    assert (doodle.read_picture('a.png').pixels[..., 0] > 250).all()


def test_jpegs_of_many_scans_within_a_tiff_take_no_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, start = scanned(3000, (4000, 4000)), time.time()
    frame = tiff(np.frombuffer(content, np.uint8)[None], bits=8, _256=4000, _257=4000, _278=4000, _259=7)
    with pytest.raises(doodle.UserError):
        doodle.read_picture(stored(frame))
    assert time.time() - start < 3


PEAK = '''
import re, sys
sys.path.insert(0, sys.argv[1])
import doodle
doodle.return_freed_memory()
doodle.import_pillow()
doodle.Image.init()
def peak():
    return 1024 * int(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1])
before = peak()
height, width, _ = doodle.read_picture(sys.argv[2]).pixels.shape
print((peak() - before) / (height * width))
'''


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['PNG', 'deep PNG', 'float TIFF', 'RGBA TIFF', 'progressive CMYK', 'RGBA WEBP',
                                  'RGBA AVIF', 'RGBA JPEG2000'])
def test_a_pixel_takes_no_more_memory_than_is_reckoned(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    colours = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)).resize((2400, 1800))
    grey = np.asarray(colours.convert('L'))
    cut_out = colours.copy()
    cut_out.putalpha(Image.fromarray(grey))
    content = {
        'PNG': lambda: saved(colours, compress_level=1),
        'deep PNG': lambda: saved(Image.fromarray(grey * np.uint16(257))),
        'float TIFF': lambda: saved(Image.fromarray(grey / np.float32(255)), 'TIFF'),
        'RGBA TIFF': lambda: saved(cut_out, 'TIFF', compression='tiff_adobe_deflate', icc_profile=icc.P3),
        'progressive CMYK': lambda: saved(colours.convert('CMYK'), 'JPEG', progressive=True, icc_profile=icc.CMYK),
        'RGBA WEBP': lambda: saved(cut_out, 'WEBP', method=0), 'RGBA AVIF': lambda: saved(cut_out, 'AVIF', speed=10),
        'RGBA JPEG2000': lambda: saved(cut_out, 'JPEG2000')}[kind]()
    taken = float(subprocess.check_output([sys.executable, '-c', PEAK, str(ROOT), stored(content)], text=True))
    assert 3 < taken <= doodle.PIXEL_BYTES + (0 if 'JPEG2000' in kind else -6)


def test_a_picture_is_decoded_by_no_other_program(refused, tmp_path, monkeypatch):
    (tmp_path / 'gs').write_text('#!/bin/sh\ntouch touched\n')
    (tmp_path / 'gs').chmod(0o755)
    monkeypatch.setenv('PATH', f'{tmp_path}:{os.environ["PATH"]}')
    (tmp_path / 'a.png').write_text('%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n')
    assert "'a.png' cannot be read" in refused('--style=a.png')[0]
    assert not (tmp_path / 'touched').exists()


@pytest.mark.parametrize('format', ['DDS', 'ICO', 'ICNS', 'EPS', 'MSP', 'SPIDER', 'XBM'])
def test_what_is_no_format_of_pictures_is_refused(tmp_path, monkeypatch, format):
    monkeypatch.chdir(tmp_path)
    image = Image.new({'MSP': '1', 'XBM': '1', 'SPIDER': 'F'}.get(format, 'RGB'), (32, 32))
    with pytest.raises(doodle.UserError, match='cannot be read'):
        doodle.read_picture(stored(saved(image, format)))


@pytest.mark.parametrize('format', ['PNG', 'GIF', 'WEBP', 'AVIF', 'TIFF'])
def test_of_what_moves_the_first_image_is_taken(tmp_path, monkeypatch, format):
    monkeypatch.chdir(tmp_path)
    red, blue = (Image.new('RGB', (16, 16), colour) for colour in ((255, 0, 0), (0, 0, 255)))
    content = saved(red, format, save_all=True, append_images=[blue] * 3)
    assert np.abs(doodle.read_picture(stored(content)).pixels - np.float32((255, 0, 0))).max() <= 2


@pytest.mark.parametrize('chunk', [b'zTXt', b'iCCP'])
def test_a_png_whose_texts_unfold_without_end_is_refused_in_plain_words(tmp_path, monkeypatch, chunk):
    monkeypatch.chdir(tmp_path)
    content, data = saved(Image.new('RGB', (9, 9))), b'name\0\0' + zlib.compress(bytes(50_000_000))
    data = struct.pack('>I', len(data)) + chunk + data + struct.pack('>I', zlib.crc32(chunk + data))
    with pytest.raises(doodle.UserError, match='a text or a profile in it is too long'):
        doodle.read_picture(stored(content[:33] + data + content[33:]))


def as_nobody(*arguments):
    """What the program says on stderr, run by another user who is not root, where that can be."""
    for module in ('PngImagePlugin', 'ImageFile'):
        __import__(f'PIL.{module}')
    child = os.fork()
    if not child:
        with open('err', 'w') as err, contextlib.redirect_stderr(err), contextlib.redirect_stdout(err):
            if os.getuid() == 0:
                os.setuid(65534)
            code = doodle.main(['--save-every=0', *arguments])
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    return Path('err').read_text().split('ERROR: ')[1].split('\n')


def test_who_may_read_a_picture_or_map_is_told_to_who_may_not(monkeypatch):
    me = doodle.pwd.getpwuid(os.getuid()).pw_name
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.chdir(folder)
        os.chmod(folder, 0o777)
        for name in ('style.png', 'content.png', 'style_sem.png'):
            shutil.copy(FOLDER / 'face_style.png', name)
            os.chmod(name, 0o644)
        os.mkdir('closed')
        shutil.copy(FOLDER / 'face_style.png', 'closed/map of it.png')
        os.symlink('closed/map of it.png', 'content_sem.png')
        faces = '--style=style.png', '--content=content.png'

        def assert_told(path, place, bits, letter, *arguments):
            problem, fix, _ = as_nobody(*arguments)
            place = os.path.realpath(place)
            assert re.fullmatch(rf"'{path}' may not be read by user \w+: '{place}' is {bits} and of {me}\.", problem)
            assert fix == f'  FIX: let all read it: chmod a+{letter} {place}.'

        for path in ('style.png', 'content.png', 'style_sem.png'):
            os.chmod(path, 0o200)
            os.chmod('closed', 0o755)
            assert_told(path, path, '--w-------', 'r', *faces)
            os.chmod(path, 0o644)
        os.chmod('closed', 0o600)
        for path, *arguments in (('content_sem.png', *faces), ('content_sem.png', *faces, '--auto-maps=3'),
                                 ('closed/none.png', '--style=closed/none.png'),
                                 ('closed/none.png', *faces, '--seed=closed/none.png', '--semantic-weight=0'),
                                 ('closed/none.npz', *faces, '--weights=closed/none.npz', '--semantic-weight=0')):
            assert_told(path, 'closed', 'drw-------', 'x', *arguments)
        os.chmod('closed', 0o700)


@pytest.mark.parametrize('orientation, upright', [
    (1, COLOURS), (2, COLOURS[:, ::-1]), (3, COLOURS[::-1, ::-1]), (4, COLOURS[::-1]), (5, COLOURS.swapaxes(0, 1)),
    (6, np.rot90(COLOURS, -1)), (7, np.rot90(COLOURS, 2).swapaxes(0, 1)), (8, np.rot90(COLOURS))])
def test_exif_turns_pictures_upright(tmp_path, orientation, upright):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(COLOURS).save(tmp_path / 'a.png', exif=exif)
    assert doodle.read_picture(str(tmp_path / 'a.png')).pixels.tolist() == upright.tolist()


def test_exif_turns_maps_as_it_turns_their_pictures(pictures):
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ('face_content', 'face_content_sem'):
        Image.open(f'{name}.png').rotate(90, expand=True).save(f'turned{name[12:]}.png', exif=exif)
    turned, upright = (inputs('--style=face_style.png', f'--content={name}.png') for name in ('turned', 'face_content'))
    assert (turned.content == upright.content).all() and (turned.content_map == upright.content_map).all()


def test_what_is_no_picture_is_refused_by_name(refused, tmp_path):
    good = (FOLDER / 'face_style.png').read_bytes()
    for name, content in (('half.png', good[:len(good) // 2]), ('empty.png', b''), ('text.jpg', b'no picture')):
        (tmp_path / name).write_bytes(content)
        problem, _ = refused(f'--style={name}')
        assert repr(name) in problem and 'cannot be read' in problem
    (tmp_path / 'folder.png').mkdir()
    assert refused('--style=folder.png')[0] == "'folder.png' is not a file."


@pytest.mark.parametrize('option', ['style', 'content', 'seed'])
def test_a_picture_that_is_not_there_is_refused(refused, pictures, option):  # fault 2
    style = ['--style=face_style.png'] * (option != 'style')
    problem, fix = refused(*style, '--semantic-weight=0', f'--{option}=none.png')
    assert problem == "'none.png' is not there." and 'doodle.py' in fix


@pytest.mark.parametrize('option', ['style', 'content', 'seed', 'weights', 'log', 'frames', 'output'])
def test_an_empty_path_is_refused_not_ignored(refused, pictures, option):  # fault 2
    refused('--style=texture_style.png', '--phases=1', '--iterations=1', '--network=vgg16', f'--{option}=')


def test_without_the_pictures_of_the_post_its_command_shows_one_that_runs(refused):
    problem, fix = refused('--style=samples/gollum.png', '--content=samples/jim_carrey.png', '--device=gpu0')
    assert 'gollum.png' in problem or 'jim_carrey.png' in problem
    assert 'yours to bring' in fix and 'python3 doodle.py --style samples/' in fix


# ---- sizes -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name, phase, digest', [    # of the original's pixels at 1/2 and 1/4
    ('face_content.png', 1, 'a108acda444bc2a3071f2eeaa62bb07a76b1e60901b27a43b5e9b7d5da64ba4f'),
    ('face_content.png', 0, '6f896f59c531edf856870c25817cabd2d3b96f54cf00d2a64b79353f62070b7a'),
    ('face_style.png', 1, 'd9f08d23f80514cd13826c98928159f5874dd16c198ead37e9a782b70557d0dc'),
    ('face_style.png', 0, 'b45a0914593e50e30a396ec7e2dcfdc9d08fbf7534f51523dced9eea67aae489'),
    ('tiny_seed.png', 0, '4342e510fb8e3c0c73b24e7edba9cd8012eda009ccc849029c98d0acdf1f9344')])
def test_pictures_are_scaled_as_by_the_original(name, phase, digest):
    picture = doodle.read_picture(str(FOLDER / name)).pixels
    scaled = doodle.resized(picture, doodle.phase_size(picture.shape[1::-1], phase, 3), Image.LANCZOS)
    assert hashlib.sha256(np.ascontiguousarray(scaled)).hexdigest() == digest


def test_phases_double_the_scale_up_to_the_full_size():
    assert [doodle.phase_size((97, 55), phase, 3) for phase in range(3)] == [(24, 13), (48, 27), (97, 55)]
    assert doodle.phase_size((97, 55), 0, 1) == (97, 55)


@pytest.mark.parametrize('longest, size', [(None, (96, 112)), (112, (96, 112)), (500, (96, 112)), (56, (48, 56)),
                                           (1, (1, 1))])
def test_only_what_is_larger_is_limited(longest, size):
    picture = doodle.read_picture(str(FOLDER / 'face_content.png')).pixels
    limited = doodle.limited(picture, longest, Image.LANCZOS)
    assert limited.shape == (*size[::-1], 3)
    assert (limited == doodle.resized(picture, size, Image.LANCZOS)).all()


def test_max_size_shrinks_pictures_and_maps_alike(pictures):
    small = inputs('--style=face_style.png', '--content=face_content.png', '--max-size=64')
    assert small.size == (55, 64) == small.content.shape[1::-1] == small.content_map.shape[1::-1]
    assert small.style.shape == small.style_map.shape == (56, 64, 3)
    doodled = inputs('--style=tiny_style.png', '--output=tiny_target.png', '--max-size=32')
    assert doodled.size == (28, 32)


@pytest.mark.parametrize('scale, longest, size', [
    ('2', None, (216, 248)), ('0.5', None, (54, 62)), ('1.5', 62, (81, 93))])
def test_the_style_at_its_own_scale_after_max_size(pictures, scale, longest, size):
    """Its map follows, since a map is fitted to the picture; the content stays."""
    arguments = [f'--style-scale={scale}'] + [f'--max-size={longest}'] * bool(longest)
    read, remarks = doodle.read_inputs(doodle.parse_options(
        ['--style=face_style.png', '--content=face_content.png', '--phases=1', *arguments]))
    picture = Image.open('face_style.png').convert('RGB')
    assert (read.style == np.asarray(picture.resize(size[::-1], Image.LANCZOS))).all()
    assert max(read.content.shape) == (longest or 112) and read.style_map.shape[:2] == size
    assert f'The style picture is taken at {scale} times its size, {size[1]}x{size[0]}.' in remarks


@pytest.mark.parametrize('limit, told', [(20_000_000, "--style-scale=10 makes 1240x1080 pixels of 'face_style.png'"),
                                         (200_000_000, 'in the style of 1240x1080 need about 1.1 GB of memory')])
def test_a_style_scale_that_no_memory_holds_is_refused(refused, pictures, monkeypatch, limit, told):
    monkeypatch.setattr(doodle, 'memory_limit', lambda: limit)
    problem, fix = refused('--style=face_style.png', '--content=face_content.png', '--style-scale=10', '--phases=1')
    assert told in problem and 'a smaller --style-scale' in fix


# ---- maps ------------------------------------------------------------------------------------------------------------

def channels_of(maps):
    """What matching sees of painted maps, and the remark on them."""
    return doodle.map_channels(maps, *doodle.map_classes(maps, [False] * len(maps)))


RED, GREEN, BLUE, BLACK, WHITE, GREY = (255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0), (255, 255, 255), (99, 99, 99)


@pytest.mark.parametrize('arguments', [('--style=face_style.png', '--content=face_content.png'),
                                       ('--style=tiny_style.png', '--output=tiny_target.png')])
def test_golden_maps_keep_the_scores_of_the_original(pictures, arguments):  # fault 4
    maps = inputs(*arguments)
    target = 'face_content' if len(arguments[1]) == len('--content=face_content.png') else 'tiny_target'
    assert (maps.content_map == np.asarray(Image.open(f'{target}_sem.png'))).all()
    assert (maps.style_map == np.asarray(Image.open(arguments[0][8:-4] + '_sem.png'))).all()


@pytest.mark.parametrize('classes', [
    [RED, BLACK], [(100, 0, 0), (200, 0, 0)], [GREY, WHITE], [BLACK], [RED, GREEN, (250, 20, 20)]])
def test_black_shades_and_greys_become_classes_of_their_own(classes):  # fault 4
    here, there = np.array([classes], np.uint8), np.array([classes[::-1]], np.uint8)
    channels, remark = channels_of([here, there])
    assert str(len(classes)) in remark
    here, there = (c[0] / np.linalg.norm(c[0], axis=1, keepdims=True) for c in channels)
    assert np.allclose(here @ there[::-1].T, np.eye(len(classes)))


@pytest.mark.parametrize('classes', [[RED, GREEN, BLUE, WHITE], [WHITE], [RED, (255, 50, 0)], [(9, 9, 9), RED]])
def test_other_maps_stay_as_they_are(classes):  # fault 4
    maps = [np.array([classes], np.uint8), np.array([classes[:1]], np.uint8)]
    channels, remark = channels_of(maps)
    assert remark is None and all((a == b).all() for a, b in zip(channels, maps))


@pytest.mark.parametrize('green, alike', [(36, True), (37, False)])                     # cosines 0.9902 and 0.9896
def test_two_classes_are_one_from_a_cosine_of_99_percent_on(green, alike):  # fault 4
    classes = np.array([[RED, (255, green, 0)]], np.uint8)
    assert bool(channels_of([classes, classes])[1]) == alike


def test_a_class_covers_a_thousandth_of_either_map():  # fault 4
    style, content = np.full((50, 40, 3), RED, np.uint8), np.full((100, 100, 3), GREEN, np.uint8)
    style[0, 0], content[0, :9] = BLACK, (100, 0, 0)                                   # 0.05 %, 0.09 %
    assert channels_of([content, style])[1] is None
    style[0, 1] = BLACK                                                                # 0.1 %
    assert channels_of([content, style])[1].startswith('3 ')
    content[0, 9] = 100, 0, 0
    assert channels_of([content, style])[1].startswith('4 ')


def test_a_blended_pixel_goes_to_its_nearest_class():  # fault 4
    line = np.full((1, 3000, 3), RED, np.uint8)
    line[0, 1000:] = BLACK
    line[0, 1000], line[0, 1001] = (140, 0, 0), (120, 0, 9)
    (channels, _), _ = channels_of([line, line])
    for pixel, same in ((1000, 0), (1001, 2999)):
        assert (channels[0, pixel] == channels[0, same]).all()
    assert (channels[0, 0] != channels[0, 2999]).any()


@pytest.mark.parametrize('layer', ['1_2', '2_1', '3_1', '4_2', '5_1'])
@pytest.mark.parametrize('halves', [1, 2])
def test_a_map_is_averaged_over_what_a_feature_sees(layer, halves):
    maps = np.random.default_rng(0).integers(0, 256, (70, 86, 4), np.uint8)            # (H, W, K)
    whole = twin.planes(maps)                                                          # (K, H, W)
    expected = twin.pool_map(whole if halves == 1 else twin.average_pool(whole), layer)
    pooled = doodle.pooled_map(maps, (86 // halves, 70 // halves), layer)
    assert pooled.dtype == np.float32
    np.testing.assert_allclose(pooled, np.moveaxis(expected, 0, 2), rtol=1e-4)


def test_a_map_of_another_size_is_fitted_without_new_colours(pictures):
    rows, picture = [[RED, GREEN], [BLUE, WHITE]], np.zeros((113, 97, 3), np.uint8)
    Image.fromarray(picture).save('a.png')
    for size in ((48, 56), (49, 57), (194, 226), (97, 113)):
        Image.fromarray(painted('a_sem.png', rows, 100)).resize(size, Image.NEAREST).save('a_sem.png')
        (fitted,) = doodle.classify_maps(['a_sem.png'], [('a.png', picture)]).maps
        assert fitted.shape == picture.shape
        assert (fitted[[5, 5, 107, 107], [5, 91, 5, 91]] == [RED, GREEN, BLUE, WHITE]).all()
        assert len(np.unique(fitted.reshape(-1, 3), axis=0)) == 4


@pytest.mark.parametrize('unit, rows', [(30, [[RED, GREEN], [BLUE, WHITE]]), (16, [[RED, BLUE]] * 7)])
def test_a_map_of_another_shape_is_refused_with_both_sizes(refused, pictures, unit, rows):
    Image.new('RGB', (97, 113)).save('a.png')
    height, width, _ = painted('a_sem.png', rows, unit).shape
    problem, _ = refused('--style=face_style.png', '--content=a.png', '--phases=1')
    assert f"'a_sem.png' is {width}x{height} " in problem and "'a.png' is 97x113" in problem


@pytest.mark.parametrize('there, missing', [('style', 'content'), ('content', 'style')])
def test_one_map_alone_is_refused_and_the_missing_one_named(refused, pictures, there, missing):
    os.remove(f'face_{missing}_sem.png')
    problem, fix = refused('--style=face_style.png', '--content=face_content.png')
    assert f"'face_{missing}_sem.png' is not there" in problem and f"'face_{there}_sem.png'" in problem
    assert '--semantic-weight=0' in fix


def test_semantic_weight_0_leaves_maps_unread(pictures):
    (pictures / 'face_style_sem.png').write_text('no map')
    os.remove('face_content_sem.png')
    without = inputs('--style=face_style.png', '--content=face_content.png', '--semantic-weight=0')
    assert without.style_map is None and without.content_map is None


def test_maps_may_have_another_ending(pictures):
    painted('face_style-map.png', [[RED, BLUE]], 62)
    painted('face_content-map.png', [[BLUE], [RED]], 56)
    with pytest.raises(doodle.UserError):                                              # 56x112 for 96x112
        inputs('--style=face_style.png', '--content=face_content.png', '--semantic-ext=-map.png')
    assert doodle.map_path('a.b/c.jpg', '-map.png') == 'a.b/c-map.png'


def legend_of(content, style):
    """The legend of two maps, each a row of colours, three pixels wide and twenty high."""
    maps = [np.repeat(np.uint8([row] * 20), 3, axis=1) for row in (content, style)]
    classes, labels = doodle.map_classes(maps, [False, False])
    names = 'content', 'style'
    return doodle.legend(classes, dict(zip(names, maps)), dict(zip(names, labels)))


def test_the_legend_tells_the_share_of_each_colour_and_nothing_odd_of_clean_maps():
    lines = legend_of([RED, RED, RED, BLUE], [RED, BLUE])
    assert [line.split() for line in lines] == [['#0000ff', 'content', '25.0%', 'style', '50.0%'],
                                                ['#ff0000', 'content', '75.0%', 'style', '50.0%']]


SEVENTEEN = [(15 * k, 255 - 15 * k, 255 * (k % 2)) for k in range(17)]


@pytest.mark.parametrize('content, style, warning', [
    ([RED], [RED, RED, GREEN], 'Colours without a counterpart: #00ff00 in the map of the style only (33.3%).'),
    ([BLUE, RED, GREEN], [RED, GREEN], 'Colours without a counterpart: #0000ff in the map of the content only (33.3%)'),
    (SEVENTEEN, [RED, GREEN], ' and 11 more.'),
    (SEVENTEEN, SEVENTEEN, 'The maps have 17 colours'),
    ([RED], [RED], 'The map of the style has a single class'),
])
def test_the_legend_warns_of_what_is_likely_a_painting_mistake_in_one_line_a_kind(content, style, warning):
    warnings = [line for line in legend_of(content, style) if 'WARNING' in line]
    assert any(warning in line for line in warnings) and all('FIX: ' in line for line in warnings)
    assert len(warnings) == 1 + (content == SEVENTEEN != style)


def test_a_content_map_of_one_class_chooses_a_part_of_the_style():
    assert not any('single class' in line for line in legend_of([RED], [RED, GREEN]))


def test_the_legend_tells_colours_that_are_taken_for_one():
    lines = legend_of([(0, 255, 1), (254, 0, 0)], [GREEN, RED])
    assert lines[2:] == ['One class, though not quite one colour in the content and the style: '
                         '#00ff01 and #00ff00, #fe0000 and #ff0000.']


# ---- modes -----------------------------------------------------------------------------------------------------------

def test_style_and_content_give_a_transfer_of_the_size_of_the_content(pictures):
    transfer = inputs('--style=face_style.png', '--content=face_content.png')
    assert transfer.size == (96, 112) == transfer.content.shape[1::-1]


def test_style_and_the_map_of_the_output_give_a_doodle_of_the_size_of_the_map(pictures):
    doodled = inputs('--style=tiny_style.png', '--output=tiny_target.png')
    assert doodled.content is None and doodled.size == (56, 64) == doodled.content_map.shape[1::-1]


def test_style_alone_gives_a_texture_of_its_size_or_of_width_x_height(pictures):  # fault 5
    assert inputs('--style=texture_style.png').size == (60, 52)
    texture = inputs('--style=texture_style.png', '--output-size=70x40')
    assert texture.size == (70, 40) and texture.content is texture.content_map is None


def test_an_output_that_exists_is_not_read_as_content(pictures):
    shutil.copy('face_content.png', 'out.png')
    before = (pictures / 'out.png').read_bytes()
    assert inputs('--style=texture_style.png', '--output=out.png').content is None
    assert (pictures / 'out.png').read_bytes() == before


@pytest.mark.parametrize('arguments', [('--style=face_style.png', '--content=face_content.png'),
                                       ('--style=tiny_style.png', '--output=tiny_target.png')])
def test_output_size_beside_a_content_or_its_map_is_refused(refused, pictures, arguments):
    assert '--output-size' in refused(*arguments, '--phases=1', '--output-size=64x64')[0]


def test_seed_content_without_a_content_is_refused(refused, pictures):
    assert '--seed=content' in refused('--style=texture_style.png', '--phases=1', '--seed=content')[0]


def test_what_is_too_small_is_refused_with_phases_that_fit(refused, pictures):  # fault 10
    problem, fix = refused('--style=face_style.png', '--content=face_content.png', '--phases=4')
    assert '96x112' in problem and 'conv4_1' in problem and fix == '--phases=3.'
    faces = doodle.parse_options(['--style=face_style.png', '--content=face_content.png', '--phases=3'])
    assert doodle.read_inputs(faces)[0].size == (96, 112)                              # 24x28: just enough

    problem, fix = refused('--style=texture_style.png', '--output-size=400x400', '--phases=3')
    assert 'style picture, 60x52' in problem and fix == '--phases=2.'
    problem, fix = refused('--style=texture_style.png', '--output-size=400x23', '--phases=1')
    assert 'result, 400x23' in problem and '--phases' not in fix
    assert '12 or more' in refused('--style=texture_style.png', '--style-layers=3_1', '--phases=99999999')[0]


def test_check_tells_maps_and_plan_of_the_run_and_begins_none(run, pictures):
    arguments = ['--check', '--style=face_style.png', '--content=face_content.png', '--phases=2', '--iterations=7']
    before = sorted(os.listdir())
    result = run('.', *arguments)
    assert sorted(os.listdir()) == before
    inputs, remarks = doodle.read_inputs(doodle.parse_options(arguments))
    (w, h), (W, H) = inputs.style.shape[1::-1], inputs.size
    assert result.returncode == 0 and not result.stderr
    assert all(line in result.stdout for line in remarks) and any('#' in line for line in remarks)
    assert f'Phase #0: {W // 2}x{H // 2}, 7 evaluations of about ' in result.stdout
    assert re.search(rf'Phase #1: {W}x{H}, 7 evaluations of about [\d.,]+ s, style patches '
                     rf'3_1 {(w // 4 - 2) * (h // 4 - 2):,}, 4_1 {(w // 8 - 2) * (h // 8 - 2):,}\n', result.stdout)
    assert re.search(r'On this CPU at most about 1 minute and 0\.\d GB', result.stdout)


# ---- what is written -------------------------------------------------------------------------------------------------

FACES = ('--style=face_style.png', '--content=face_content.png', '--seed=tiny_seed.png', '--weights=weights.npz',
         '--phases=1')


@pytest.mark.parametrize('option', ['--output', '--log'])
@pytest.mark.parametrize('read', ['face_style.png', 'face_content.png', 'face_style_sem.png', 'face_content_sem.png',
                                  'tiny_seed.png'])
def test_what_is_read_is_never_written(refused, pictures, read, option):  # fault 1
    before = (pictures / read).read_bytes()
    os.symlink(read, 'link.png')
    os.link(read, 'hard.png')
    for path in (read, f'../{pictures.name}/{read}', str(pictures / read), 'link.png', 'hard.png'):
        problem, _ = refused(*FACES, f'{option}={path}')
        assert option in problem and 'overwrite' in problem
    assert (pictures / read).read_bytes() == before


def test_the_doodle_and_the_weights_are_never_written(refused, pictures):  # fault 1
    assert 'overwrite' in refused('--style=tiny_style.png', '--output=a.png', '--log=a_sem.png')[0]
    assert 'overwrite' in refused(*FACES, '--log=weights.npz')[0]


def test_what_cannot_be_written_is_refused_before_any_work(refused, pictures):
    os.mkdir('folder.png')
    assert 'is a folder' in refused(*FACES, '--output=folder.png')[0]
    for option in ('--output=tiny_style.png/out.png', '--log=tiny_style.png/log', '--frames=tiny_style.png'):
        problem, _ = refused(*FACES, option)
        assert option.split('=')[0] in problem and 'tiny_style.png' in problem
    for log in ('a.png', 'a.png.checkpoint'):
        assert 'same file' in refused(*FACES, '--output=a.png', f'--log=../{pictures.name}/{log}')[0]


@pytest.mark.parametrize('name', ['a', 'a.txt', 'a.', '.png', 'a.h5', 'a.psd'])
def test_an_ending_that_is_no_picture_is_refused(refused, pictures, name):
    problem, fix = refused(*FACES, f'--output={name}')
    assert repr(name) in problem and '.png' in fix


def test_the_folder_of_the_result_is_made_once_a_run_writes(pictures):
    options = doodle.parse_options(['--style=texture_style.png', '--output=new/deep/out.png', '--log=other/log'])
    doodle.check_files(options, doodle.place_output(options))
    assert not os.path.exists('new') and not os.path.exists('other')
    with doodle.locked(options.output), doodle.locked(options.log):
        assert len(os.listdir('new/deep')) == len(os.listdir('other')) == 1
    assert os.listdir('new/deep') == os.listdir('other') == []


def test_a_device_or_a_pipe_is_never_replaced(refused, pictures):
    os.symlink('/dev/full', 'device.png')
    os.mkfifo('pipe.png')
    for name in ('device.png', 'pipe.png'):
        assert 'is not a file' in refused(*FACES, f'--output={name}')[0]


def test_frames_with_too_long_a_name_are_refused(refused, pictures):
    assert 'File name too long' in refused(*FACES, f'--frames={"x" * 300}')[0]


@pytest.mark.parametrize('option', ['--log', '--frames'])
@pytest.mark.parametrize('read', ['doodle.py', 'vgg16.npz', 'samples/automaps.py'])
@pytest.mark.parametrize('way', [None, os.symlink, os.link])
def test_the_program_and_its_weights_are_never_written(refused, pictures, monkeypatch, read, option, way):
    place = shutil.copytree(ROOT, pictures / 'program', ignore=lambda folder, names: [
        name for name in names if name not in ('doodle.py', 'vgg16.npz', 'samples', 'automaps.py')])
    monkeypatch.setattr(doodle, '__file__', str(place / 'doodle.py'))
    path = place / read
    if way:
        way(path, 'other')
        path = 'other'
    problem, _ = refused(*FACES, f'{option}={path}')
    assert problem.startswith(f'{option} {str(path)!r} is one of the inputs')


@pytest.mark.parametrize('arguments', [
    ['--frames=a.png'], ['--frames=log', '--log=log'], ['--output=frames/0001.png'], ['--log=frames/command.txt'],
    ['--frames=a.png.checkpoint'], ['--output=0000.png', '--frames=.'], ['--log=frames/run-2']])
def test_output_log_and_frames_are_not_each_other(refused, pictures, arguments):
    assert '--frames' in refused(*FACES, '--output=a.png', *arguments)[0]


def test_the_map_of_a_doodle_stays_where_it_is_when_the_output_finds_another_place(pictures, monkeypatch):
    os.mkdir('frames')                                                  # all that can be written in a container
    frames = os.path.abspath('frames')
    monkeypatch.setattr(doodle, 'mounts', lambda: {frames: '/'})
    monkeypatch.setattr(os, 'access', lambda path, mode: os.path.abspath(path) == frames)
    options = doodle.parse_options(['--style=tiny_style.png', '--output=tiny_target.png', '--phases=1'])
    read, _ = doodle.read_inputs(options)
    assert doodle.place_output(options).output == os.path.join(frames, 'tiny_target.png') and read.size == (56, 64)
    assert read.content_map is not None


# ---- the image that is painted ---------------------------------------------------------------------------------------

def first_image(*arguments, size=(12, 8), random_seed=1):
    options = doodle.parse_options(['--style=texture_style.png', '--semantic-weight=0', '--phases=1', *arguments])
    return doodle.first_image(doodle.read_inputs(options)[0], options, size, random_seed)


def test_noise_fills_its_range_and_its_number_repeats_it(pictures):  # fault 9
    noise = first_image('--seed-range=20:30', size=(80, 50))
    assert noise.shape == (3, 50, 80)
    assert 20 <= noise.min() < 20.1 and 29.9 < noise.max() <= 30
    assert (noise == first_image('--seed-range=20:30', size=(80, 50))).all()
    assert (noise != first_image('--seed-range=20:30', size=(80, 50), random_seed=2)).mean() > .99


def test_a_run_may_start_from_the_content_or_from_a_picture(pictures):
    for seed, method in (('content', Image.LANCZOS), ('tiny_seed.png', Image.BICUBIC)):
        source = Image.open('face_content.png' if seed == 'content' else seed)
        expected = np.asarray(source.resize((12, 8), method, reducing_gap=None))       # (H, W, 3) RGB
        image = first_image('--content=face_content.png', f'--seed={seed}')
        assert (image == expected[:, :, ::-1].transpose(2, 0, 1)).all()


@pytest.mark.parametrize('name', ['fake/default', 'fake/doodle_seed_resized', 'fake/texture', 'fake/phases2'])
def test_golden_runs_start_from_the_same_image(pictures, name):
    argv = golden_data.run(name).argv
    options = doodle.parse_options(argv)
    read = doodle.read_inputs(options)[0]
    image = doodle.first_image(read, options, doodle.phase_size(read.size, 0, options.phases), 0)
    assert (image == golden_data.images(argv).start).all()


def test_between_phases_nothing_is_stretched_or_rounded():  # fault 6
    flat = doodle.enlarged(np.full((3, 5, 4), 100.25), (9, 11))
    assert flat.shape == (3, 11, 9) and np.abs(flat - 100.25).max() < 1e-4
    x = np.random.default_rng(0).uniform(100, 101, (3, 5, 4))
    y = doodle.enlarged(x, (8, 10))
    assert 99.5 < y.min() < y.max() < 101.5 and len(np.unique(y)) > 200
    for a, b in zip(x, y):
        expected = Image.fromarray(np.float32(a)).resize((8, 10), Image.BICUBIC)
        np.testing.assert_allclose(b, np.asarray(expected), rtol=1e-6)


def test_between_phases_colours_stay_within_0_and_255():
    x = np.random.default_rng(0).choice([0., 255.], (3, 6, 6))
    assert (doodle.enlarged(x, (12, 12)).min(), doodle.enlarged(x, (12, 12)).max()) == (0, 255)


def test_the_result_is_clipped_cut_and_enlarged_as_by_the_original():
    x = np.linspace(-6, 262, 48).reshape(3, 4, 4)
    assert doodle.to_pixels(x, (4, 4)).tolist() == [
        [[176, 85, 0], [182, 90, 0], [187, 96, 5], [193, 102, 11]],
        [[199, 108, 16], [204, 113, 22], [210, 119, 28], [216, 125, 33]],
        [[222, 130, 39], [227, 136, 45], [233, 142, 51], [239, 147, 56]],
        [[244, 153, 62], [250, 159, 68], [255, 165, 73], [255, 170, 79]]]
    enlarged = doodle.to_pixels(x, (6, 7))
    assert enlarged.shape == (7, 6, 3)
    assert enlarged[0].tolist() == [[174, 83, 0], [177, 85, 0], [181, 89, 0], [184, 93, 2], [188, 98, 6], [191, 100, 9]]
    assert enlarged[6].tolist() == [[246, 155, 64], [249, 157, 67], [253, 162, 71], [255, 166, 74], [255, 170, 78],
                                    [255, 172, 81]]


# ---- colours and transparency of the content -------------------------------------------------------------------------

YIQ = np.array([[.299, .587, .114], [.5959, -.2746, -.3213], [.2115, -.5227, .3112]])


def test_kept_colours_are_the_contents_i_and_q_under_the_results_y():
    rng = np.random.default_rng(0)
    rgb, content = rng.integers(90, 166, (2, 7, 5, 3)).astype(np.uint8)                 # nothing is clipped
    result = doodle.recolored(rgb, content)
    expected = np.concatenate([rgb @ YIQ[:1].T, content @ YIQ[1:].T], axis=2) @ np.linalg.inv(YIQ).T
    assert result.dtype == np.uint8 and np.abs(result - expected).max() < .6


def test_kept_colours_are_clipped_and_need_no_change_where_there_is_none():
    content = np.uint8([[(255, 0, 0), (0, 0, 255), (12, 200, 77)]])
    assert (doodle.recolored(content, content) == content).all()
    white = doodle.recolored(np.full((1, 3, 3), 255, np.uint8), content)
    assert white[0].tolist() == [[255, 179, 179], [226, 226, 255], [137, 255, 202]]


def test_colours_without_a_content_are_refused(refused, pictures):
    assert refused('--style=face_style.png', '--keep-colors') == (
        '--keep-colors needs a content picture, whose colours are kept.', 'add --content.')


# ---- HEIC ------------------------------------------------------------------------------------------------------------

def test_heic_is_read_upright_with_its_colours_and_alpha(tmp_path, monkeypatch):
    """COLOURS and an alpha, where pillow-heif is installed, as it is with the tests' requirements."""
    monkeypatch.chdir(tmp_path)
    pixels = np.kron(COLOURS, np.ones((32, 32, 1), np.uint8))
    seen = np.kron(np.uint8([[255, 255, 255], [255, 255, 0]]), np.ones((32, 32), np.uint8))
    upright = Image.Exif()
    upright[274] = 8                                                    # a quarter turn to the left
    Image.fromarray(np.dstack([pixels, seen])).save('a.heic', quality=-1, exif=upright.tobytes())
    read = doodle.read_picture('a.heic')
    assert read.pixels.shape == (96, 64, 3) and (read.alpha[:, :, 0] == np.rot90(seen)).all()
    expected = np.where(seen[:, :, None] == 255, pixels, 255)
    assert np.abs(read.pixels - np.rot90(expected).astype(int)).max() <= 3
    assert doodle.orientation('a.heic') in (None, 1)                    # its pixels are turned already


def test_heic_names_what_reads_it(tmp_path, monkeypatch, refused):
    Image.new('RGB', (64, 64)).save('a.heic')
    monkeypatch.delitem(Image.OPEN, 'HEIF')
    monkeypatch.setitem(sys.modules, 'pillow_heif', None)
    problem, fix = refused('--style=a.heic')
    assert problem == "'a.heic' is a HEIC picture, and the package that reads these, pillow-heif, is missing."
    assert fix == 'save it as JPEG, or pip install pillow-heif.'
