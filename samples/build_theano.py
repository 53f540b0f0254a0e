# /// script
# requires-python = "==3.11.*"
# dependencies = ["pip"]
# ///
"""Make theano-1.0.5-py3-none-any.whl, Theano as pip installs it, byte for byte again.

    python3.11 samples/build_theano.py       # pip downloads the source, 3 MB

Theano (BSD) is published as source alone, and its setup.py needs what is gone from Python 3.12. What it makes on 3.11
is pure Python and serves all.
"""
import argparse
import hashlib
import os
import pathlib
import subprocess
import sys
import tempfile

WHEEL = pathlib.Path(__file__).with_name('theano-1.0.5-py3-none-any.whl')
SHA256 = 'd470fbf69668dfb5e85b2ca1ef6995519b887675429f62a77a9f91e12903fd2d'


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        pins = pathlib.Path(folder, 'pins.txt')
        pins.write_text('setuptools==80.10.2\n')
        fixed = {'SOURCE_DATE_EPOCH': '1595808000', 'PIP_CONSTRAINT': str(pins), 'PIP_BUILD_CONSTRAINT': str(pins)}
        subprocess.run([sys.executable, '-m', 'pip', 'wheel', '--use-pep517', '--no-cache-dir', '--no-deps',
                        '--no-binary=theano', f'--wheel-dir={folder}', 'Theano==1.0.5'],
                       env=os.environ | fixed, check=True)
        wheel = pathlib.Path(folder, WHEEL.name).read_bytes()
    found = hashlib.sha256(wheel).hexdigest()
    if found != SHA256:
        sys.exit(f'{WHEEL.name}: sha256 is {found}, not {SHA256}.')
    WHEEL.write_bytes(wheel)


if __name__ == '__main__':
    main()
