"""The map painter in a real browser: what is painted is what is saved, and what the program reads."""
import re
import shutil
import time

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from conftest import ROOT

pytestmark = pytest.mark.slow
PAGE = ROOT / 'samples/painter.html'
BLUE, SKIN, EYES = (0, 0, 255), (255, 147, 0), (255, 255, 255)
SMALL = 120, 80                                                         # width and height of most pictures here


class Page:
    """The painter in a tab, and a folder of pictures that it opens and of what it saves."""

    def __init__(self, driver, folder):
        self.driver, self.folder, self.run = driver, folder, driver.execute_script

    def find(self, selector):
        return self.driver.find_element('css selector', selector)

    def wait(self, condition):
        end = time.monotonic() + 20
        while not (found := condition()):
            assert time.monotonic() < end, self.said()
            time.sleep(0.02)
        return found

    def said(self):
        return self.run("return $('said').textContent")

    def picture(self, name, size=SMALL, **options):
        """Write a picture, a ramp in which every place differs."""
        x, y = np.meshgrid(*(np.linspace(0, 255, n).astype(np.uint8) for n in size))
        Image.fromarray(np.dstack([x, y, 255 - x])).save(self.folder / name, **options)
        return name

    def open(self, *names):
        self.run("say('')")
        self.find('#files').send_keys('\n'.join(str(self.folder / name) for name in names))
        self.wait(lambda: self.said() not in ('', 'Opening…'))
        self.run('return new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))')
        return self.said()

    def labels(self, side=0):
        """The names of the parts, and the labels of a map, (H, W)."""
        names, labels, w = self.run('const side = sides[arguments[0]]; return [parts.map(part => part && part.name), '
                                    'Array.from(side.labels), side.w]', side)
        return names, np.reshape(labels, (-1, w))

    def painted(self, name, side=0):
        names, labels = self.labels(side)
        return labels == names.index(name)

    def screen(self, x, y, side=0):
        """Where a place of a picture is in the window."""
        return [round(value) for value in self.run(
            'const side = sides[arguments[0]], {left, top} = side.marks.getBoundingClientRect();'
            'return [left + (arguments[1] * side.scale + side.left) / devicePixelRatio,'
            '        top + (arguments[2] * side.scale + side.top) / devicePixelRatio]', side, x, y)]

    def drag(self, *places, side=0, click=False, button=0, shift=False):
        """Press the button at the first place, move on through the others, and let go; or click at each."""
        from selenium.webdriver import ActionChains, Keys
        actions = ActionChains(self.driver, duration=0)
        pointer = actions.w3c_actions.pointer_action
        for k, place in enumerate(places):
            pointer.move_to_location(*self.screen(*place, side=side))
            if click or k == 0:
                pointer.pointer_down(button)
            if click:
                pointer.pointer_up(button)
        if not click:
            pointer.pointer_up(button)
        if shift:
            ActionChains(self.driver).key_down(Keys.SHIFT).perform()
        actions.perform()
        if shift:
            ActionChains(self.driver).key_up(Keys.SHIFT).perform()

    def keys(self, *keys, control=False, shift=False):
        from selenium.webdriver import ActionChains, Keys
        actions = ActionChains(self.driver)
        held = [key for key, wanted in ((Keys.CONTROL, control), (Keys.SHIFT, shift)) if wanted]
        for key in held:
            actions.key_down(key)
        actions.send_keys(*(getattr(Keys, key, key) for key in keys))
        for key in held:
            actions.key_up(key)
        actions.perform()

    def brush(self, size):
        while (now := self.run('return brushSize()')) != size:
            self.keys(']' if now < size else '[')

    def save(self, name, side=1):
        path = self.folder / name
        path.unlink(missing_ok=True)
        self.find(f'.side:nth-of-type({side}) .save').click()
        self.wait(path.exists)
        return Image.open(path)


@pytest.fixture
def page(browser, tmp_path):
    browser.execute_cdp_cmd('Browser.setDownloadBehavior', {'behavior': 'allow', 'downloadPath': str(tmp_path)})
    browser.get('about:blank')
    browser.get(PAGE.as_uri())
    yield Page(browser, tmp_path)
    assert [line for line in browser.get_log('browser') if 'Content Security' not in line['message']] == []
    browser.execute_script('onbeforeunload = null')


def rows_and_columns():
    return np.mgrid[:SMALL[1], :SMALL[0]] + 0.5                         # centres of the pixels


def test_what_is_painted_is_saved_and_read_with_its_shares(page, run):
    exif = Image.Exif()
    exif[0x112] = 3                                                     # upside down
    for number, name in enumerate(('me', 'you'), 1):
        page.open(page.picture(f'{name}.jpg', **({'exif': exif} if number == 2 else {})))
        page.keys('2', 'b')
        page.brush(16)
        page.drag((20, 20), (60, 20), (60, 60), side=number - 1)
        page.keys('3')
        page.brush(1)
        page.drag((5.5, 70.5), (114.5, 70.5), side=number - 1)
        page.drag((5.5, 72.5), side=number - 1)
        page.drag((5.5, 78.5), (114.5, 78.5), side=number - 1)
        page.keys('z', control=True)
    saved = page.save('me_sem.png'), page.save('you_sem.png', 2)
    assert page.said() == 'Saved you_sem.png: it belongs beside you.jpg.'

    y, x = rows_and_columns()
    ways = np.minimum(np.hypot(x - np.clip(x, 20, 60), y - 20), np.hypot(x - 60, y - np.clip(y, 20, 60)))
    for image in saved:
        assert image.size == SMALL and image.mode == 'P' and set(image.info) <= {'doodle parts', 'exif'}
        assert image.getexif()[0x112] == 1 and not image.has_transparency_data
        pixels = np.asarray(image.convert('RGB'))
        assert {tuple(colour) for colour in pixels.reshape(-1, 3).tolist()} == {BLUE, SKIN, EYES}
        skin = (pixels == SKIN).all(axis=2)
        assert skin[ways < 7.2].all() and not skin[ways > 8.8].any()    # places on the screen are whole pixels
        thin = (pixels == EYES).all(axis=2)
        assert thin.sum() == 111 and thin[70, 5:115].all() and thin[72, 5]

    checked = run(page.folder, '--style=you.jpg', '--content=me.jpg', '--check', '--network=vgg16', '--phases=1')
    assert checked.returncode == 0 and 'WARNING: ' not in checked.stdout + checked.stderr
    shares = re.findall(r'#(\w+) +content +([\d.]+)% +style +([\d.]+)%', checked.stdout)
    total = SMALL[0] * SMALL[1]
    expected = {'0000ff': 1 - (skin.sum() + 111) / total, 'ff9300': skin.sum() / total, 'ffffff': 111 / total}
    assert len(shares) == 3
    for colour, content, style in shares:
        assert content == style == f'{expected[colour]:.1%}'[:-1]


@pytest.mark.parametrize('size', [1, 2, 3, 8, 51])
def test_the_brush_paints_the_pixels_whose_centres_it_covers(page, size):
    page.open(page.picture('me.png'))
    page.brush(size)
    start, end = (np.array(place) + size % 2 / 2 for place in ((30, 30), (70, 50)))     # of odd sizes centres of pixels
    page.run('const stroke = beginStroke(active, 1, [0, 0]); line(stroke, ...arguments); endStroke(stroke)',
             (start + 0.3).tolist(), (end + 0.3).tolist())
    places = np.stack(rows_and_columns()[::-1], axis=2)                 # (H, W, 2)
    along = np.clip(((places - start) @ (end - start)) / ((end - start) @ (end - start)), 0, 1)
    ways = np.linalg.norm(places - start - along[:, :, None] * (end - start), axis=2)
    skin, r = page.painted('skin'), size / 2                            # half circles have 24 sides
    assert skin[ways < 0.997 * r].all() and not skin[ways > r + 1e-9].any() and skin.any()


def test_undo_and_redo_go_back_and_forth_over_all_that_was_done(page):
    page.open(page.picture('me.png'))
    page.keys('2')
    states, steps = [page.labels()[1]], [
        lambda: page.drag((20, 20), (60, 20)), lambda: page.drag((60, 10), (60, 60)), lambda: page.keys('g'),
        lambda: page.drag((5, 5)), lambda: page.keys('e'), lambda: page.drag((30, 30), (80, 30))]
    for step in steps:
        step()
        if (page.labels()[1] != states[-1]).any():
            states.append(page.labels()[1])
    assert len(states) == 5
    for key, order in (('z', states[-2::-1]), ('y', states[1:])):
        for state in order:
            page.keys(key, control=True)
            assert (page.labels()[1] == state).all()
        page.keys(key, control=True)                                    # no more steps
        assert (page.labels()[1] == order[-1]).all()
    assert not page.find('#undo').get_property('disabled') and page.find('#redo').get_property('disabled')


def test_a_saved_map_is_opened_again_with_its_names_and_colours(page):
    page.open(page.picture('me.png'))
    page.find('#add').click()
    page.drag((20, 20), (60, 20))
    page.run("document.querySelector('.chosen [type=text]').select()")
    page.keys('hat “é”', 'ENTER')
    page.wait(lambda: 'hat “é”' in page.labels()[0])
    before, colours = page.labels(), page.run('return parts.map(part => part.colour)')
    page.save('me_sem.png')
    page.driver.get(PAGE.as_uri())
    assert page.open('me_sem.png', 'me.png') == 'me_sem.png: 2 parts.'
    assert page.labels()[0] == before[0] and (page.labels()[1] == before[1]).all()
    assert page.run('return parts.map(part => part.colour)') == colours


def test_polygon_by_corners_freely_and_by_keys(page):
    page.open(page.picture('me.png'))
    page.keys('2', 'l')
    y, x = rows_and_columns()
    inside = (x > 20) & (x < 80) & (y > 10) & (y < 50)
    corners = (20, 10), (80, 10), (80, 50), (20, 50)
    page.drag(*corners, click=True)
    page.keys('BACK_SPACE')
    page.drag((20, 50), click=True)
    page.keys('ENTER')
    near = (abs(x - 20) < 1) | (abs(x - 80) < 1) | (abs(y - 10) < 1) | (abs(y - 50) < 1)
    assert (page.painted('skin') == inside)[~near].all()
    page.keys('z', control=True)
    page.drag(*corners, (20, 10), click=True)                           # the first corner closes it
    assert (page.painted('skin') == inside)[~near].all()
    page.keys('3')
    page.drag(*((60 + 20 * np.cos(t), 40 + 20 * np.sin(t)) for t in np.arange(0, 6.2, 0.3)))
    way = np.hypot(x - 60, y - 40)
    assert page.painted('eyes')[way < 18].all() and not page.painted('eyes')[way > 21].any()
    page.drag((5, 5), click=True)
    page.keys('ESCAPE', 'ENTER')
    assert not page.run('return active.corners.length')


def test_fill_eraser_and_picker(page):
    page.open(page.picture('me.png'))
    page.keys('2', 'b')
    page.brush(4)
    page.drag((60, 0), (60, 80))
    page.drag((0, 40), (119, 40))
    page.keys('3', 'g')
    page.drag((10, 10))
    assert page.painted('eyes')[:37, :57].all() and not page.painted('eyes')[:, 63:].any()
    page.drag((100, 10), shift=True)                                    # the part everywhere
    assert page.painted('eyes')[:37, 63:].all() and not page.painted('background').any()
    page.keys('i')
    page.drag((60, 10))
    assert page.run('return parts[chosen].name') == 'skin'
    page.keys('b')
    page.drag((10, 10), button=2)
    assert page.run('return parts[chosen].name') == 'eyes'
    page.keys('e')
    page.drag((10, 60), (20, 60))
    assert page.painted('background')[60, 10:20].all()
    page.find('#within').click()
    page.keys('2', 'b')
    page.drag((15, 60), (15, 10))                                       # stays in the background
    assert page.painted('skin')[60, 15] and page.painted('eyes')[10, 15]


def test_the_keyboard_is_enough(page):
    page.open(page.picture('me.png'))
    page.keys('2')
    page.brush(1)
    page.keys('ARROW_RIGHT')
    page.keys('ARROW_LEFT', shift=True)
    page.keys('ENTER')
    (y,), (x,) = np.nonzero(page.painted('skin'))
    assert page.said() == f'{x}, {y}: background'
    page.keys('ARROW_DOWN', 'ARROW_DOWN')
    page.keys('ENTER', shift=True)
    assert page.painted('skin').sum() > 5 and page.painted('skin')[:, x].sum() == page.painted('skin').sum()
    unnamed = page.run('''return [...document.querySelectorAll('button, input, select, [tabindex]')].filter(one =>
        !(one.ariaLabel || one.textContent.trim() || one.labels?.length)).map(one => one.outerHTML)''')
    assert unnamed == []
    page.keys('TAB')
    assert page.run('return getComputedStyle(document.activeElement).outlineStyle') == 'solid'


def test_two_pictures_share_their_parts_and_what_is_missing_is_marked(page):
    for name in ('hopper.png', 'hopper_sem.png', 'astronaut.png', 'astronaut_sem.png', 'my_village_sem.png'):
        shutil.copy(ROOT / 'samples' / name, page.folder)
    page.open('hopper_sem.png', 'hopper.png', 'astronaut.png')
    assert page.run("return document.querySelectorAll('.odd').length") > 5
    page.open('astronaut_sem.png')                                      # finds its picture
    for side, name in enumerate(('hopper', 'astronaut')):
        colours = page.run('return parts.map(part => rgb(part.colour))')
        painted = np.asarray(Image.open(page.folder / f'{name}_sem.png'))
        assert (np.uint8(colours)[page.labels(side)[1]] == painted).all()
    assert page.labels()[0][:10] == ['background', 'skin', 'eyes', 'brows', 'nose', 'mouth', 'hair', 'ears', 'neck',
                                     'clothes']
    rows = page.run('''return [...document.querySelectorAll('#parts tbody tr')].map(row => [
        row.querySelector('[type=text]').value,
        ...[...row.querySelectorAll('.share')].map(cell => cell.textContent)])''')
    assert ['skin', '13.5', '10.4'] in rows and ['ears', '0.0', '0.0'] in rows
    assert page.run("return document.querySelectorAll('#parts .odd').length") == 0
    page.find('.side:nth-of-type(2) .close').click()
    page.open('my_village_sem.png')                                     # a doodle, whose colours come to the parts
    assert page.run('return [sides[1].name, sides[1].picture]') == ['my_village_sem.png', None]
    assert {'meadow', 'street'} < set(page.labels()[0])
    page.find('#presets').send_keys('o')
    page.wait(lambda: 'ears' not in page.labels()[0])
    page.keys('z', control=True)
    assert 'ears' in page.labels()[0]


def test_files_are_dropped_on_a_side(page):
    page.picture('me.png')
    Image.new('RGB', SMALL, SKIN).save(page.folder / 'me_sem.png')
    page.run('''const [files, selector] = arguments, transfer = new DataTransfer();
        for (const [name, bytes] of files) transfer.items.add(new File([Uint8Array.from(bytes)], name));
        const drop = new DragEvent('drop', {dataTransfer: transfer, bubbles: true});
        document.querySelector(selector).dispatchEvent(drop)''',
             [[name, list((page.folder / name).read_bytes())] for name in ('me_sem.png', 'me.png')],
             '.side:nth-of-type(2) .empty')
    page.wait(lambda: page.said() == 'me_sem.png: 1 part.')
    assert page.run('return sides.map(side => side.name)') == ['', 'me.png'] and page.painted('fur', 1).all()


def test_a_doodle_is_made_without_a_picture(page):
    page.find('#new').click()
    page.keys('h', 'u', 't')
    page.find('#doodleName').clear()
    page.find('#doodleName').send_keys('hut.png')
    page.find('[value=ok]').click()
    page.keys('2')
    page.drag((100, 100), (200, 100))
    image = page.save('hut_sem.png')
    assert image.size == (512, 400) and len(image.convert('RGB').getcolors()) == 2
    assert page.said() == 'Saved hut_sem.png: beside it, --output hut.png paints the doodle.'


def test_touch_paints_with_one_finger_and_moves_with_two(page):
    page.open(page.picture('me.png'))
    page.keys('2')

    def touch(kind, *places):
        points = [dict(zip('xy', page.screen(*place)), id=k) for k, place in enumerate(places)]
        page.driver.execute_cdp_cmd('Input.dispatchTouchEvent', {'type': kind, 'touchPoints': points})

    touch('touchStart', (20, 20))
    touch('touchMove', (60, 20))
    touch('touchEnd')
    painted = page.painted('skin')
    assert painted[20, 20:60].all()
    scale = page.run('return active.scale')
    touch('touchStart', (30, 60))
    touch('touchMove', (40, 60))
    assert (page.painted('skin') != painted).any()
    touch('touchStart', (40, 60), (60, 60))                             # takes back what the first finger painted
    touch('touchMove', (20, 60), (80, 60))
    touch('touchEnd')
    assert (page.painted('skin') == painted).all() and page.run('return active.scale') > 2 * scale
    page.keys('f')
    assert page.run('return active.scale') == scale


@pytest.mark.parametrize('name', ['me.jpg', 'me.png', 'me.webp'])
def test_pictures_lie_as_the_program_reads_them_or_are_refused(page, name):
    for number in range(1, 9):
        exif = Image.Exif()
        exif[0x112] = number
        said = page.open(page.picture(name, exif=exif))
        if number > 1 and name != 'me.jpg':
            assert said == f'{name} is turned by EXIF: turn it in a paint program.'
            continue
        w, h, shown = page.run('''const {picture} = active, context = new OffscreenCanvas(w = picture.width,
            picture.height).getContext('2d'); context.drawImage(picture, 0, 0);
            return [w, picture.height, [...context.getImageData(0, 0, w, picture.height).data]]; var w''')
        upright = np.asarray(ImageOps.exif_transpose(Image.open(page.folder / name)).convert('RGB'), int)
        assert (h, w) == upright.shape[:2] and abs(np.reshape(shown, (h, w, 4))[:, :, :3] - upright).max() < 12


def test_maps_are_read_exactly_whatever_their_kind(page, doodle):
    """Palettes, greys, transparency, profiles and all filters of PNG: the colours are those that the program reads."""
    labels = np.random.default_rng(1).integers(0, 4, (80, 120))
    colours = np.uint8([[0, 0, 255], [255, 147, 0], [1, 2, 3], [200, 100, 50]])[labels]
    ramp = np.linspace(0, 199, 120, dtype=int)[None, :, None] // 8 * 8
    wide = ImageCms.ImageCmsProfile(ImageCms.createProfile('LAB')).tobytes()
    image = Image.fromarray(colours)
    images = {'rgb': image, 'p': image.convert('P', palette=Image.ADAPTIVE),
              'l': Image.fromarray(np.uint8(labels * 80)),
              'rgba': Image.fromarray(np.dstack([colours, np.uint8(labels * 60)])),
              'la': Image.merge('LA', [Image.fromarray(np.uint8(labels * n)) for n in (80, 60)]),
              '1': Image.fromarray(labels > 1), 'smooth': Image.fromarray(np.uint8(ramp + np.zeros((80, 1, 3), int)))}
    for name, image in images.items():
        image.save(page.folder / f'{name}_sem.png', **({'icc_profile': wide} if name == 'rgb' else {}))
        page.open(f'{name}_sem.png')
        names, found = page.run('return [parts.map(part => rgb(part.colour)), Array.from(active.labels)]')
        (read,), _ = doodle.map_pixels([doodle.decoded(str(page.folder / f'{name}_sem.png'))])
        assert (np.uint8(names)[np.reshape(found, (80, 120))] == read).all(), name


def test_soft_edges_and_jpeg_become_few_parts_and_sizes_are_fitted(page):
    pixels = np.zeros((400, 600, 3), np.uint8)
    pixels[:] = BLUE
    pixels[100:300, 150:450] = SKIN
    Image.fromarray(pixels).resize((240, 160), Image.LANCZOS).save(page.folder / 'me_sem.png')
    Image.fromarray(pixels).save(page.folder / 'you_sem.jpg', quality=60)
    for name in ('me', 'you'):
        said = page.open(page.picture(f'{name}.png'), 'me_sem.png' if name == 'me' else 'you_sem.jpg')
        assert re.search(r'2 parts; \d+ more colours went to the nearest; fitted from', said)
    for side in range(2):
        fur = page.painted('fur', side)                                 # of the animal, which has the fewest parts
        assert fur[20:60, 30:90].mean() > 0.98 and fur.sum() < 2500
    page.picture('me_sem.png', (50, 80))
    assert page.open('me_sem.png') == 'me_sem.png is 50 × 80, its picture 120 × 80: paint on a copy of that.'


def test_a_name_is_text_and_the_net_is_out_of_reach(page):
    name = '<img src=x onerror=document.title=1>&amp;.png'
    page.open(page.picture(name))
    assert page.find('h2').text == f'1 {name}' and page.driver.title == 'Map painter'
    assert not page.driver.find_elements('css selector', 'img')
    assert page.driver.execute_async_script(
        "fetch('http://127.0.0.1:9/').catch(error => arguments[0](error.name))") == 'TypeError'
    assert [line['message'] for line in page.driver.get_log('browser') if 'Content Security' in line['message']]
    assert not re.search(r'https?:|//\w+\.\w', PAGE.read_text())


def test_what_cannot_be_read_leaves_all_as_it_was(page):
    page.open(page.picture('me.png'))
    page.keys('2')
    page.drag((20, 20), (60, 20))
    before = page.labels()[1]
    (page.folder / 'text.png').write_text('no picture')
    (page.folder / 'me_sem.png').write_bytes((ROOT / 'samples/hopper_sem.png').read_bytes()[:2000])
    assert page.open('text.png') == 'text.png cannot be read: save it as PNG.'
    assert page.open('me_sem.png').startswith('me_sem.png ')
    assert (page.labels()[1] == before).all() and page.run('return sides[1].name') == ''
    page.run("const input = document.querySelectorAll('[type=color]')[2]; input.value = '#ff9308'; input.onchange()")
    assert page.said() == '#ff9308 is too near to the colour of skin: they would be one part.'


def test_nothing_unsaved_is_lost_unasked(page):
    def asked():
        return page.run("return !dispatchEvent(new Event('beforeunload', {cancelable: true}))")
    page.open(page.picture('me.png'))
    assert not asked()
    page.drag((20, 20), (60, 20))
    assert asked() and page.find('h2').text == '1 me.png •'
    page.find('.close').click()
    page.driver.switch_to.alert.dismiss()
    assert page.painted('skin').any()
    page.keys('z', control=True)
    assert not asked()
    page.keys('y', control=True)
    page.save('me_sem.png')
    page.wait(lambda: not asked())
    page.drag((20, 40), (60, 40))
    assert asked()
    page.find('.close').click()
    page.driver.switch_to.alert.accept()
    assert page.run('return sides[0].name') == '' and not asked()


def test_a_browser_that_can_saves_over_the_file_that_was_chosen(page):
    page.run('''window.written = []; window.showSaveFilePicker = async ({suggestedName}) => ({name: suggestedName,
        createWritable: async () => ({write: async blob => written.push([suggestedName, blob.size]), close() {}})})''')
    page.open(page.picture('me.png'))
    page.keys('s', control=True)
    page.wait(lambda: page.said().startswith('Saved'))
    page.drag((20, 20), (60, 20))
    page.keys('s', control=True)
    (first, before), (second, after) = page.wait(lambda: page.run('return written.length == 2 && written'))
    assert first == second == 'me_sem.png' and after > before and not list(page.folder.glob('*_sem.png'))


def test_the_named_colours_are_those_of_the_program_and_the_samples(page, doodle):
    presets = page.run('return PRESETS')
    assert {name: tuple(colour.to_bytes(3)) for name, colour in presets['portrait'].items()} == doodle.PARTS
    text = (ROOT / 'samples/README.md').read_text()
    for preset in presets.values():
        for name, colour in preset.items():
            assert re.search(rf'^\| {name}\b.* \| {", ".join(map(str, colour.to_bytes(3)))} \|', text, re.M), name
    assert page.run('return [NEAR, LEAST]') == [doodle.NEAR, doodle.LEAST]


@pytest.mark.parametrize('width', [320, 768])
def test_it_fits_narrow_windows(page, width):
    page.driver.execute_cdp_cmd('Emulation.setDeviceMetricsOverride',
                                {'width': width, 'height': 640, 'deviceScaleFactor': 2, 'mobile': True})
    try:
        page.open(page.picture('me.png'), page.picture('you.png'))
        assert page.run('return document.documentElement.scrollWidth') == width
        outside = page.run('''return [...document.querySelectorAll('button, #tools span, .marks')].filter(one => {
            const {left, right, width} = one.getBoundingClientRect(); return width && (left < 0 || right > innerWidth)
        }).map(one => one.outerHTML)''')
        assert outside == []
        page.find('#tabs button').click()
        page.keys('2')
        page.drag((20, 20), (60, 20))
        assert page.painted('skin')[20, 20:60].all()
        image = page.save('me_sem.png')
        assert image.size == SMALL
    finally:
        page.driver.execute_cdp_cmd('Emulation.clearDeviceMetricsOverride', {})
