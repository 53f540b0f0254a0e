"""What shows a run: the page beside its frames, its figure, its animation, and figures of earlier runs."""
import json
import re
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageColor

from conftest import ROOT
from golden_data import FOLDER

NAME = '<b>&"quoted".png'                                               # of the output: it stands in the page
COMMON = ['--network=vgg16', '--style=texture_style.png', '--style-layers=3_1', '--phases=2', '--iterations=3',
          '--random-seed=7']


@pytest.fixture(scope='module')
def figure(doodle):
    return doodle.import_beside('samples/figure.py', '--figure')


@pytest.fixture(scope='module')
def drawn(run, tmp_path_factory):
    """A run that draws all there is."""
    folder = tmp_path_factory.mktemp('drawn')
    shutil.copy(FOLDER / 'texture_style.png', folder)
    done = run(folder, *COMMON, f'--output={NAME}', '--save-every=2', '--figure=figure.png', '--animation=moving.gif',
               '--log=log')
    assert (done.returncode, done.stderr) == (0, '')
    return SimpleNamespace(folder=folder, lines=done.stdout.splitlines(),
                           log=list(map(json.loads, (folder / 'log').read_text().splitlines())))


def shown(folder):
    """What watch.js tells the page."""
    return json.loads(re.fullmatch(r'watch\((.*)\)\n', (folder / 'watch.js').read_text())[1])


# ---- the page beside the frames --------------------------------------------------------------------------------------

def test_the_page_shows_the_run_and_its_end(drawn):
    page = shown(drawn.folder / 'frames')
    assert (page['state'], page['number'], page['total'], page['phase'], page['left']) == ('ended', 6, 6, 1, 0)
    assert (drawn.folder / 'frames' / page['frame']).is_file() and page['frame'] == '0004.png'
    assert page['names'] == ['total', 'style conv3_1', 'smoothness']
    assert page['losses'] == [[entry['phase'] * 3 + entry['evaluation'], entry['total'], *entry['style'].values(),
                               entry['smooth']] for entry in drawn.log[1:]]


def test_names_of_files_are_data_in_the_page(drawn):
    text = (drawn.folder / 'frames/watch.html').read_text()
    assert '<b>' not in text.replace('<body>', '') and text.count('</script>') == 2
    facts = json.loads(re.search(r'<script id="facts" type="application/json">(.*)</script>', text)[1])
    assert facts == {'title': NAME, 'size': [60, 52], 'before': None}
    assert not re.search(r'https?:|//[a-z]', text.replace('// called', '').replace('// ----', ''))     # no network


def test_time_left_counts_later_phases_by_their_costs(doodle, tmp_path, monkeypatch, black):
    clock = [100.]
    monkeypatch.setattr(doodle.time, 'time', lambda: clock[0])
    options = doodle.parse_options(['--style=a', '--content=b', '--phases=2', '--iterations=50', '--style-weight=0',
                                    '--style-layers=4_1'])
    page, at = doodle.Page(options, black(64)), doodle.Checkpoint({}, number=0, evaluation=10, frames=str(tmp_path))
    page.begin(at)
    clock[0], at.number = 120., 10
    page.show(at, [], 'running')
    first, last = page.costs
    assert shown(tmp_path)['seconds'] == 2
    assert shown(tmp_path)['left'] == pytest.approx(2 * (40 + 50 * last / first)) and 1 < last / first <= 4
    clock[0], at.number = 121.9, 11                                     # too soon
    page.show(at, [], 'running')
    assert shown(tmp_path)['number'] == 10
    page.show(at, [], 'been interrupted')
    assert shown(tmp_path)['number'] == 11


def test_the_page_has_at_most_a_thousand_points(doodle, tmp_path, black):
    page = doodle.Page(doodle.parse_options(['--style=a', '--content=b']), black(64))
    at = doodle.Checkpoint({}, number=4000, frames=str(tmp_path), losses=[(k, 1., 1.) for k in range(4000)])
    page.begin(at)
    page.show(at, ['total', 'smoothness'], 'running')
    assert 500 <= len(shown(tmp_path)['losses']) <= 1000
    before = json.loads(re.search('json">(.*)</script>', (tmp_path / 'watch.html').read_text())[1])['before']
    assert before.startswith('data:image/jpeg;base64,')


def test_frames_so_far_are_known_whatever_was_between_them(doodle, tmp_path, black):
    """A resumed run may have another --save-every; what a killed one made later is not of it."""
    for name in '0000.png', '0010.png', '0012.png', '9999.png', '10000.png', '10010.png', 'a.png', '٠٠٠٣.png':
        (tmp_path / name).touch()
    at = doodle.Checkpoint({}, number=10010, frames=str(tmp_path))
    assert doodle.frame_names(at) == ['0000.png', '0010.png', '0012.png', '9999.png', '10000.png']
    page = doodle.Page(doodle.parse_options(['--style=a', '--content=b', '--save-every=7']), black(64))
    page.begin(at)
    page.show(at, [], 'running')
    assert shown(tmp_path)['frame'] == '10000.png'
    assert doodle.frame_names(doodle.Checkpoint({})) == []


def test_losses_are_in_the_checkpoint_exactly(doodle):
    """So they are shown after a resume, too; broken ones are refused."""
    losses = [(0, 3.25, 1e-30), (1, 1 / 3, 2.)]
    assert doodle.read_losses(np.array(losses), 2) == losses and doodle.read_losses(np.zeros((0, 3)), 2) == []
    for broken in np.zeros(3), np.array([[0, np.nan]]), np.array(losses)[::-1], np.array(losses, np.float32):
        with pytest.raises(ValueError):
            doodle.read_losses(broken, 2)


# ---- figure ----------------------------------------------------------------------------------------------------------

def test_the_figure_of_a_run_is_that_of_its_log(drawn, figure):
    """Both have the pictures and the curves of all terms."""
    (drawn.folder / 'log').rename(drawn.folder / 'again.log')
    done = subprocess.run([sys.executable, ROOT / 'samples/figure.py', 'again.log'], cwd=drawn.folder,
                          capture_output=True, text=True)
    (drawn.folder / 'again.log').rename(drawn.folder / 'log')
    assert (done.returncode, done.stderr, done.stdout) == (0, '', '  - `again.png`\n')
    with Image.open(drawn.folder / 'figure.png') as one, Image.open(drawn.folder / 'again.png') as other:
        assert (np.asarray(one) == np.asarray(other)).all()
        assert one.width >= figure.PLOT[0] and one.height == figure.HEIGHT + figure.TITLE + figure.GAP + figure.PLOT[1]
        with Image.open(drawn.folder / NAME) as result:                 # beside the style, at 300 pixels of height
            left = figure.GAP + figure.GAP + round(60 / 52 * figure.HEIGHT)
            there = one.crop((left, figure.TITLE, left + round(60 / 52 * 300), figure.TITLE + 300)).resize((60, 52))
            assert np.abs(np.int16(there) - np.int16(result)).mean() < 12
    assert '  - Figure: `figure.png`.' in drawn.lines


def test_a_curve_is_where_its_losses_are(figure):
    """On a logarithmic scale from the power of ten below all losses to that above."""
    page = np.asarray(figure.curves(['a', 'b'], [(0, 100., 1.), (10, 10., 1.)], [0], (401, 361)))
    height, left, bottom = 361, 70, 30

    def there(colour):
        return np.argwhere((page[40:, left + 1:] == ImageColor.getrgb(colour)).all(axis=2)) + (40, left + 1)
    first, second = there(figure.COLOURS[0]), there(figure.COLOURS[1])
    whole = height - figure.TITLE - bottom                              # of three powers: 1 to 1000
    for (y, _), power in (first[first[:, 1].argmin()], 2), (first[first[:, 1].argmax()], 1), (second[0], 0):
        assert abs(y - figure.TITLE - whole * (3 - power) / 3) <= 2


def test_curves_have_room_for_every_finite_loss(figure):
    page = np.asarray(figure.curves(['a'], [(0, 1.7e308), (1, 5e-324)], [0]))
    rows, _ = (page[40:] == ImageColor.getrgb(figure.COLOURS[0])).all(axis=2).nonzero()
    assert rows.max() - rows.min() > 280


def test_a_log_may_have_more_evaluations_in_later_phases(figure, tmp_path):
    """As after --resume with more --iterations; and it may begin in the second phase."""
    entries = [dict(phase=phase, evaluation=k, total=1., content={}, style={}, smooth=1.)
               for phase, count in ((0, 3), (1, 5), (2, 8)) for k in range(count)]
    for first, starts in (0, [0, 3, 8]), (3, [0, 3, 8]), (5, [0, 3, 8]):
        lines = [dict(options=dict(iterations=3, phases=4)), *entries[first:]]
        (tmp_path / 'log').write_text(''.join(json.dumps(line) + '\n' for line in lines))
        _, _, rows, found = figure.read_log(tmp_path / 'log')
        assert [number for number, *_ in rows] == [*range(first, 16)] and found == starts


def test_a_log_that_begins_in_a_later_phase_tells_where_the_phases_began(doodle, figure, tmp_path):
    """Those before had fewer evaluations than the header tells."""
    def read(starts, evaluations):
        lines = [dict(options=dict(iterations=8, phases=4), starts=starts), *(dict(
            phase=2, evaluation=k, total=1., content={}, style={}, smooth=1.) for k in evaluations)]
        (tmp_path / 'log').write_text(''.join(json.dumps(line) + '\n' for line in lines))
        _, _, rows, found = figure.read_log(str(tmp_path / 'log'))
        return [number for number, *_ in rows], found
    assert read([0, 4, 10], range(5, 8)) == ([15, 16, 17], [0, 4, 10])
    assert read([], range(5, 8)) == ([21, 22, 23], [0, 8, 16])
    for starts, evaluation in ([0, 4, -10 ** 400], 5), ([0, 4, 10.5], 5), ('012', 5), ({}, -99), ([0, 4], 5.5):
        with pytest.raises(doodle.UserError, match='cannot be read as a log'):
            read(starts, [evaluation])


@pytest.mark.parametrize('content', [
    '', '{"options": 3}\n', '[1]\n', '{"options": {"iterations": 3, "phases": 1}}\n{"total": 1}\n', '\x00\xff',
    '{"options": {"iterations": 3, "phases": 1}}\n', 99999 * '[',
    '{"options": {"iterations": 3, "phases": 1}}\n{"phase": 0, "evaluation": 0, "total": 1%s, "content": {}, '
    '"style": {}, "smooth": 1}\n' % (400 * '0')], ids=range(8))
def test_what_is_no_log_is_refused(tmp_path, content):
    (tmp_path / 'a.log').write_text(content, encoding='latin-1')
    done = subprocess.run([sys.executable, ROOT / 'samples/figure.py', 'a.log'], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.returncode == 2 and 'cannot be read as a log' in done.stderr and done.stderr.count('\n') == 2
    assert [path.name for path in tmp_path.iterdir()] == ['a.log']


# ---- animation -------------------------------------------------------------------------------------------------------

def test_the_animation_has_the_frames_in_order_and_the_size_of_the_result(drawn, figure):
    with Image.open(drawn.folder / 'moving.gif') as moving:
        assert (moving.n_frames, moving.size) == (3, (60, 52))
        for number in range(3):
            moving.seek(number)
            with Image.open(drawn.folder / f'frames/{2 * number:04d}.png') as frame:
                same = frame.convert('RGB').resize((60, 52), Image.BICUBIC)
                assert np.abs(np.int16(moving.convert('RGB')) - np.int16(same)).mean() < 10     # 256 colours
        assert moving.info['duration'] == 2000


@pytest.mark.parametrize('ending', ['gif', 'webp', 'png'])
def test_an_animation_is_bounded(doodle, figure, tmp_path, ending):
    paths = []
    for number in range(200):
        paths.append(str(tmp_path / f'{number:04d}.png'))
        Image.new('RGB', (30, 20), (number, 255 - number, 0)).save(paths[-1])
    images, durations = figure.animation(paths, (3000, 2000))
    assert {image.size for image in images} == {(480, 320)} and len(images) == len(durations) == figure.MOST
    assert images[0].getpixel((0, 0)) == (0, 255, 0) and images[-1].getpixel((0, 0)) == (199, 56, 0)
    doodle.write_image(images[0], str(tmp_path / f'a.{ending}'), save_all=True, append_images=images[1:],
                       duration=durations, loop=0)
    with Image.open(tmp_path / f'a.{ending}') as moving:                # WebP joins frames that look alike
        assert 20 <= moving.n_frames <= figure.MOST and (moving.n_frames == figure.MOST or ending == 'webp')


# ---- what is refused -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('arguments, problem', [
    (['--animation=a.jpg'], "--animation 'a.jpg' does not end like one."),
    (['--animation=a.gif', '--save-every=0'], '--animation is made of frames, and --save-every=0 leaves them out.'),
    (['--figure=a.xyz'], "'a.xyz' does not end like a picture that can be written."),
    (['--figure=a.png', '--output=a.png'], '--figure is the same file as the output or its checkpoint.'),
    (['--figure=a.png', '--animation=a.png'], '--animation is the same file as --figure.'),
    (['--figure=texture_style.png'], "--figure 'texture_style.png' is one of the inputs and would overwrite it."),
    (['--animation=frames/0001.png'], "--animation 'frames/0001.png' has the name of a frame or of the folder of "
                                      '--frames.'),
    ([f'--log={ROOT}/samples/watch.html'], f"--log '{ROOT}/samples/watch.html' is one of the inputs and would "
                                           'overwrite it.'),
    (['--log=frames/watch.js'], "--log 'frames/watch.js' has the name of a frame or of the folder of --frames.")])
def test_drawings_are_checked_as_the_output_is(refused, tmp_path, arguments, problem):
    shutil.copy(FOLDER / 'texture_style.png', tmp_path)
    assert refused('--style=texture_style.png', *arguments)[0] == problem


# ---- the page in a browser -------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_a_browser_shows_the_page_and_renews_it(drawn, browser, tmp_path):
    """From the file system: what watch.js says now, the picture that it names, and a curve for each term."""
    folder = shutil.copytree(drawn.folder / 'frames', tmp_path / 'frames')
    script = (folder / 'watch.js').read_text()
    running = script.replace('"ended"', '"running"').replace('"number": 6', '"number": 5')
    (folder / 'watch.js').write_text(running)

    def seen(condition):
        end = time.monotonic() + 30
        while not browser.execute_script(f'return {condition}'):
            assert time.monotonic() < end, browser.execute_script('return document.body.innerText')
            time.sleep(.1)
    browser.get(f'file://{folder}/watch.html')
    seen("document.querySelector('#after').naturalWidth === 60")
    assert browser.title == NAME and browser.find_element('css selector', 'h1').text == NAME
    assert '5 of 6 evaluations' in browser.find_element('css selector', '#state').text
    terms = [item.text for item in browser.find_elements('css selector', 'li')]
    assert terms == ['total', 'style conv3_1', 'smoothness']
    (folder / 'watch.js').write_text(script)
    seen("document.querySelector('#state').textContent === 'The run has ended, after 6 of 6 evaluations.'")
    assert [entry['message'] for entry in browser.get_log('browser') if entry['level'] == 'SEVERE'] == []
