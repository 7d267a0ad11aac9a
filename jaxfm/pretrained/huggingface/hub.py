"""Downloads models from the Hugging Face hub (extra `hub`), to be read like any directory."""

from pathlib import Path

from jaxfm.errors import MissingInputError, UnavailableError

# Weights, configs, tokenizers and templates; no code.
_WANTED = ('*.safetensors', '*.json', '*.model', '*.jinja', '*.txt')


def download(name: str) -> Path:
    """The local directory of a model, 'org/name' or 'org/name@revision'; downloaded only once.

    Raises:
        MissingInputError: the model does not exist or is gated, or the extra is not installed.
        UnavailableError: the hub does not answer and the model is not in the local cache.
    """
    try:
        from httpx2 import HTTPError  # the HTTP client of huggingface_hub
        from huggingface_hub import errors, snapshot_download
    except ImportError:
        raise MissingInputError(
            f'there is no directory {name}; to download the model of this name from the hub, '
            "install the extra: pip install -e '.[hub]'"
        ) from None
    repository, _, revision = name.partition('@')
    try:
        found = snapshot_download(
            repository,
            revision=revision or None,
            allow_patterns=list(_WANTED),
            ignore_patterns=['consolidated*', 'original/*'],  # second copies of the weights
        )
    except errors.GatedRepoError:
        raise MissingInputError(
            f'{name} is gated: accept its licence on the hub and set HF_TOKEN to your access token'
        ) from None
    except (
        errors.RepositoryNotFoundError,
        errors.RevisionNotFoundError,
        errors.HFValidationError,
    ):
        raise MissingInputError(
            f'there is no directory {name} and no model of this name on the hub'
        ) from None
    except (HTTPError, OSError) as error:
        raise UnavailableError(
            f'{name}: the hub does not answer and the model is not in its local cache ({error}); '
            'try again, or name a directory or a .gguf file instead'
        ) from None
    return Path(found)
