"""Semantic maps as people bring them: what is one class, what is a blend, which file is the map and how it lies."""
import io
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

import doodle
from conftest import first_quick

doodle.import_pillow()

SAMPLES = Path(__file__).resolve().parents[1] / 'samples'
RED, GREEN, BLUE, BLACK, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0), (255, 255, 255)
PURPLE, SKIN, HAIR, LIP = (128, 0, 128), (255, 160, 120), (60, 30, 10), (158, 95, 65)     # LIP is between SKIN and HAIR
FIVE = (250, 240, 10), (20, 30, 240), (220, 20, 40), (20, 200, 60), (230, 230, 240)       # far apart, to a cosine too


# ---- maps, and what happens to them ----------------------------------------------------------------------------------

def sample(name):
    """A painted map of ten parts, (480, 384, 3)."""
    return np.asarray(Image.open(SAMPLES / f'{name}_sem.png').convert('RGB'))


def drawn(draw, supersampling=1, size=(200, 160), ground=SKIN):
    """What `draw` paints on a canvas, where lengths are multiplied by its second argument; smooth by supersampling."""
    image = Image.new('RGB', (size[0] * supersampling, size[1] * supersampling), ground)
    draw(ImageDraw.Draw(image), supersampling)
    return np.asarray(image.resize(size, Image.BOX))


def shapes(colours, seed, supersampling=4):
    """Ellipses and polygons in these colours."""
    rng = np.random.default_rng(seed)

    def draw(d, s):
        for colour in colours[1:]:
            (x, y), (w, h) = s * rng.uniform(0, 150, 2), s * rng.uniform(50, 90, 2)
            if rng.random() < 0.5:
                d.ellipse([x, y, x + w, y + h], fill=colour)
            else:
                d.polygon([(x, y), (x + w, y + h * .3), (x + w * .6, y + h), (x + w * .1, y + h * .8)], fill=colour)
    return drawn(draw, supersampling, (240, 220), colours[0])


def halves(left, right):
    return np.repeat(np.repeat(np.uint8([[left, right]]), 60, axis=1), 90, axis=0)


def brow(thick, between=None):
    """Hair above skin, with a brow, and maybe a line as thick between hair and skin."""
    def draw(d, s):
        d.rectangle([0, 0, 200 * s, 50 * s - 1], fill=HAIR)
        d.rectangle([40 * s, 80 * s, 80 * s, (80 + thick) * s - 1], fill=BLUE)
        if between:
            d.rectangle([0, 50 * s, 200 * s, (50 + thick) * s - 1], fill=between)
    return draw


def island(d, s):
    """Red beside blue, and where they meet an area of its own between the two."""
    d.rectangle([0, 0, 100 * s, 160 * s], fill=RED)
    d.rectangle([100 * s, 0, 200 * s, 160 * s], fill=BLUE)
    d.ellipse([90 * s, 40 * s, 130 * s, 90 * s], fill=PURPLE)


def outlined(d, s):
    d.rectangle([20 * s, 20 * s, 90 * s, 120 * s], fill=RED, outline=BLACK)
    d.ellipse([100 * s, 30 * s, 180 * s, 130 * s], fill=BLUE, outline=BLACK)


def ramp(width, flat=60):
    """From red to blue over so many pixels."""
    t = np.clip((np.arange(width + 2 * flat) - flat) / width, 0, 1)[:, None]
    return np.uint8(np.round((1 - t) * RED + t * BLUE))[None].repeat(80, axis=0)


def encoded(format, **how):
    """A map as it comes back from a file that is lossy."""
    def saved(colours):
        file = io.BytesIO()
        Image.fromarray(colours).save(file, format, **how)
        return np.asarray(Image.open(file).convert('RGB'))
    return saved


def scaled(factor, method):
    return lambda colours: np.asarray(Image.fromarray(colours).resize(
        [round(side * factor) for side in colours.shape[1::-1]], method))


def soft(sigma):
    return lambda colours: np.asarray(Image.fromarray(colours).filter(ImageFilter.GaussianBlur(sigma)))


def noisy(amplitude):
    rng = np.random.default_rng(0)
    return lambda colours: np.uint8(np.clip(rng.integers(-amplitude, amplitude + 1, colours.shape) + colours, 0, 255))


def alike(found, expected):
    """Whether two sets of colours are the same but for `NEAR`, one to one."""
    distances = np.linalg.norm(np.array(found)[:, None] - np.array(expected, float), axis=2)
    near = distances <= doodle.NEAR
    return len(found) == len(expected) and (near.sum(axis=0) == 1).all() and (near.sum(axis=1) == 1).all()


def colours_of(colours):
    return np.unique(colours.reshape(-1, 3), axis=0)


# ---- one class or two ------------------------------------------------------------------------------------------------

TEN = colours_of(sample('hopper'))
JPEG75, JPEG90 = encoded('JPEG', quality=75), encoded('JPEG', quality=90)
MAPS = {
    # what                           maps                                                        the colours that count
    'slips of a brush':              ([halves((0, 255, 1), (254, 0, 0)), halves(GREEN, RED)], [GREEN, RED]),
    'slips within a map':            ([np.vstack([halves(RED, BLUE), halves((250, 9, 3), (3, 8, 240))])], [RED, BLUE]),
    'near-blacks':                   ([np.vstack([halves(BLACK, RED), halves((1, 1, 0), RED)]), halves((0, 2, 1), RED)],
                                      [BLACK, RED]),
    'at the distance':               ([halves(RED, (255, doodle.NEAR, 0))], [RED]),
    'beyond the distance':           ([halves(RED, (255, doodle.NEAR + 1, 0))], [RED, (255, doodle.NEAR + 1, 0)]),
    'no chains':                     ([np.hstack([halves((0, 0, 0), (20, 0, 0)), halves((40, 0, 0), (60, 0, 0)),
                                                  halves((0, 0, 0), (40, 0, 0))])], [(0, 0, 0), (40, 0, 0)]),
    'one is a JPEG':                 ([JPEG75(sample('hopper')), sample('astronaut')], TEN),
    'both are JPEGs':                ([JPEG75(sample('hopper')), JPEG75(sample('astronaut'))], TEN),
    'JPEGs of 90':                   ([JPEG90(sample('hopper')), JPEG90(sample('astronaut'))], TEN),
    'a JPEG of 50':                  ([encoded('JPEG', quality=50)(sample('hopper')), sample('astronaut')], TEN),
    'a JPEG with all its chroma':    ([encoded('JPEG', quality=85, subsampling=0)(sample('hopper'))], TEN),
    'straight edges in a JPEG':      ([JPEG75(halves(GREEN, RED)), halves(GREEN, RED)], [GREEN, RED]),
    'yellow beside blue in a JPEG':  ([JPEG75(halves((255, 255, 0), BLUE))], [(255, 255, 0), BLUE]),
    'lossy WebP':                    ([encoded('WEBP', quality=75)(sample('hopper')), sample('astronaut')], TEN),
    'noise':                         ([noisy(8)(sample('hopper')), sample('astronaut')], TEN),
    'anti-aliased':                  ([shapes(FIVE, 1), shapes(FIVE, 2)], FIVE),
    'anti-aliased, then a JPEG':     ([JPEG75(shapes(FIVE, 1)), JPEG75(shapes(FIVE, 2))], FIVE),
    'enlarged':                      ([scaled(2, Image.BILINEAR)(sample('hopper'))], TEN),
    'enlarged with overshoot':       ([scaled(3.3, Image.LANCZOS)(sample('hopper'))], TEN),
    'reduced':                       ([scaled(.5, Image.BICUBIC)(sample('hopper'))], TEN),
    'soft brush':                    ([soft(1)(sample('hopper')), sample('astronaut')], TEN),
    'very soft brush':               ([soft(4)(shapes(FIVE, 1)), shapes(FIVE, 2)], FIVE),
    'ramp':                          ([ramp(200)], [RED, BLUE]),
    'ramp slower than its values':   ([ramp(1000, 300)], [RED, BLUE]),
    'ramp over most of the map':     ([ramp(600, 30)], [RED, BLUE]),
    'ramp, and its middle painted':  ([np.vstack([ramp(200), np.full((60, 320, 3), PURPLE, np.uint8)])],
                                      [RED, BLUE, PURPLE]),
    'thin brow':                     ([drawn(brow(2))], [SKIN, HAIR, BLUE]),
    'very thin brow':                ([drawn(brow(1))], [SKIN, HAIR, BLUE]),
    'thin brow, anti-aliased':       ([drawn(brow(2), 4)], [SKIN, HAIR, BLUE]),
    'thin part between in colour':   ([drawn(brow(2, LIP))], [SKIN, HAIR, BLUE, LIP]),
    'line of a pixel between':       ([drawn(brow(1, LIP))], [SKIN, HAIR, BLUE]),
    'midway, with an area':          ([drawn(island)], [RED, BLUE, PURPLE]),
    'the same, anti-aliased':        ([drawn(island, 4)], [RED, BLUE, PURPLE]),
    'the same, soft':                ([soft(2)(drawn(island))], [RED, BLUE, PURPLE]),
    'the same, a JPEG':              ([JPEG75(drawn(island))], [RED, BLUE, PURPLE]),
    'outlines':                      ([drawn(outlined)], [SKIN, RED, BLUE, BLACK]),
    'one colour':                    ([np.full((9, 9, 3), RED, np.uint8)], [RED]),
    'four pixels':                   ([np.uint8([[RED, BLUE], [PURPLE, WHITE]])], [RED, BLUE, PURPLE, WHITE]),
    'one pixel':                     ([np.uint8([[RED]])], [RED]),
    'chequered by pixels':           ([np.kron(np.indices((8, 8)).sum(axis=0) % 2, np.ones((1, 1)))[:, :, None]
                                       .repeat(3, axis=2).astype(np.uint8) * 255], [BLACK, WHITE]),
}


@pytest.mark.parametrize('kind', first_quick(list(MAPS), 16))
def test_what_is_a_class(kind):  # fault 4
    maps, expected = MAPS[kind]
    classes, labels = doodle.map_classes(maps, [False] * len(maps))
    assert alike(classes, expected)
    assert [label.shape for label in labels] == [colours.shape[:2] for colours in maps]
    for colours, label in zip(maps, labels):                            # what has one of the colours is of its class
        distances = np.linalg.norm(colours[:, :, None] - classes, axis=3)                   # (H, W, K)
        near = distances.min(axis=2) <= 2
        assert (distances.argmin(axis=2) == label)[near & doodle.even_pixels(colours, 2)].all()


def test_a_photograph_is_no_map_and_is_told_so():
    photo = np.asarray(Image.open(SAMPLES / 'astronaut.png').convert('RGB'))[100:400]
    classes, labels = doodle.map_classes([photo], [False])
    assert 16 < len(classes) <= 64
    assert any('colours. FIX: a few large parts' in line
               for line in doodle.legend(classes, {'style': photo}, dict(style=labels[0])))


@pytest.mark.parametrize('seed', range(5))
def test_whatever_lies_in_a_map_has_a_class(seed):
    rng = np.random.default_rng(seed)
    colours = rng.integers(0, 256, (rng.integers(1, 40), rng.integers(1, 40), 3), dtype=np.uint8)
    classes, labels = doodle.map_classes([colours, colours[::-1]], [False, False])
    assert len(classes) and all(0 <= label.min() and label.max() < len(classes) for label in labels)


@pytest.mark.parametrize('change', [soft(2), scaled(2, Image.BICUBIC), JPEG75])
def test_a_blend_belongs_to_the_nearer_side_and_to_no_third_class(change):  # fault 4
    """Where red meets blue the blend passes purple, which is another part elsewhere."""
    clean = np.vstack([halves(RED, BLUE), np.full((20, 120, 3), PURPLE, np.uint8)])
    colours = change(clean)
    classes, (labels,) = doodle.map_classes([colours], [False])
    border = labels[10:colours.shape[0] * 60 // 110]                    # of red and blue only
    assert alike(classes, [RED, BLUE, PURPLE])
    assert not np.isin(border, np.flatnonzero(np.abs(classes - PURPLE).max(axis=1) < 9)).any()
    assert (np.diff(border, axis=1) != 0).sum(axis=1).max() == 1        # one side, then the other
    switch = (np.diff(border, axis=1) != 0).argmax(axis=1) + 1
    assert np.abs(switch - colours.shape[1] / 2).max() <= 1


def test_five_anti_aliased_colours_keep_the_scores_of_the_original():  # fault 4
    maps = [shapes(FIVE, 1), shapes(FIVE, 2)]
    channels, remark = doodle.map_channels(maps, *doodle.map_classes(maps, [False, False]))
    assert remark is None and channels == maps


@pytest.mark.parametrize('blacks', [[BLACK], [(1, 0, 0), (0, 0, 1)], [(2, 2, 2), BLACK]])
def test_near_blacks_match_each_other(blacks):  # fault 4
    maps = [halves(blacks[0], RED), halves(blacks[-1], RED)]
    (here, there), remark = doodle.map_channels(maps, *doodle.map_classes(maps, [False, False]))
    assert remark.startswith('2 ') and (here == there).all() and (here[0, 0] @ here[0, -1].astype(int) == 0)


def test_a_map_and_its_jpeg_have_the_same_parts():
    maps = [sample('hopper'), JPEG90(sample('hopper'))]
    classes, (clean, lossy) = doodle.map_classes(maps, [False, False])
    assert (clean == lossy).mean() > 0.995
    inside = doodle.even_pixels(maps[0], 0)
    parts = [(clean == lossy)[inside & (clean == k)].mean() for k in range(len(classes))]
    assert min(parts) > 0.85                                            # a brow is four pixels high


# ---- index maps ------------------------------------------------------------------------------------------------------

def index_map(levels, thin=()):
    """Tiles of these grey levels, and lines of a pixel in the thin ones."""
    grey = np.kron(np.resize(levels, (3, 4)), np.ones((12, 12), int))
    for k, level in enumerate(thin):
        grey[3 + 12 * k] = level
    return np.repeat(np.uint8(grey)[:, :, None], 3, axis=2)


@pytest.mark.parametrize('levels, thin', [
    (range(12), []), ([0, 1, 255], []), (range(0, 120, 10), []), (range(0, 120, 10), [33, 77]), ([0, 5, 200], [6]),
    ([1, 17, 2, 16, 3, 15, 4, 14], [18])])
def test_levels_of_an_index_map_are_classes_however_near(levels, thin):  # fault 4
    colours = index_map(list(levels), thin)
    assert doodle.is_index_map(colours)
    classes, (labels,) = doodle.map_classes([colours], [True])
    assert classes[:, 0].tolist() == sorted({*levels, *thin}) and (classes[labels] == colours).all()
    channels, remark = doodle.map_channels([colours], classes, [labels])
    assert remark.startswith(f'{len(classes)} ') and channels[0].shape[2] == len(classes)


@pytest.mark.parametrize('colours', [
    halves(BLACK, WHITE),                                               # no two levels are near
    soft(2)(halves(BLACK, WHITE)), soft(1)(halves((20, 20, 20), (160, 160, 160))),
    shapes([BLACK, WHITE], 1), shapes([(30, 30, 30), (200, 200, 200), (90, 90, 90)], 2),    # anti-aliased
    scaled(3, Image.BILINEAR)(shapes([BLACK, WHITE], 1, 1)), JPEG75(shapes([BLACK, WHITE], 1, 1)),
    JPEG90(shapes([BLACK, WHITE], 1, 1)), noisy(3)(halves((9, 9, 9), WHITE)),
    index_map(range(12)) + np.uint8([0, 0, 1]),                         # not grey
])
def test_painted_greys_are_no_index_map(colours):  # fault 4
    assert not doodle.is_index_map(colours)


def test_the_levels_of_an_index_map_pair_only_exactly():
    a, b = index_map([0, 1, 2, 3]), index_map([1, 2, 4])
    classes, (here, there) = doodle.map_classes([a, b], [True, True])
    assert len(classes) == 5 and (classes[there] == b).all()
    painted = halves((1, 2, 2), (4, 4, 4))                              # beside a map that is painted, too
    classes, (here, there) = doodle.map_classes([a, painted], [True, False])
    assert len(classes) == 5 and not set(here.ravel()) & set(there.ravel())


# ---- files -----------------------------------------------------------------------------------------------------------

@pytest.fixture
def files(tmp_path, monkeypatch):
    """me.png and you.png, 48x40, in the folder where we are; their maps are to be written."""
    monkeypatch.chdir(tmp_path)
    for name in ('me', 'you'):
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 48, 3), np.uint8)).save(f'{name}.png')
    return tmp_path


def read(*arguments):
    return doodle.read_inputs(doodle.parse_options(
        ['--content=me.png', '--style=you.png', '--phases=1', *arguments]))


LABELS = np.kron(np.arange(10).reshape(2, 5), np.ones((20, 10), int))[:, :48]               # (40, 48)


def deep(dtype, factor=1, offset=0):
    return Image.fromarray((LABELS * factor + offset).astype(dtype))


PALETTE = Image.fromarray(np.uint8(LABELS), 'P')
PALETTE.putpalette([7 * k % 256 for k in range(768)])
LABEL_FILES = {
    'L': (deep(np.uint8), 'png'), 'I;16': (deep(np.uint16), 'png'), 'I;16 TIFF': (deep(np.uint16), 'tiff'),
    'I': (deep(np.int32), 'tiff'), 'F': (deep(np.float32), 'tiff'), 'LA': (deep(np.uint8).convert('LA'), 'png'),
    'RGB': (deep(np.uint8).convert('RGB'), 'png'), '257 times': (deep(np.uint16, 257), 'png'),
}


@pytest.mark.parametrize('kind', LABEL_FILES)
def test_labels_mean_the_same_in_every_mode(files, kind):  # fault 3
    deep(np.uint8).save('you_sem.png')
    deep(np.uint8).save('me_sem.png')
    expected, _ = read()
    image, ending = LABEL_FILES[kind]
    os.remove('me_sem.png')
    image.save(f'me_sem.{ending}')
    found, _ = read()
    assert expected.content_map.shape[2] == 10
    assert (found.content_map == expected.content_map).all() and (found.style_map == expected.style_map).all()


@pytest.mark.parametrize('values, expected', [
    (lambda k: 1000 * k, range(10)),                                    # labels in words, numbered
    (lambda k: k - 3, range(10)),                                       # signed ones
    (lambda k: k / 9, range(10)),                                       # fractions
    (lambda k: 70000 * k, range(10)),
])
def test_other_values_are_labels_numbered_by_value(files, values, expected):  # fault 3
    levels = np.array([values(k) for k in range(10)])
    image = Image.fromarray(levels[LABELS].astype(np.int32 if levels.dtype == int else np.float32))
    (colours,), (numbered,) = doodle.map_pixels([image])
    assert numbered and (colours[:, :, 0] == LABELS).all()


def test_labels_are_numbered_over_both_maps_together():
    words = np.uint16([[0, 1000, 3000]]), np.uint16([[1000, 2000, 3000]])
    maps, numbered = doodle.map_pixels([Image.fromarray(each) for each in words])
    assert [colours[0, :, 0].tolist() for colours in maps] == [[0, 1, 3], [1, 2, 3]] and numbered == [True, True]


@pytest.mark.parametrize('values, expected', [
    (np.uint16(np.arange(65536).reshape(256, 256)), lambda v: v / 257),
    (np.float32(np.arange(1000).reshape(10, 100) / 999), lambda v: v * 255)])
def test_more_values_than_labels_are_scaled(values, expected):  # fault 3
    (colours,), (numbered,) = doodle.map_pixels([Image.fromarray(values)])
    assert not numbered and np.abs(colours[:, :, 0] - expected(values.astype(float))).max() <= 0.5 + 1e-3


def test_greys_that_are_no_numbers_are_refused(files, refused):
    Image.fromarray(np.where(LABELS == 3, np.nan, LABELS).astype(np.float32)).save('me_sem.tif')
    deep(np.uint8).save('you_sem.png')
    assert 'no finite numbers' in refused('--content=me.png', '--style=you.png', '--phases=1')[0]


def test_a_palette_means_its_colours(files):  # fault 3
    for name in ('me', 'you'):
        PALETTE.save(f'{name}_sem.png')
    found, remarks = read()
    assert any('#00070e' in line for line in remarks) and any('#15 1c23'.replace(' ', '') in line for line in remarks)


def two_maps(content='me_sem.png', style='you_sem.png', colours=(RED, BLUE), size=(48, 40)):
    for path in (content, style):
        Image.fromarray(halves(*colours)).resize(size, Image.NEAREST).save(path)


@pytest.mark.parametrize('name', ['me_sem.jpg', 'me_sem.PNG', 'me_sem.webp', 'me_sem.TIFF', 'me_sem.bmp'])
def test_a_map_with_another_ending_is_used_and_named(files, name):
    two_maps(name)
    found, remarks = read()
    assert found.content_map is not None and any(f'Adding `{name}`' in line for line in remarks)


def test_of_several_maps_png_wins_and_the_others_are_named(files):
    two_maps('me_sem.jpg')
    two_maps('me_sem.webp', colours=(GREEN, BLUE))
    two_maps(colours=(WHITE, RED))
    shutil.copy('me_sem.png', 'me_sem.xcf')
    found, remarks = read()
    assert (found.content_map[0, 0] == WHITE).all()
    assert 'Adding `me_sem.png` as semantic map, and not `me_sem.webp`, `me_sem.jpg`.' in remarks
    os.remove('me_sem.png')
    assert 'Adding `me_sem.webp` as semantic map, and not `me_sem.jpg`.' in read()[1]


def test_a_picture_is_never_its_own_map(files):
    two_maps()
    for ending in ('.none', '.jpg'):
        assert read(f'--semantic-ext={ending}')[0].content_map is None


def test_a_map_with_another_ending_counts_as_painted_for_automatic_maps(files):
    two_maps('me_sem.jpg')
    os.remove('you_sem.png')
    assert doodle.import_automaps().missing_maps(doodle.parse_options(
        ['--content=me.png', '--style=you.png', '--auto-maps=4'])) == ['you_sem.png']


def test_a_map_with_another_ending_is_never_written(files, refused):  # fault 1
    two_maps('me_sem.webp')
    assert 'overwrite' in refused('--content=me.png', '--style=you.png', '--output=me_sem.webp', '--phases=1')[0]


def test_two_pictures_that_would_share_a_map_are_refused(files, refused):
    shutil.copy('me.png', 'you.jpg')
    two_maps('you_sem.png')
    arguments = '--content=you.jpg', '--style=you.png', '--phases=1'
    problem, fix = refused(*arguments)
    assert all(name in problem for name in ("'you.jpg'", "'you.png'", "'you_sem.png'")) and 'rename' in fix
    doodle.read_inputs(doodle.parse_options([*arguments, '--semantic-weight=0']))           # which reads none
    doodle.read_inputs(doodle.parse_options(['--content=you.png', '--style=you.png', '--phases=1']))
    os.remove('you_sem.png')
    doodle.read_inputs(doodle.parse_options([*arguments]))


@pytest.mark.parametrize('picture, size', [((160, 200), (158, 200)), ((150, 210), (152, 208)), ((160, 200), (128, 160)),
                                           ((160, 200), (80, 103))])
def test_a_map_may_be_of_nearly_the_proportions(files, picture, size):
    Image.new('RGB', picture, 'red').save('me.png')
    two_maps()
    Image.fromarray(halves(RED, BLUE)).resize(size, Image.NEAREST).save('me_sem.png')
    assert read()[0].content_map.shape[1::-1] == picture


def test_a_map_of_other_proportions_is_told_the_size(files, refused):
    Image.new('RGB', (160, 200), 'red').save('me.png')
    two_maps()
    Image.fromarray(halves(RED, BLUE)).resize((128, 128), Image.NEAREST).save('me_sem.png')
    problem, fix = refused('--content=me.png', '--style=you.png', '--phases=1')
    assert '128x128' in problem and '160x200' in problem and '160x200' in fix and 'nearest' in fix


def turned_photograph(size, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new('RGB', size, 'red').save('me.png', exif=exif)


def test_a_photograph_turned_by_exif_and_a_map_as_the_sensor_lies_are_told_so(files, refused):
    turned_photograph((60, 40), 6)                                      # upright it is 40x60
    two_maps(size=(60, 40))
    problem, fix = refused('--content=me.png', '--style=you.png', '--phases=1')
    assert 'turned by EXIF' in problem and '60x40' in problem and '40x60' in problem and 'turn the map' in fix
    Image.fromarray(halves(RED, BLUE)).resize((40, 60), Image.NEAREST).save('me_sem.png')
    Image.fromarray(halves(RED, BLUE)).resize((48, 40), Image.NEAREST).save('you_sem.png')
    assert not any('EXIF' in line for line in read()[1])


@pytest.mark.parametrize('size, orientation, warned', [((48, 48), 6, 1), ((48, 40), 3, 1), ((48, 48), 1, 0)])
def test_where_the_size_does_not_tell_how_a_map_lies_a_line_does(files, size, orientation, warned):
    turned_photograph(size, orientation)
    two_maps(size=size)
    Image.fromarray(halves(RED, BLUE)).resize((48, 40), Image.NEAREST).save('you_sem.png')
    lines = [line for line in read()[1] if 'turned by EXIF' in line]
    assert len(lines) == warned and all('FIX: ' in line for line in lines)


def test_the_transparent_part_of_a_map_is_told(files):
    two_maps()
    image = Image.open('me_sem.png').convert('RGBA')
    image.paste((255, 0, 0, 0), (0, 0, 48, 4))
    image.save('me_sem.png')
    lines = [line for line in read()[1] if 'transparent' in line]
    assert len(lines) == 1 and "10% of 'me_sem.png'" in lines[0] and 'FIX: ' in lines[0]


def test_warnings_are_one_line_a_kind(files):
    rng = np.random.default_rng(0)
    for name in ('me', 'you'):
        colours = np.kron(rng.integers(0, 6, (8, 8, 3)) * 51, np.ones((5, 6, 1), int))
        Image.fromarray(np.uint8(colours)).save(f'{name}_sem.png')
    warnings = [line for line in read()[1] if 'WARNING' in line]
    assert len(warnings) == 2 and ' more. FIX' in warnings[0] and max(map(len, warnings)) < 400
