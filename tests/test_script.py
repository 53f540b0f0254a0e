"""The script is one that can be read: its order, the length of its functions, and its names."""
import ast
import re

import pytest

from conftest import ROOT

PATHS = [ROOT / 'doodle.py', *(ROOT / '.docker' / name for name in ('start', 'vgg19')),
         *sorted((ROOT / 'samples').glob('*.py'))]
METHOD = ['options', 'images and maps', 'network', 'matching', 'losses', 'objective', 'optimisation', 'run']
MACHINERY = ['weights', 'devices', 'engine', 'files: pictures', 'files: painted maps', 'files: what a run writes',
             'files: what a run says', 'engine in C++', 'main']


def names_of(node):
    """The names that a statement or expression binds."""
    return {leaf.id for leaf in ast.walk(node) if isinstance(leaf, ast.Name)}


def module_names(tree):
    """What a module defines or imports, functions with `global` among it."""
    found = {name for node in ast.walk(tree) if isinstance(node, ast.Global) for name in node.names}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {(alias.asname or alias.name).split('.')[0] for alias in node.names}
        elif isinstance(node, ast.Assign):
            found |= set().union(*map(names_of, node.targets))
    return found


def local_names(function):
    """What a function binds, with its line: arguments, variables, functions inside it."""
    outside = {name for node in ast.walk(function) if isinstance(node, ast.Global) for name in node.names}
    for node in ast.walk(function):
        name = (node.arg if isinstance(node, ast.arg) else
                node.id if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else
                node.name if isinstance(node, (ast.FunctionDef, ast.ExceptHandler)) and node is not function else None)
        if name and name not in outside:
            yield name, node.lineno


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.Lambda))]


def test_the_method_comes_first():
    script = (ROOT / 'doodle.py').read_text()
    sections = re.findall(r'^# ---- (.+?) -+$', script, re.MULTILINE)
    assert sections == METHOD + MACHINERY
    assert script[:script.index('# ---- weights')].count('\n') <= 1350


@pytest.mark.parametrize('path', PATHS, ids=lambda path: path.name)
def test_no_local_has_the_name_of_something_of_the_module(path):
    tree = ast.parse(path.read_text())
    known = module_names(tree)
    assert not [found for function in functions(tree) for found in local_names(function) if found[0] in known]


@pytest.mark.parametrize('path', PATHS, ids=lambda path: path.name)
def test_no_function_is_longer_than_fifty_lines(path):
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in ast.walk(ast.parse(path.read_text()))
               if isinstance(node, ast.FunctionDef)}
    assert not {name: length for name, length in lengths.items() if length > 50}


def test_public_functions_have_docstrings():
    tree = ast.parse((ROOT / 'doodle.py').read_text())
    bare = [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))
            and not ast.get_docstring(node)]
    assert not bare
