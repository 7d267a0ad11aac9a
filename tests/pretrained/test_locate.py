"""What `init_from` may name, and the message when nothing has that name."""

import importlib
import sys

import pytest

from jaxfm.config.load import load_config, write_config
from jaxfm.errors import DataError, MissingInputError, UnavailableError
from jaxfm.pretrained import locate
from jaxfm.pretrained.huggingface import hub
from tests.hf_directories import write_json, write_model
from tests.pretrained.loading import ROOT

PRETRAINED = str(ROOT / 'configs' / 'pretrained.py')


@pytest.fixture(scope='module')
def models(tmp_path_factory):
    """A directory with models of several kinds."""
    directory = tmp_path_factory.mktemp('models')
    write_model(directory / 'smol')
    (directory / 'one').mkdir()
    (directory / 'one' / 'tiny.gguf').write_bytes(b'no GGUF')
    (directory / 'two').mkdir()
    for name in ('a.gguf', 'b.gguf'):
        (directory / 'two' / name).write_bytes(b'')
    (directory / 'empty').mkdir()
    (directory / 'pytorch_model.bin').write_bytes(b'')
    return directory


@pytest.mark.parametrize(
    'name, kind, words',
    [
        ('smoll', MissingInputError, r'there is no .*smoll.*did you mean .*models\d*/smol\?'),
        ('other', MissingInputError, r'there is no .*other.*; available: .*smol'),
        ('nowhere/else/model', MissingInputError, r'there is no .*nowhere/else/model'),
        ('empty', MissingInputError, r'empty has no model: neither config.json nor a .gguf'),
        ('two', DataError, r'two has several models.*a.gguf, b.gguf'),
        ('smol/model.safetensors', DataError, r'has only weights: name its directory'),
        ('pytorch_model.bin', DataError, r'pytorch_model.bin is not a model'),
        ('one', DataError, r'tiny.gguf'),
    ],
)
def test_a_name_without_a_model_is_refused_with_an_alternative(models, name, kind, words):
    with pytest.raises(kind, match=f'config.init_from: .*{words}'):
        load_config(PRETRAINED, [f'init_from={models / name}'])


def test_a_name_that_is_too_long_is_refused():
    with pytest.raises(MissingInputError, match='config.init_from: aaa.*: File name too long'):
        load_config(PRETRAINED, [f'init_from={"a" * 300}'])


def test_a_gguf_file_next_to_a_config_is_the_model(models, tmp_path):
    (tmp_path / 'model.gguf').write_bytes(b'no GGUF')
    (tmp_path / 'config.json').write_text('{"model_type": "llama"}')
    with pytest.raises(DataError, match='model.gguf'):
        locate.open_pretrained(str(tmp_path))


def test_a_home_directory_may_be_written_as_a_tilde(models, monkeypatch, tiny):
    monkeypatch.setenv('HOME', str(models))
    config = load_config(PRETRAINED, ['init_from=~/smol'])
    assert config.model.family == 'llama'
    (models / 'run').mkdir()
    write_config(load_config(str(tiny.config)), models / 'run' / 'config.json')
    config = load_config(PRETRAINED, ['init_from=~/run'])
    assert (config.model.family, config.model.embed_dim) == ('', 32)


@pytest.mark.parametrize(
    'generation, config, stop_ids',
    [
        ({'eos_token_id': [3, 2]}, {}, [2, 3]),
        ({'eos_token_id': 3}, {}, [3]),
        ({}, {'eos_token_id': [5, 4]}, [4, 5]),
        ({'eos_token_id': None}, {'eos_token_id': 6}, [6]),
        ({}, {'eos_token_id': None}, []),
    ],
)
def test_stop_ids_are_taken_from_the_model(tmp_path, generation, config, stop_ids):
    path = write_model(tmp_path / 'model', **config)
    write_json(path / 'generation_config.json', generation)
    assert load_config(PRETRAINED, [f'init_from={path}']).sampling.stop_ids == stop_ids


def test_the_config_takes_precedence_over_the_model(models):
    said = ['model.param_dtype=bfloat16', 'sampling.stop_ids=[9]', 'export.dtype=float16']
    config = load_config(PRETRAINED, [f'init_from={models / "smol"}', *said])
    assert config.model.param_dtype == 'bfloat16' and config.model.num_layers == 2
    assert (config.sampling.stop_ids, config.export.dtype) == ([9], 'float16')
    assert config.tokenizer.path == str(models / 'smol')


# The hub


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """The real hub library without a network -> its cache directory."""
    constants = pytest.importorskip('huggingface_hub.constants')
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'cache'))
    monkeypatch.chdir(tmp_path)
    return tmp_path / 'cache'


@pytest.mark.parametrize('name', ['org/name', 'org/name@main'])
def test_without_a_network_a_hub_name_is_refused(offline, name):
    with pytest.raises(UnavailableError, match=f'{name}: the hub does not answer(.|\n)*directory'):
        load_config(PRETRAINED, [f'init_from={name}'])


def test_a_cached_hub_model_is_found_without_a_network(offline):
    place = offline / 'models--org--name'
    write_model(place / 'snapshots' / ('0' * 40))
    (place / 'refs').mkdir()
    (place / 'refs' / 'main').write_text('0' * 40)
    config = load_config(PRETRAINED, ['init_from=org/name'])
    assert config.model.family == 'llama'
    assert str(offline) in config.tokenizer.path


@pytest.mark.parametrize('name', ['runs/mistake', 'orgname', '../org/name', '/org/name'])
def test_a_path_is_not_looked_up_on_the_hub(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, 'download', None)
    with pytest.raises(MissingInputError, match=f'there is no {name}'):
        load_config(PRETRAINED, [f'init_from={name}'])


def test_a_name_that_is_invalid_on_the_hub_is_refused(offline):
    with pytest.raises(MissingInputError, match='org/na--me'):
        load_config(PRETRAINED, ['init_from=org/na--me'])


def test_without_the_hub_extra_the_message_names_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    with pytest.raises(MissingInputError, match=r"org/name(.|\n)*pip install -e '.\[hub\]'"):
        load_config(PRETRAINED, ['init_from=org/name'])


@pytest.mark.parametrize(
    'refusal, kind, words',
    [
        ('GatedRepoError', MissingInputError, 'licence(.|\n)*HF_TOKEN'),
        ('RepositoryNotFoundError', MissingInputError, 'no model of this name on the hub'),
        ('RevisionNotFoundError', MissingInputError, 'no model of this name on the hub'),
        ('OfflineModeIsEnabled', UnavailableError, 'does not answer'),
        ('HfHubHTTPError', UnavailableError, 'does not answer'),
    ],
)
def test_each_refusal_of_the_hub_has_its_message(monkeypatch, refusal, kind, words):
    library = pytest.importorskip('huggingface_hub')
    errors = importlib.import_module('huggingface_hub.errors')

    def refuse(*arguments, **options):
        error = getattr(errors, refusal)
        raise error.__new__(error)

    monkeypatch.setattr(library, 'snapshot_download', refuse)
    with pytest.raises(kind, match=f'org/name(.|\n)*{words}'):
        hub.download('org/name')


def test_a_broken_connection_is_reported(monkeypatch):
    library, httpx = pytest.importorskip('huggingface_hub'), pytest.importorskip('httpx2')

    def refuse(*arguments, **options):
        raise httpx.ReadTimeout('slow')

    monkeypatch.setattr(library, 'snapshot_download', refuse)
    with pytest.raises(UnavailableError, match='org/name: the hub does not answer.*slow'):
        hub.download('org/name')


def test_nothing_executable_is_downloaded(monkeypatch, tmp_path):
    library, asked = pytest.importorskip('huggingface_hub'), {}

    def fetch(name, **options):
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(library, 'snapshot_download', fetch)
    assert hub.download('org/name@v1') == tmp_path
    assert (asked['name'], asked['revision']) == ('org/name', 'v1')
    assert not any(
        pattern.endswith(('*', '.py', '.bin', '.pt')) for pattern in asked['allow_patterns']
    )
