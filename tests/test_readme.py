"""What is said twice is the same: README, --help, requirements.txt and the script's own metadata."""
import hashlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / 'README.md').read_text()


def command(section):
    """The shell line of a section of the README."""
    return re.search(rf'^## {section}\n(?:.*\n)*?    (.+)\n', README, re.MULTILINE).group(1)


def test_option_tables_are_those_of_help():  # fault 13
    """Each row of --help stands in the README with the same value, default and meaning, and no other does."""
    text = subprocess.run([sys.executable, ROOT / 'doodle.py', '--help'], capture_output=True, text=True, check=True,
                          env={'COLUMNS': '200'}).stdout
    in_help = {}
    for flag, value, meaning, default in re.findall(
            r'^  (--\S+)(?: (\S+))?\s{2,}(.+?)(?: \(default: (.+)\))?$', text, re.MULTILINE):
        name = f'{flag}[={value[1:-1]}]' if value.startswith('[') else f'{flag}={value}'.rstrip('=')
        in_help[name] = (f'`{default}`' if default else 'none', meaning)
    in_readme = {option.replace('\\|', '|'): (default, meaning) for option, default, meaning in
                 re.findall(r'^\| `(--\S+)` \| (\S+) \| (.+) \|$', README, re.MULTILINE)}
    assert len(in_help) > 20 and in_readme == in_help


def test_requirements_are_the_pins_of_the_script():
    required = re.findall(r'^([^#\s-].*)$', (ROOT / 'requirements.txt').read_text(), re.MULTILINE)
    block = re.search(r'^# /// script\n(.*?)^# ///$', (ROOT / 'doodle.py').read_text(), re.MULTILINE | re.DOTALL)
    assert required == re.findall(r'"([^"]+==[^"]+)",', block.group(1)) and all('==' in pin for pin in required)


def test_the_wheel_of_theano_is_found_and_is_the_one_that_its_script_makes():
    assert '\n--find-links=samples\nTheano==1.0.5\n' in (ROOT / 'requirements.txt').read_text()
    assert '\n# [tool.uv]\n# find-links = ["samples"]\n' in (ROOT / 'doodle.py').read_text()
    checksum = re.search("SHA256 = '(.+)'", (ROOT / 'samples/build_theano.py').read_text())[1]
    wheel = ROOT / 'samples/theano-1.0.5-py3-none-any.whl'
    assert hashlib.sha256(wheel.read_bytes()).hexdigest() == checksum


def test_the_image_has_the_same_pins_with_checksums():
    def pins(text):
        found = map(Requirement, re.findall(r'^([^#\s-][^\\\n]*)', text, re.MULTILINE))
        return {(canonicalize_name(pin.name), str(pin.specifier)) for pin in found
                if not pin.marker or pin.marker.evaluate({'python_version': '3.11', 'python_full_version': '3.11.2'})}
    hashed = (ROOT / '.docker/requirements.txt').read_text()
    assert pins((ROOT / 'requirements.txt').read_text()) <= pins(hashed)
    for name in '.docker/requirements.txt', '.docker/gpu.txt':
        for pin in (ROOT / name).read_text().replace('\\\n', '').splitlines():
            assert pin.startswith('#') or re.fullmatch(r'[\w-]+==[\w.]+( +--hash=sha256:[0-9a-f]{64}){1,2}', pin), pin


def test_the_label_of_the_image_is_the_program_s_version():
    version = re.search(r"^__version__ = '(.+)'$", (ROOT / 'doodle.py').read_text(), re.MULTILINE)[1]
    assert re.findall(r'^ARG VERSION=(.*)$', (ROOT / 'Dockerfile').read_text(), re.MULTILINE) == [version] * 2


def test_first_command_runs_the_sample_and_the_second_the_tests():
    first, second = command('Run'), command('Test')
    for line in (first, second):
        assert 'g++ python3-dev python3-venv' in line and '-r requirements.txt' in line
        assert ' && python3 doodle.py --version && python3 -m venv .venv && .venv/bin/pip ' in line    # before pip
    arguments = first.split('doodle.py ')[-1].split()
    for path in arguments[1:4:2]:
        assert (ROOT / path).is_file(), path
    assert second.endswith('.venv/bin/python -m pytest tests')


def test_ci_runs_the_second_command():
    printed = subprocess.run(['sed', '-n', r'/^## Test/,/^## /s/^    //p', ROOT / 'README.md'], capture_output=True,
                             text=True, check=True).stdout
    assert printed == command('Test') + '\n' and "'/^## Test/,/^## /s/^    //p'" in (ROOT / '.ci/run').read_text()


def test_readme_is_short():
    lines = README.splitlines()
    assert len(lines) <= 200
    assert [line for line in lines if len(line) > 120 and not line.startswith(('|', '    '))] == []  # tables, commands


@pytest.mark.parametrize('readme', ['README.md', 'samples/README.md'])
def test_every_link_leads_to_a_file_and_its_section(readme):
    readme = ROOT / readme
    for target in re.findall(r'\]\((?!https?:)([^)]+)\)', readme.read_text()):
        name, _, section = target.partition('#')
        path = readme.parent / (name or readme.name)
        assert path.exists(), target
        if section:
            sections = re.findall(r'^##+ (.+)$', path.read_text(), re.MULTILINE)
            assert section in [title.lower().replace(' ', '-') for title in sections], target


def test_troubleshooting_names_messages_that_the_program_has():
    script = (ROOT / 'doodle.py').read_text()
    for message in ('There is no g++', "Python's headers are missing", 'There is not enough memory', 'cannot be used'):
        assert message in README and message in script
    assert README.count('FIX: ') >= 8


def test_every_sample_has_its_size_origin_licence_and_checksum():
    samples = ROOT / 'samples'
    rows = re.findall(r'^\| `(\S+\.(?:png|jpg))` \| (\d+x\d+) \| (.+) \| (.+) \| (.+) \| (.+) \| `(\w+)` \|$',
                      (samples / 'README.md').read_text(), re.MULTILINE)
    for name, size, *words, checksum in rows:
        with Image.open(samples / name) as picture:
            assert '{}x{}'.format(*picture.size) == size, name
        assert hashlib.sha256((samples / name).read_bytes()).hexdigest() == checksum, name
        assert all(map(str.strip, words)), name     # what, origin, author, licence
    portraits = {f'portraits/{path.name}' for path in (samples / 'portraits').iterdir() if '_sem' not in path.stem}
    assert len(portraits) > 20 and portraits <= {name for name, *_ in rows}
