#!/usr/bin/env python3
"""A run in one picture: its inputs, maps and result, and each loss term over the evaluations.

    python3 samples/figure.py run.log other.log

makes run.png and other.png of the logs of earlier runs (doodle.py --log), whose pictures are read again from where the
log says. doodle.py --figure makes the same at the end of a run, and --animation one that moves, of the run's frames.
"""
import contextlib
import json
import math
import os
import sys

if __name__ == '__main__':                                              # the command: --help needs no imports
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
else:                                                                   # the module: loaded by doodle.import_beside
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont
import doodle

HEIGHT, TITLE, GAP = 300, 30, 8                                         # of a panel, in pixels
PLOT = 1200, 360                                                      # width and height of the curves
COLOURS = '#888888', '#c0392b', '#2980b9', '#27ae60', '#8e44ad', '#d35400', '#16a085', '#f39c12', '#7f5539'
MOST, SIDE, SECONDS = 60, 480, 8                                        # of an animation: frames, pixels, length
PHASES = 30                                                             # at most, where a log may be forged


# ---- pictures --------------------------------------------------------------------------------------------------------

def labelled(panels, columns, height=HEIGHT):
    """One Pillow image of {title: (H, W, 3) picture}, at one height, titles above."""
    images = [Image.fromarray(np.ascontiguousarray(panel)) for panel in panels.values()]
    images = [image.resize((max(1, round(image.width * height / image.height)), height), Image.LANCZOS)
              for image in images]
    width, row = max(image.width for image in images) + GAP, height + TITLE
    page = Image.new('RGB', (columns * width + GAP, -(-len(images) // columns) * row + GAP), 'white')
    for k, (title, image) in enumerate(zip(panels, images)):
        left, top = k % columns * width + GAP, k // columns * row
        ImageDraw.Draw(page).text((left, top + 6), title, 'black', ImageFont.load_default(18))
        page.paste(image, (left, top + TITLE))
    return page


def curves(names, rows, starts, size=PLOT):
    """Loss terms over the evaluations on a logarithmic scale, as a Pillow image.

    Parameters
    ----------
    names : list of str
        Of the terms.
    rows : list of (number, loss, loss, ...)
        The number of an evaluation, and its loss for each name. Losses of 0 are left out.
    starts : list of int
        The first evaluation of each phase.
    size : (width, height)
    """
    losses = [loss for _, *terms in rows for loss in terms if loss > 0] or [1]
    low, high = math.floor(math.log10(min(losses))), math.floor(math.log10(max(losses))) + 1
    last, (width, height), left, bottom = max(1, *(number for number, *_ in rows)), size, 70, 30
    page, font = Image.new('RGB', size, 'white'), ImageFont.load_default(15)
    pen = ImageDraw.Draw(page)

    def place(number, power):                                           # of a loss of 10 ** power
        return (left + (width - left - 20) * number / last,
                TITLE + (height - TITLE - bottom) * (high - power) / (high - low))
    for power in range(low, high + 1):
        pen.line([place(0, power), place(last, power)], '#dddddd')
        pen.text((left - 8, place(0, power)[1]), f'1e{power}', 'black', font, 'rm')
    for k, start in enumerate(starts):
        pen.line([place(start, low), place(start, high)], '#dddddd')
        pen.text((place(start, low)[0], height - bottom + 8), f'phase {k}', 'black', font)
    pen.text((width - 20, height - bottom + 8), f'evaluation {last}', 'black', font, 'ra')
    right = left
    for k, name in enumerate(names):
        colour = COLOURS[k % len(COLOURS)]
        points = [place(number, math.log10(terms[k])) for number, *terms in rows if terms[k] > 0]
        pen.line(points, colour, 2, 'curve') if len(points) > 1 else [pen.point(point, colour) for point in points]
        pen.line([(right, 15), (right + 20, 15)], colour, 4)
        pen.text((right + 26, 15), name, 'black', font, 'lm')
        right += 46 + pen.textlength(name, font)
    return page


def figure(panels, names, rows, starts):
    """`labelled` panels above `curves`, which are left out where there are no rows."""
    above = labelled(panels, min(len(panels), 5))
    below = curves(names, rows, starts, (max(PLOT[0], above.width), PLOT[1])) if rows else Image.new('RGB', (1, 1))
    page = Image.new('RGB', (max(above.width, below.width), above.height + below.height), 'white')
    page.paste(above, (0, 0))
    page.paste(below, (0, above.height))
    return page


def panels_of(inputs, result):
    """{title: (H, W, 3) picture} of doodle.Inputs and the result, what is missing left out; maps of more than three
    channels, one for each class, are shown in the colours of the curves."""
    def shown(channels):
        if channels is None or channels.shape[2] == 3:
            return channels
        rgb = np.array([[int(colour[k:k + 2], 16) for k in (1, 3, 5)] for colour in COLOURS], np.uint8)
        return rgb[channels.argmax(axis=2) % len(rgb)]
    found = {'content': inputs.content, 'map of the content': shown(inputs.content_map), 'style': inputs.style,
             'map of the style': shown(inputs.style_map), 'result': result}
    return {title: picture for title, picture in found.items() if picture is not None}


def animation(paths, size):
    """The frames at `paths` as a list of Pillow images, and the milliseconds that each is to be seen.

    At most `MOST` frames, evenly chosen, the last one always, with sides of at most `SIDE` pixels: the file stays below
    some 20 MB. All have the proportions of `size` = (width, height), that of the result.
    """
    chosen = sorted({round(k * (len(paths) - 1) / (MOST - 1)) for k in range(MOST)}) if len(paths) > MOST else range(
        len(paths))
    images = []
    for k in chosen:
        with Image.open(paths[k], formats=['PNG']) as frame:
            images.append(frame.convert('RGB').resize(doodle.limited_size(size, SIDE), Image.BICUBIC))
    each = max(40, round(1000 * SECONDS / len(images)))
    return images, [each] * (len(images) - 1) + [2000]


# ---- logs of earlier runs --------------------------------------------------------------------------------------------

def logged(entry):
    """{name: loss} of an evaluation, as the log has it."""
    return {'total': entry['total'], **{f'content conv{layer}': loss for layer, loss in entry['content'].items()},
            **{f'style conv{layer}': loss for layer, loss in entry['style'].items()}, 'smoothness': entry['smooth']}


@contextlib.contextmanager
def understood(path):
    """A block that reads a log, or what its header names: whatever it raises becomes a `UserError`."""
    try:
        yield
    except doodle.UserError:
        raise
    except Exception as error:  # what is no log can raise anything
        raise doodle.UserError(f'{path!r} cannot be read as a log: {doodle.one_line(error)}.',
                               'name a file that doodle.py --log has written') from None


def read_log(path):
    """A log as (header, names, rows, starts), as for `figure`."""
    with understood(path):
        with open(path, encoding='utf-8') as file:
            header, *entries = map(json.loads, file)
        iterations, phases = header['options']['iterations'], header['options']['phases']
        entries = [entry for entry in entries if 'total' in entry]      # others tell that a phase has converged
        names = list(logged(entries[0])) if entries else []
        # A run may have gone on with more evaluations in a phase than its header tells.
        counts = {entry['phase']: entry['evaluation'] + 1 for entry in entries}
        starts = [*(header.get('starts') or [0])]                       # of the phases before the log, and its first
        for phase in range(len(starts) - 1, min(phases, PHASES) - 1):
            starts.append(starts[-1] + counts.get(phase, iterations))
        rows = [(starts[entry['phase']] + entry['evaluation'], *map(float, logged(entry).values()))
                for entry in entries]
        if any(len(row) != len(names) + 1 or not all(map(math.isfinite, row)) for row in rows):
            raise ValueError('its evaluations have other terms')
        if any(type(number) is not int or number < 0 for number in [*starts, *(number for number, *_ in rows)]):
            raise ValueError('its evaluations have other numbers')
    return header, names, rows, [start for start in starts if rows and start <= rows[-1][0]]


def read_panels(header):
    """`panels_of` a run, read again from the paths in its log's `header`, and what could not be read, a line each."""
    options, panels, missing = header['options'], {}, []
    for title in 'content', 'style':
        path = options[title] or options['output']                      # a doodle has the map of its output
        if options[title]:
            panels |= read_panel(title, path, missing)
        if header['shapes']['map_channels']:
            panels |= read_panel(f'map of the {title}', doodle.find_map(path, options['semantic_ext']), missing)
    return panels | read_panel('result', options['output'], missing), missing


def read_panel(title, path, missing):
    """{title: picture}, or nothing and a line more in `missing`."""
    try:
        return {title: doodle.read_picture(path).pixels}
    except doodle.UserError as error:
        missing.append(f'{title}: {error.problem}')
        return {}


def parse_options(arguments):
    parser = doodle.Parser(prog='figure.py', description='Make a figure of each log: run.log becomes run.png.')
    parser.add_argument('logs', type=doodle.parse_path, nargs='+', metavar='LOG', help='as doodle.py --log writes')
    parser.add_argument('--output', type=doodle.parse_path, metavar='PATH', help='the figure, of one log')
    options = parser.parse_args(arguments)
    if options.output and len(options.logs) > 1:
        raise doodle.UserError('--output is for one log.', 'leave it out: each figure lies beside its log')
    return options


def run(arguments):
    """The command: a figure of each log."""
    options = parse_options(arguments)
    doodle.import_pillow()
    this = doodle.import_beside('samples/figure.py', '--figure')                    # this file as a module
    for log in options.logs:
        header, names, rows, starts = this.read_log(log)
        with this.understood(log):
            panels, missing = this.read_panels(header)
        path = options.output or os.path.splitext(log)[0] + '.png'
        doodle.image_format(path)
        if os.path.exists(path):
            raise doodle.UserError(f'{path!r} is there already.', 'move it away, or choose another --output')
        if not panels and not rows:
            raise doodle.UserError(f'{log!r} tells of no evaluation, and its pictures are gone.', 'leave it out')
        doodle.write_image(this.figure(panels, names, rows, starts), path)
        for line in missing:
            doodle.say(f'  - Left out, {line}')
        doodle.say(f'  - `{path}`')
    return 0


if __name__ == '__main__':
    sys.exit(doodle.guarded(run, sys.argv[1:]))
