"""Find a model by its name, and say within seconds when it cannot be had.

The libraries that download a model ask an unreachable hub for every file of it, and each time again; the hub is asked
once here, with a deadline, before any of them is.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import InputError

HUB_SECONDS = 5.0


def find_model(name: str, seconds: float = HUB_SECONDS) -> str:
    """Return what `from_pretrained` can open: a folder, or the id of a model that the hub has.

    Where the hub is out of reach, or switched off by `HF_HUB_OFFLINE`, a model that was downloaded before is found as
    its folder in the cache, so that nothing waits for the network again.

    Args:
        seconds: how long the hub may take to answer.
    Raises:
        InputError: no such folder, no such model, or no way to know.
    """
    if Path(name).is_dir():
        return name
    if Path(name).exists():
        raise InputError(f"{name}: is a file; name the folder of a model, or its id on the hub")
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        raise InputError(f"{name}: no such folder, nor can it be a model's id on the hub") from None
    problem = _ask_hub(name, seconds)
    if problem is None:
        return name
    cached = _cached_folder(name)
    if cached is None:
        raise InputError(f"{name}: no such folder, {problem}, and no copy of it is in the cache")
    return cached


@contextmanager
def opening(name: str) -> Iterator[None]:
    """Turn into `InputError` what opening a model raises: nothing there, a file cut short, weights of another size."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "size mismatch" not in str(error):
            raise
        reason = " ".join(str(error).split())
        raise InputError(f"model {name!r} cannot be used: {reason[:500]}") from None


def _ask_hub(name: str, seconds: float) -> str | None:
    """Return why the hub gives no answer, or None where it has the model; raises `InputError` where it has none."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    if constants.HF_HUB_OFFLINE:
        return "the hub is switched off (HF_HUB_OFFLINE)"
    errors: list[Exception | None] = []

    def ask() -> None:
        try:
            HfApi().model_info(name, timeout=seconds)
            errors.append(None)
        except Exception as error:  # the errors of a connection differ between versions of the hub's client
            errors.append(error)

    # in a thread, since no timeout of the client covers the look-up of the host's name
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(seconds)
    if not errors:
        return f"the hub at {constants.ENDPOINT} did not answer within {seconds:g} s"
    error = errors[0]
    if isinstance(error, RepositoryNotFoundError):
        raise InputError(f"{name}: neither a folder nor a model that the hub at {constants.ENDPOINT} shows you")
    if error is None or isinstance(error, HfHubHTTPError):  # a busy hub is there: the download may try again
        return None
    return f"the hub at {constants.ENDPOINT} cannot be reached ({error})"


def _cached_folder(name: str) -> str | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return str(snapshot_download(name, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
