"""What all readers of arrays with TensorStore share: its limits, and the meaning of its errors."""

import re

from jaxfm.errors import DataError, PermissionDeniedError, RunError, UnavailableError

CONTEXT = {
    'cache_pool': {'total_bytes_limit': 256 << 20},  # several devices may read parts of one chunk
    'cache_pool#index': {'total_bytes_limit': 100 << 20},  # of OCDBT, apart from the chunks
    'file_io_concurrency': {'limit': 32},
    's3_request_concurrency': {'limit': 32},
}
# Errors that come from the server or the network rather than from damaged data. TensorStore adds
# http_response_code to an error unless the code means that an object, or a part of it, is missing.
_OUT_OF_REACH = re.compile(
    '^(UNAVAILABLE|ABORTED|DEADLINE_EXCEEDED|CANCELLED|RESOURCE_EXHAUSTED):'
    '|CURL error|http_response_code'
)
_FORBIDDEN = re.compile(
    '^(PERMISSION_DENIED|UNAUTHENTICATED):|ExpiredToken|InvalidToken|TokenRefreshRequired'
)
# What TensorStore raises. Anything else, such as a device out of memory, is not from storage.
ERRORS = (TimeoutError, ValueError, LookupError, NotImplementedError)


def kind_of(error: Exception) -> type[RunError]:
    """The class of our error for one of ERRORS; DataError if what is stored is damaged."""
    if _FORBIDDEN.search(str(error)):
        return PermissionDeniedError
    if isinstance(error, TimeoutError) or _OUT_OF_REACH.search(str(error)):
        return UnavailableError
    return DataError
