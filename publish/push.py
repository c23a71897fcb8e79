"""--stage push: a model and its card to the Hugging Face hub.

    python train.py --stage push --model out/demo-dpo --repo USER/NAME --dry-run     lists what would be sent
    python train.py --stage push --model out/demo-dpo --repo USER/NAME --private

Only files that belong to a model, its card or a GGUF export are sent, by their names. Rows, journals, logs, checkpoints and
optimizer states have others. A large file that is there is not sent again, so the same command goes on after a failure.
"""

from pathlib import Path

from lora import ADAPTER_CONFIG, is_adapter, read_adapters
from publish.card import CARD, hub_name
from runtime.files import InputError, first_line, printable
from runtime.runs import MODEL_FILES
from runtime.settings import Push

SENT = (*MODEL_FILES, CARD, "LICENSE", "*.gguf", "Modelfile")
STAYS = "optimizer.safetensors"


def run(settings: Push) -> int:
    """--stage push; returns the exit status."""
    directory = Path(settings.model)
    files = files_to_send(directory)
    for file in files:
        print(printable(f"  {file.stat().st_size / 1e6:12,.2f} MB  {file.name}"))
    print(f"{len(files)} files, {sum(file.stat().st_size for file in files) / 1e6:,.1f} MB")
    if settings.dry_run:
        print("Nothing was sent.")
        return 0
    print(printable(f"Sent: {send(files, settings.repo, settings.private)}"))
    return 0


def files_to_send(directory: Path) -> list[Path]:
    """The files of a model and nothing else; InputError if there is no model, or if it is of no use to others."""
    files = sorted({file for pattern in SENT for file in directory.glob(pattern) if file.is_file() and file.name != STAYS})
    if not any(file.suffix in (".safetensors", ".gguf") for file in files):
        raise InputError(f"there is no model in {directory}; a training run has one when it has come to its end")
    if is_adapter(directory) and not hub_name(base := read_adapters(directory)[0]["base_model_name_or_path"]):
        way_out = f"merge them (--stage merge), or send that model first and write its name on the hub into {ADAPTER_CONFIG}"
        raise InputError(f"{directory} holds adapters of {base}, which only this machine has; {way_out}")
    return files


def send(files: list[Path], repo: str, private: bool) -> str:
    """Makes the repository, if there is none, and adds the files in one commit; returns its address. InputError if the hub
    refuses or cannot be reached."""
    from huggingface_hub import CommitOperationAdd, HfApi, errors
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # it tries again by itself, and says so in several lines
    try:
        api = HfApi()
        api.create_repo(repo, private=private or None, exist_ok=True)
        parts = [CommitOperationAdd(file.name, str(file)) for file in files]
        return api.create_commit(repo, parts, commit_message=f"Model {files[0].parent.name}").commit_url
    except errors.HFValidationError:
        raise InputError(f"--repo {repo}: not a hub name, which looks like USER/NAME") from None
    except (errors.HTTPError, OSError, ValueError, RuntimeError) as error:  # the last wraps what stopped a large file
        error = error.__cause__ or error
        status = getattr(getattr(error, "response", None), "status_code", None)
        make_one = "make a token with the right to write at hf.co/settings/tokens, then set HF_TOKEN to it"
        reason = {401: f"the hub does not know you; {make_one}", 403: f"your token may not write to {repo}"}.get(status)
        goes_on = f"the upload failed ({first_line(error)}); the same command goes on with it"
        raise InputError(f"{repo}: {reason or goes_on}") from None
