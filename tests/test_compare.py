"""samples/compare.py from end to end, on a picture whose comparison with itself has known results."""
import re
import subprocess
import sys

import pytest
from PIL import Image

from conftest import ROOT


@pytest.mark.slow
def test_a_picture_compared_with_itself(tmp_path):
    """The row of the content itself is all its own parts and no loss; the results of one evaluation are not.

    The size is one at which conv5_1 has no 3x3 patch: Gatys' method needs none.
    """
    face = f'{ROOT}/samples/astronaut.png'
    printed = subprocess.run(
        [sys.executable, ROOT / 'samples/compare.py', f'--content={face}', f'--style={face}', '--max-size=48',
         '--phases=1', '--iterations=1', '--scales=0', f'--weights={ROOT}/vgg16.npz', '--output=compared.jpg'],
        cwd=tmp_path, timeout=600, text=True, capture_output=True, check=True).stdout
    rows = {title: [float(cell.rstrip(' %').replace(',', '')) for cell in cells.split('|')] for title, cells in
            re.findall(r'^\| ([\w &]+) \| ([\d].*) \|$', printed, re.MULTILINE)}
    assert list(rows) == ['the content itself', 'Gatys', 'Li & Wand', 'Champandard']
    assert rows['the content itself'][:2] == [100, 100] and max(rows['the content itself'][2:]) < 5
    for title in ('Gatys', 'Li & Wand', 'Champandard'):
        assert rows[title][0] < 90 and min(rows[title][2:]) > 1000
        assert f'{title}: ' in printed
    assert '3 copies of the style picture' in printed
    with Image.open(tmp_path / 'compared.jpg') as page:
        assert page.width > 900 and page.height > 600
