"""`edgekd push` and `edgekd pull`: a model to the Hugging Face Hub and back."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from edgekd.configs.models import PullConfig, PushConfig
from edgekd.core.console import say, warn
from edgekd.core.errors import EdgekdError, first_line
from edgekd.core.files import scratch_folder
from edgekd.core.folders import MODEL, publishing
from edgekd.core.hub import hub_reachable
from edgekd.core.manifest import read_artifact
from edgekd.core.readers import plain_path, printable, read_object
from edgekd.core.tensors import read_tensors

_FILES = re.compile(
    r"README\.md|labels\.txt|(preprocessor_)?config\.json|model\.safetensors|onnx/[^/]+\.onnx"
    r"|artifacts/[^/]+/.+"
)
"""What a pull takes: no pickles, no programs for transformers' `trust_remote_code`."""
_TOKEN = "Log in with hf auth login, or set HF_TOKEN; a token with the right to write is made in the Hub's settings."


def push(config: PushConfig) -> str:
    """Upload a run or an artifact; return the repository's address. See `edgekd.push`."""
    from huggingface_hub import HfApi, get_token

    from edgekd.artifacts.hub_layout import write_artifact, write_run

    folder: Path = config.model
    is_run = (folder / "run.json").is_file()
    if not is_run and not (folder / "artifact.json").is_file():
        raise EdgekdError(
            f"There is neither a run nor an exported file at {folder}.",
            "Name a folder that edgekd train or edgekd export has written.",
        )
    if get_token() is None:
        raise EdgekdError("The Hub takes uploads with a token, and there is none.", _TOKEN)
    _check_repo(config.repo)
    with scratch_folder() as scratch:
        (write_run if is_run else write_artifact)(scratch, folder, config.repo)
        with _hub_errors(config.repo):
            api = HfApi()
            made = api.create_repo(config.repo, private=config.private, exist_ok=True)
            api.upload_folder(
                repo_id=made.repo_id,
                folder_path=scratch,
                commit_message=f"Upload {folder.resolve().name} with edgekd",
            )
            return str(made)


def pull(config: PullConfig) -> Path:
    """Download what `push` uploaded into a new folder, and check it; return the folder. See `edgekd.pull`."""
    from huggingface_hub import HfApi, hf_hub_download

    out: Path = config.out
    MODEL.refuse(out, overwrite=False)
    _check_repo(config.repo)
    with publishing(out, MODEL, overwrite=False) as scratch:
        with _hub_errors(config.repo):
            found = HfApi().model_info(config.repo)
        names = [file.rfilename for file in found.siblings or ()]
        wanted = [name for name in names if _is_ours(name)]
        if not wanted:
            raise EdgekdError(
                f"{config.repo} holds nothing that edgekd reads.", "Name what edgekd push uploaded."
            )
        if others := sorted(set(names) - set(wanted) - {".gitattributes"}):
            shown = ", ".join(printable(name)[:80] for name in others[:3])
            warn(f"{len(others)} files of {config.repo} are left out, such as {shown}.")
        say(f"downloading {len(wanted)} files of {config.repo}")
        with _hub_errors(config.repo):
            for name in wanted:
                hf_hub_download(config.repo, name, revision=found.sha, local_dir=scratch)
        shutil.rmtree(scratch / ".cache", ignore_errors=True)
        _check(scratch)
    return out


def _is_ours(name: str) -> bool:
    """Return whether a file of a foreign repository is downloaded."""
    with contextlib.suppress(ValueError):
        return bool(_FILES.fullmatch(plain_path(name)))
    return False


def _check(folder: Path) -> None:
    """Check what was downloaded with the readers that use it later; an `EdgekdError` leaves nothing behind."""
    for path in sorted(folder.glob("*.json")):
        read_object(path, "downloaded configuration")
    for path in folder.glob("*.safetensors"):
        read_tensors(path, "downloaded student")
    for path in sorted((folder / "artifacts").glob("*")):
        read_artifact(path)


def _check_repo(repo: str) -> None:
    """Check that `repo` is a name on the Hub, and that the Hub can be reached."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise EdgekdError(
            f'"{printable(repo)}" is no name on the Hugging Face Hub.', "Write ORG/NAME."
        ) from error
    if not hub_reachable():
        raise EdgekdError(
            "The Hugging Face Hub cannot be reached.",
            "Check the network, HF_ENDPOINT and HF_HUB_OFFLINE.",
        )


@contextlib.contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    """Make every failure of the Hub and its client in the block one `EdgekdError`, and hide the client's bars."""
    from huggingface_hub import errors
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    disable_progress_bars()
    try:
        yield
    except errors.RepositoryNotFoundError as error:
        raise EdgekdError(
            f"The Hub has no {repo}, or it is not for this token to read.",
            "Check the name; for a private repository log in: hf auth login, or set HF_TOKEN.",
        ) from error
    except Exception as error:  # the client's network library has errors of its own
        response = getattr(error, "response", None)
        if getattr(response, "status_code", None) in (401, 403):
            raise EdgekdError(f"The Hub refuses the token for {repo}.", _TOKEN) from error
        raise EdgekdError(
            f"The Hub failed ({first_line(error)}).", "Try again; nothing was written here."
        ) from error
    finally:
        enable_progress_bars()
