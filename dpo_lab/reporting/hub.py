"""Push what a run trained to the Hugging Face hub: weights, tokenizer and model card, and nothing of its data."""

from __future__ import annotations

import os
from fnmatch import fnmatch
from pathlib import Path

from dpo_lab.errors import LabError, first_line
from dpo_lab.runs.run_record import RECORD, RunRefused, read_record

TOKEN = "HF_TOKEN"  # the variable of the environment that holds the token; a token on disk is not read
FOLDERS = ("policy", "reward_model")  # in a run folder
# The files of a Hugging Face model; a run's record, log, examples and samples hold texts of its data and stay here.
PUSHED = (
    *("README.md", "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json"),
    *("adapter_config.json", "tokenizer*.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "*.jinja"),
)


class PushFailed(LabError):
    """The hub did not take the model; the message says why."""


def files_to_push(folder: Path) -> list[Path]:
    """Return the files of a run's trained model that are pushed. Raise RunRefused if the run is not done or has none."""
    record = read_record(folder)
    if record is None:
        raise RunRefused(f"{folder}: holds no {RECORD}; type the folder of a run, e.g. outputs/dpo/default/seed=0")
    if record["status"] != "done":
        raise RunRefused(f"{folder}: its status is {record['status']}; finish the run first")
    places = [folder / name for name in FOLDERS if (folder / name).is_dir()]
    files = [file for place in places[:1] for file in sorted(place.iterdir()) if file.is_file()]
    files = [file for file in files if any(fnmatch(file.name, pattern) for pattern in PUSHED)]
    if not any(file.suffix == ".safetensors" for file in files):
        raise RunRefused(
            f"{folder}: holds no weights in {' or '.join(FOLDERS)}; type the folder of a run that trained some"
        )
    return files


def push(folder: Path, repo: str, public: bool = False) -> str:
    """Push a run's trained model to the repository `repo`, OWNER/NAME, which is made if it does not exist, and return its
    address. The token is that of the environment, in HF_TOKEN.

    public: whether the repository may be seen by others; a private one stays private. Raises RunRefused without a token,
    or if the repository is public and `public` is not given; PushFailed if the hub refuses or can't be reached.
    """
    files = files_to_push(folder)
    token = os.environ.get(TOKEN)
    if not token:
        raise RunRefused(f"{TOKEN} is not set; make a token with the right to write and type export {TOKEN}=...")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    hub = HfApi(token=token)
    try:
        hub.create_repo(repo, private=not public, exist_ok=True)
        if not public and not hub.model_info(repo).private:
            raise RunRefused(f"{repo}: is public; type --public to push there, or another repository")
        names = [file.name for file in files]
        message = f"Trained by dpo_lab ({folder.name})"
        hub.upload_folder(repo_id=repo, folder_path=files[0].parent, allow_patterns=names, commit_message=message)
    except HFValidationError as error:
        raise RunRefused(f"{repo}: not a repository's name; type OWNER/NAME ({first_line(error)})") from None
    except HfHubHTTPError as error:
        code = int(getattr(error.response, "status_code", 0))
        why = {401: "the token is not valid", 403: "the token has no right to write there"}.get(code, first_line(error))
        raise PushFailed(f"{repo}: {hub.endpoint} refused it ({code}): {why}") from None
    except LabError:
        raise
    except Exception as error:  # of the HTTP client, which several versions of the library have changed
        raise PushFailed(
            f"{repo}: {hub.endpoint} can't be reached ({type(error).__name__}: {first_line(error)})"
        ) from None
    return f"{hub.endpoint}/{repo}"
