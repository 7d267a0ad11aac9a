"""Models on the Hugging Face hub, by the extra `hub`: fetched once, then read as any directory."""

from pathlib import Path

from jaxfm.errors import MissingInputError, UnavailableError

# Weights, configs, tokenizers, templates: nothing that could be run.
_WANTED = ('*.safetensors', '*.json', '*.model', '*.jinja', '*.txt')


def download(name: str) -> Path:
    """The directory with the files of a model, 'org/name' or 'org/name@revision'.

    Raises:
        MissingInputError: there is no such model, it may not be read, or the extra is missing.
        UnavailableError: the hub does not answer, and nothing was fetched earlier.
    """
    try:
        from httpx2 import HTTPError  # what it gets files by
        from huggingface_hub import errors, snapshot_download
    except ImportError:
        raise MissingInputError(
            f'there is no directory {name}; to fetch the model of this name from the hub '
            "install the extra: pip install -e '.[hub]'"
        ) from None
    repository, _, revision = name.partition('@')
    try:
        found = snapshot_download(
            repository,
            revision=revision or None,
            allow_patterns=list(_WANTED),
            ignore_patterns=['consolidated*', 'original/*'],  # the same weights once more
        )
    except errors.GatedRepoError:
        raise MissingInputError(
            f'{name}: the hub wants you to accept the licence of this model, and a token (HF_TOKEN)'
        ) from None
    except (
        errors.RepositoryNotFoundError,
        errors.RevisionNotFoundError,
        errors.HFValidationError,
    ):
        raise MissingInputError(
            f'there is no directory {name}, and no model of this name on the hub'
        ) from None
    except (HTTPError, OSError) as error:
        raise UnavailableError(
            f'{name}: the hub does not answer and the model was not fetched before ({error}); '
            'name a directory or a .gguf file instead'
        ) from None
    return Path(found)
