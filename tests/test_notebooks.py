"""Every notebook runs from its first cell to its last, in the short form that SMOKE = True gives.

A notebook has a cell tagged `parameters` with `SMOKE = False`; the tests add one with True.
The short form takes at most SECONDS of CPU time; the long one is run by hand with `-m slow`.
"""

import json
import os
import resource
import warnings
from pathlib import Path

import pytest

from tests.runs import PATIENCE

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / 'notebooks').glob('*.ipynb'))
SECONDS = 30  # 20 on a quiet machine


def execute(path: Path, directory: Path, is_short: bool):
    """Runs a notebook in a directory -> (the notebook with its outputs, seconds of CPU time)."""
    nbformat, nbclient = pytest.importorskip('nbformat'), pytest.importorskip('nbclient')
    pytest.importorskip('ipykernel')
    notebook = nbformat.read(path, as_version=4)
    tags = [cell.metadata.get('tags', []) for cell in notebook.cells]
    index = next((i for i, names in enumerate(tags) if 'parameters' in names), None)
    assert index is not None, f'{path.name} has no cell tagged parameters'
    assert 'SMOKE = False' in notebook.cells[index].source, f'{path.name} has no SMOKE = False'
    notebook.cells.insert(index + 1, nbformat.v4.new_code_cell(f'SMOKE = {is_short}'))
    variables = {'PYTHONPATH': str(ROOT), 'JAX_NUM_CPU_DEVICES': '1'}
    if is_short:
        variables['JAX_DISABLE_MOST_OPTIMIZATIONS'] = '1'
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    client = nbclient.NotebookClient(
        notebook,
        timeout=PATIENCE if is_short else None,
        kernel_name='python3',
        resources={'metadata': {'path': str(directory)}},
    )
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # from event loops and sockets that are not ours
        client.execute(env=os.environ | variables)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return notebook, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_notebooks_run_in_short(tmp_path):
    seconds = {path.name: execute(path, tmp_path, is_short=True)[1] for path in NOTEBOOKS}
    assert [name for name, took in seconds.items() if took >= SECONDS] == []


@pytest.mark.slow
def test_notebooks_run_whole(tmp_path):
    for path in NOTEBOOKS:
        execute(path, tmp_path, is_short=False)


def planted(directory: Path, *sources: str) -> Path:
    """Writes a notebook with these cells; the first is tagged `parameters`."""
    cells = [
        dict(cell_type='code', id=str(i), metadata={}, outputs=[], execution_count=None, source=s)
        for i, s in enumerate(sources)
    ]
    cells[0]['metadata'] = {'tags': ['parameters']}
    path = directory / 'planted.ipynb'
    path.write_text(json.dumps(dict(nbformat=4, nbformat_minor=5, metadata={}, cells=cells)))
    return path


def test_the_short_form_runs_in_the_given_directory_and_a_failing_cell_fails(tmp_path):
    path = planted(
        tmp_path,
        'SMOKE = False',
        "import jaxfm; open('made', 'w').write(str(SMOKE)); print(1 if SMOKE else 2)",
    )
    notebook, _ = execute(path, tmp_path, is_short=True)
    assert notebook.cells[-1].outputs[0]['text'] == '1\n'
    assert (tmp_path / 'made').read_text() == 'True'
    broken = planted(tmp_path, 'SMOKE = False', 'raise ValueError("broken")')
    with pytest.raises(Exception, match='broken'):
        execute(broken, tmp_path, is_short=True)


def test_a_notebook_without_the_parameter_is_refused(tmp_path):
    with pytest.raises(AssertionError, match='no SMOKE = False'):
        execute(planted(tmp_path, 'x = 1'), tmp_path, is_short=True)
