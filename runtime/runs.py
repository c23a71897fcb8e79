"""A run on disk: opened, saved while it trains, continued after a kill, published, and shown.

    out/NAME/config.json model.safetensors tokenizer.json    the best model, which loads in transformers too
             run.json metrics.jsonl ledger.json results.json what was run, how it went, what came out
             held_out.jsonl questions.json                   the rows that were held out, the questions that were trained on
             checkpoints/step-N/                             model, AdamW's moments and the loop's counters after step N

The order of the batches follows from (seed, epoch, position) and dropout from (seed, step); so model, moments and the step
number are the whole state, and a resumed run repeats the uninterrupted one bit for bit on the CPU.
Nothing here knows the network: a model is its files.
"""

import contextlib
import hashlib
import json
import os
import platform
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from data import ChatML, load_tokenizer, question_key, write_truth
from lora import base_directory, is_adapter
from runtime import parallel
from runtime.files import InputError, read_fields, read_json, sha256, whole_directory, whole_file, write_json, write_jsonl
from runtime.flags import Command, flag_name, from_stored
from runtime.settings import TRAINING

CHAT_FILES = "tokenizer*.json special_tokens_map.json added_tokens.json chat_template.jinja generation_config.json".split()
MODEL_FILES = "config.json adapter_config.json base.json model*.safetensors* adapter_model.safetensors".split() + CHAT_FILES
FIRST_FILES = ("questions.json", "ledger.json", "held_out.jsonl", "held_out.truth.jsonl")  # written before run.json


# -------------------------------------------------------------------------------------------------- opening and resuming


@contextlib.contextmanager
def open_run(settings: Any, inputs: Any = None, parent: Path | None = None) -> Iterator[int]:
    """A run's directory while a stage writes to it: locked, with its run.json; yields the step to go on from.

    With --overwrite the earlier run is set aside, and deleted when the block ends. If the block fails before it has saved
    anything, the earlier run is back. run.json is written last: a directory without it is what a failed start left, and
    nobody's run. `inputs` and `parent`: the rows of a training stage and the model that it starts from. InputError rather
    than losing earlier work.
    """
    run, start = Path(settings.out) / settings.name, None
    if not parallel.is_main():
        yield parallel.gather(None)[0]
        return
    with locked(run):
        try:
            start = _make_directory(settings, run, inputs, parent)
            if parallel.size() > 1:
                parallel.gather(start)
            yield start
        except BaseException:
            made = start is not None and not getattr(settings, "resume", False) and not _set_aside(run).exists()
            _end_overwrite(run, _worth_keeping(run))
            if made and settings.stage not in TRAINING and not _worth_keeping(run):  # nothing here to go on with
                shutil.rmtree(run, ignore_errors=True)
            raise
        _end_overwrite(run, keep=True)


def _make_directory(settings: Any, run: Path, inputs: Any, parent: Path | None) -> int:
    """Readies the directory of a run, new or resumed; returns the step to go on from. InputError if that would go on
    with other rows or other weights than it was started with."""
    _end_overwrite(run, _worth_keeping(run))  # of a process that was killed
    files = {}  # that decide what a training run does
    if parent:
        weights = {file for folder in (parent, base_directory(parent)) for file in folder.glob("*.safetensors")}
        files = inputs.files | {"model": sorted(weights)}
    if getattr(settings, "resume", False):
        remove_leftovers(run)
        file = run / "run.json"
        before = read_fields(read_json(file), {"read": dict | None}, file)["read"] or {}
        for name, paths in files.items():
            if name in before and sha256(*paths) != before[name]:
                raise InputError(f"{paths[0]} has changed since {run} was started; put it back, or start another run")
        return max(steps_saved(run), default=0)
    check_name(settings)
    if (run / "run.json").exists():
        os.replace(run, _set_aside(run))
    run.mkdir(parents=True, exist_ok=True)
    if (card := _set_aside(run) / "README.md").exists():  # a person may have changed it; if not, the new run's replaces it
        shutil.copyfile(card, run / card.name)
    remove_leftovers(run)
    if inputs:
        write_inputs(run, inputs)
    read = {name: sha256(*paths) for name, paths in files.items()}
    versions = {"python": platform.python_version(), "torch": torch.__version__, "ranks": parallel.size()}
    stored = asdict(settings)
    if parallel.size() > 1:
        stored["device"] = torch.device(settings.device).type  # each rank has its own
    write_json(run / "run.json", {"stage": settings.stage, "settings": stored, "versions": versions, "read": read})
    return 0


def check_name(settings: Any) -> None:
    """InputError if the run's directory may not be made, since it holds another run or other files."""
    run = Path(settings.out) / settings.name
    if (run / "run.json").exists():
        if not settings.overwrite:
            goes_on = settings.stage in TRAINING and recorded(run, "stage") == settings.stage
            way_out = "Continue it with --resume, delete" if goes_on else "Delete"
            raise InputError(f"{run} already holds a run. {way_out} it with --overwrite, or give this one another --name.")
        for path in _files_read(settings):
            if run.resolve() in (path.resolve(), *path.resolve().parents):
                raise InputError(f"--overwrite would delete {path}, which this run reads; give it another --name")
    elif run.exists() and not all(path.name in FIRST_FILES or path.name.startswith(".") for path in run.iterdir()):
        raise InputError(f"{run} has no run.json, so it is not a run of this program; give this one another --name")


def _files_read(settings: Any) -> list[Path]:
    """The files and directories that a stage's settings name and that exist. With a model come the one under its adapters,
    the one that it was tuned from, and the run that did it."""
    values = [getattr(settings, name, None) for name in ("model", "train", "eval", "data", "reference_model", "bert")]
    names = [name for value in values for name in (value if isinstance(value, list) else [value]) if name]
    found = [Path(name) for name in names if Path(name).exists()]
    for model in [path for path in found if path.is_dir()]:
        found += [path for path in (base_directory(model), tuned_from(model), training_run(model)) if path]
    return found


def _set_aside(run: Path) -> Path:
    return run.with_name(f".{run.name}.old")


def _worth_keeping(run: Path) -> bool:
    """Whether a run that did not end well left something to go on with: a checkpoint, a sweep's runs, or results."""
    return bool(steps_saved(run)) or any(next(run.glob(name), None) for name in ("*/run.json", "results.json", "eval.json"))


def _end_overwrite(run: Path, keep: bool) -> None:
    """Deletes the run that --overwrite has set aside or, unless the new one is to be kept, puts it back."""
    old = _set_aside(run)
    if old.exists() and keep:
        shutil.rmtree(old)
    elif old.exists():
        shutil.rmtree(run, ignore_errors=True)
        os.replace(old, run)


@contextlib.contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[None]:
    """Lets one process at a time work on `path`. With `wait` the next one waits for it, else it is an InputError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock, note = FileLock(path.with_name(f".{path.name}.lock")), path.with_name(f".{path.name}.holder")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        who = note.read_text(encoding="utf-8") if note.exists() else "another process"
        if not wait:
            raise InputError(f"{path} is in use by {who}. Wait until it ends, stop it, or give another --name.") from None
        print(f"Waiting for {path}, in use by {who}")
        lock.acquire()
    try:
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        note.write_text(f"process {os.getpid()} on {platform.node()}, since {since}", encoding="utf-8")
        yield
    finally:
        note.unlink(missing_ok=True)
        lock.release()


def remove_leftovers(run: Path) -> None:
    """Deletes the temporary files of writers that were killed. The caller has locked the run, so nobody else is writing."""
    for path in [*run.rglob(".*.tmp")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def write_inputs(run: Path, inputs: Any) -> None:
    """Notes what became of a training stage's rows: questions.json, ledger.json, held_out.jsonl with its truth."""
    by_where = {row.where: row for row in inputs.rows}
    seen = {_short(question_key(by_where[example.where])) for example in inputs.train}
    held_out = [by_where[example.where] for example in inputs.held_out]
    write_truth(run / "held_out.jsonl", held_out)
    write_json(run / "questions.json", {"trained on": sorted(seen)})
    write_json(run / "ledger.json", {name: asdict(ledger) for name, ledger in inputs.ledgers.items()})
    write_jsonl(run / "held_out.jsonl", [row.raw for row in held_out])


def resume_command(settings: Any) -> str:
    """The command line that continues a run; everything else is read from its run.json."""
    where = [] if settings.out == "out" else ["--out", settings.out]
    start = ["python"] if parallel.size() == 1 else ["torchrun", "..."]
    words = [*start, "train.py", "--stage", settings.stage, "--name", settings.name, *where, "--resume"]
    return shlex.join(words)


def stored_settings(run: Path) -> Any:
    """The settings that a run was made with; InputError if run.json is of another version and cannot be understood."""
    return from_stored(read_json(run / "run.json"), str(run / "run.json"))


def resumed_settings(command: Command) -> Any:
    """The settings that the run to be resumed was started with. InputError if a flag asks for others."""
    asked = command.settings
    run = Path(asked.out) / asked.name
    if not (run / "run.json").exists():
        raise InputError(f"{run}: there is no run to resume; leave out --resume, or give its --name")
    stored = stored_settings(run)
    if stored.stage != asked.stage:
        way_out = "give that stage to resume it" if stored.stage in TRAINING else "it cannot be resumed; give another --name"
        raise InputError(f"{run} is a run of --stage {stored.stage}; {way_out}")
    for name in sorted(name for name, layer in command.origins.items() if layer == "flag"):
        old, new = getattr(stored, name), getattr(asked, name)
        if name not in ("resume", "out", "device") and old != new:
            now = f"{run} was started with {name} = {old}, now {flag_name(name)} {new}"
            raise InputError(f"{now}: a resumed run keeps its settings. Leave the flag out, or give another --name.")
    device = asked.device or stored.device
    return replace(stored, resume=True, overwrite=False, out=asked.out, name=asked.name, device=device)


# ----------------------------------------------------------------------------------------------------------- checkpoints


@contextlib.contextmanager
def checkpoint(run: Path, state: dict, chat: ChatML) -> Iterator[Path]:
    """Yields a directory for model and optimizer, which becomes checkpoints/step-N, complete or not at all. `state`: the
    loop's counters, of which "step" is N. All ranks enter; the main one writes."""
    path = checkpoint_directory(run, state["step"])
    if not parallel.is_main():
        yield path
        return
    with whole_directory(path) as directory:
        chat.save(directory)
        yield directory
        write_json(directory / "state.json", state)


def read_state(checkpoint: Path) -> dict:
    """The loop's counters in a checkpoint, checkpoints/step-N; InputError if they are not such, or not of step N."""
    file = checkpoint / "state.json"
    kinds = {"step": int, "best_step": int | None, "best_value": int | float | None, "evaluations_since_best": int}
    state = read_fields(read_json(file), kinds, file)
    if checkpoint.name != f"step-{state['step']}":
        raise InputError(f"{file}: is of step {state['step']}; delete {checkpoint} to go on from the checkpoint before")
    return state


def checkpoint_directory(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step}"


def steps_saved(run: Path) -> list[int]:
    """Steps with a complete checkpoint, ascending. Directories being written begin with a dot and do not count."""
    names = [path.name.removeprefix("step-") for path in (run / "checkpoints").glob("step-*")]
    return sorted(int(name) for name in names if name.isdecimal())


def prune(run: Path, keep: int, best: int | None) -> None:
    """Deletes all checkpoints but the last `keep` and the best."""
    for step in steps_saved(run)[:-keep]:
        if step != best:
            shutil.rmtree(checkpoint_directory(run, step))


def publish(run: Path, step: int) -> None:
    """Copies the model of checkpoint `step` to the run's own directory."""
    for pattern in MODEL_FILES:
        for file in checkpoint_directory(run, step).glob(pattern):
            with whole_file(run / file.name) as temporary:
                shutil.copyfile(file, temporary)


# ------------------------------------------------------------------------------------------------- while the loop runs


class Record:
    """What the loop says of its steps: lines of metrics.jsonl, TensorBoard, and the progress bar. See `recording`."""

    def __init__(self, run: Path, board: Any, bar: Any):
        self.run, self.board, self.bar = run, board, bar
        self.began, self.tokens = time.perf_counter(), 0

    def step(self, step: int, numbers: dict[str, float], tokens: int) -> None:
        """A training step that took `tokens` tokens."""
        self.tokens += tokens
        speed = self.tokens / (time.perf_counter() - self.began)
        self.log(step, numbers | {"tokens_per_second": speed})
        shown = {"loss": f"{numbers['loss']:.3f}", "tokens/s": f"{speed:,.0f}"}
        if "rewards/accuracies" in numbers:
            shown["accuracy"] = f"{numbers['rewards/accuracies']:.2f}"
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()

    def log(self, step: int, numbers: dict[str, float]) -> None:
        """One line of metrics.jsonl and the same for TensorBoard, from the main rank."""
        if parallel.is_main():
            with open(self.run / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **numbers}) + "\n")
            for name, value in numbers.items():
                self.board.add_scalar(name, value, step)


@contextlib.contextmanager
def recording(run: Path, what: str, start: int, total: int) -> Iterator[Record]:
    """A `Record` of the steps after `start`. What was logged after `start` is dropped: those steps will run again."""
    from torch.utils.tensorboard import SummaryWriter

    board = contextlib.nullcontext()
    if parallel.is_main():
        write_jsonl(run / "metrics.jsonl", [row for row in read_metrics(run) if row["step"] <= start])
        board = SummaryWriter(str(run / "tb"), purge_step=start + 1)
    pause = 0.1 if sys.stderr.isatty() else 10  # seconds between two states of the bar: in a file each is a line
    shown = dict(desc=what, unit="step", mininterval=pause, disable=not parallel.is_main())
    bar = tqdm(total=total, initial=start, **shown)
    with board as writer, bar:
        yield Record(run, writer, bar)


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], int]]:
    """Inside, Ctrl-C and SIGTERM only note that the loop should stop; a second one acts at once.

    Yields a function that returns the signal's number, or 0. All ranks must call it, and get the same answer.
    """
    received = []

    def handler(number, frame):
        received.append(number)
        signal.signal(number, previous[number])

    previous = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        first = lambda: received[0] if received else 0  # noqa: E731
        yield (lambda: max(parallel.gather(first()))) if parallel.size() > 1 else first
    except RuntimeError:
        if parallel.size() > 1:  # torchrun now stops the ranks that are left with SIGTERM; they must still say why they end
            previous[signal.SIGTERM] = signal.SIG_IGN
        raise
    finally:
        for number, action in previous.items():
            signal.signal(number, action)


def read_metrics(run: Path) -> list[dict]:
    """The complete lines of metrics.jsonl; a last line cut by a kill is left out."""
    path, rows = run / "metrics.jsonl", []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1] if path.exists() else [], start=1):
        try:
            rows.append(json.loads(line))
            read_fields(rows[-1], {"step": int}, "the line")
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}:{number}: not a line of metrics ({error}); remove it") from None
    return rows


# ---------------------------------------------------------------------------------- what is known about a model's directory


def recorded(run: Path, name: str) -> Any:
    """What run.json says of a setting, or of "stage"; None if it says nothing. Earlier versions had all under "config"."""
    raw = read_json(run / "run.json")
    inner = raw.get("settings", raw.get("config"))
    return raw.get(name, inner.get(name) if isinstance(inner, dict) else None)


def lineage(run: Path) -> list[Path]:
    """The runs that a model went through, the last one first, as each one's run.json names the model before."""
    found: list[Path] = []
    while (run / "run.json").exists() and run not in found:
        found.append(run)
        run = Path(str(recorded(run, "model")))
    return found


def training_run(directory: Path) -> Path | None:
    """The run that tuned a model: its own directory or, if it was quantized from another, that one's; None if neither is."""
    return next((run for run in lineage(directory) if recorded(run, "stage") in TRAINING), None)


def tuned_from(directory: Path) -> Path | None:
    """The model that a model was tuned from, which rewards are measured from; None if that is not recorded or gone."""
    run = training_run(directory)
    if run is None or not (run / "results.json").exists():
        return None
    parent = Path(str(read_json(run / "results.json").get("parent")))
    return parent if (parent / "config.json").exists() or is_adapter(parent) else None


def load_chat(directory: Path, system_prompt: str | None = None) -> ChatML:
    """The ChatML of a model's directory, by default with the system prompt that the model was tuned with.

    Adapters may leave the tokenizer to their base. InputError if the tokenizer has ids that the model has no embedding for.
    """
    run, base = training_run(directory), base_directory(directory)
    own = directory if (directory / "tokenizer.json").exists() else base
    if system_prompt is None and run:
        system_prompt = recorded(run, "system_prompt")
    chat = ChatML(load_tokenizer(own), system_prompt)
    config = base / "config.json"
    rows = read_fields(read_json(config), {"vocab_size": int}, config)["vocab_size"]
    largest = max(chat.tokenizer.get_vocab().values())
    if largest >= rows:
        found = f"its ids reach {largest:,}, the model's embedding has {rows:,} rows"
        raise InputError(f"{directory}: the tokenizer does not fit the model: {found}")
    return chat


def questions_seen(directory: Path, keys: Iterable[str]) -> int:
    """How many of these questions the run of a model trained on; 0 if that is not recorded."""
    run = training_run(directory)
    if run is None or not (run / "questions.json").exists():
        return 0
    seen = read_fields(read_json(run / "questions.json"), {"trained on": list}, run / "questions.json")["trained on"]
    seen = set(map(str, seen))
    return sum(_short(key) in seen for key in keys)


def _short(key: str) -> str:  # 16 hex digits are enough to tell questions apart
    return hashlib.sha256(key.encode()).hexdigest()[:16]
