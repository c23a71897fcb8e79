"""The command line: what is understood, what the help shows, and that every mistake is one line that says what to type."""

import re
import resource
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from runtime.files import InputError
from runtime.flags import flag_name, overview, parse, stage_help
from runtime.settings import STAGES, TRAINING

ROOT = Path(__file__).resolve().parents[2]


def test_flags_of_every_kind():
    got = parse("--stage eval --model a b --data x.jsonl --eps 0.1 --samples 0 --letter-only".split())
    assert got.settings.model == ["a", "b"] and got.settings.eps == 0.1 and got.settings.samples == 0
    typed = {name for name, layer in got.origins.items() if layer == "flag"}
    assert got.settings.letter_only and typed == {"model", "data", "eps", "samples", "letter_only"}
    grid = parse("--stage sweep --grid beta=0.1,0.3 --grid eps=0,0.1".split())
    assert grid.settings.grid == ["beta=0.1,0.3", "eps=0,0.1"]
    assert parse(["--stage=sft", "--model=x", "--train=y"]).settings.stage == "sft"
    assert parse([]).settings.stage == "dpo" and parse([]).settings.model == "demo"


@pytest.mark.parametrize("stage", TRAINING)
def test_a_stage_and_a_name_are_enough_to_resume(stage):
    """All else is in the run's run.json."""
    assert parse(["--stage", stage, "--name", "run", "--resume"]).settings.resume


MISTAKES = {
    "dpo --lr 3": "write --stage dpo: python train.py --stage dpo --lr 3",
    "--stage dop": "--stage dop: no such stage; did you mean dpo?",
    "--stage": "no such stage; there are data, sft",
    "--temperature 1": "--temperature belongs to --stage eval, chat; --stage dpo does not have it",
    "--dry_run": "there is no flag --dry_run; did you mean --dry-run?",
    "--lrr 3": "there is no flag --lrr; did you mean --lr?",
    "--xyzzy": "there is no flag --xyzzy; python train.py --stage dpo --help lists the flags",
    "--lr x": "--lr: invalid float value: 'x'",
    "--epochs 1.5": "--epochs: invalid int value: '1.5'",
    "--lr": "--lr: expected one argument",
    "--dtype fp16": "--dtype: invalid choice: 'fp16'",
    "xyzzy --lr 3": "'xyzzy' is not a flag",
    "--epochs 2 3": "'3' is not a flag, nor a value of the flag before it",
    "--lr 0": "--lr 0.0: must be positive",
    "--lr nan": "--lr nan: must be positive",
    "--eps 0.5": "--eps 0.5: is a flip rate, in [0, 0.5); at 0.5 the labels say nothing",
    "--eval-share 1": "--eval-share 1.0: must lie between 0 and 1",
    "--resume --overwrite": "--resume continues a run: it goes with neither --overwrite nor --dry-run",
    "--revision x": "--revision is for hub models; the demo has none",
    "--model x": "--train FILE.jsonl is missing: the rows to tune x on",
    "--eval x": "--eval needs --train",
    "--train x --eval y --eval-share 0.1": "--eval-share has no effect beside --eval; leave one of them out",
    "--max-length 512": "--max-prompt-length 512 leaves no room for an answer in --max-length 512",
    "--metric loss": "--metric loss: choose one of debiased_accuracy",
    "--lora-alpha 8": "--lora-alpha needs adapters; add --lora 16",
    "--lora 8 --base bf16 --dtype fp32": "--base bf16 needs --dtype bf16",
    "--lora 8 --base nf4 --compile": "--compile would keep the decoded weights of --base; leave it out",
    "--lora 8 --lora-targets ,": "--lora-targets ',': give some of q_proj,k_proj,v_proj,dense,fc1,fc2 with commas",
    "--lora 8 --lora-targets lm_head": "--lora-targets 'lm_head': give some of q_proj",
    "--lora 8 --lora-targets q_proj,query": "--lora-targets 'q_proj,query': give some of q_proj",
    "--stage mcq": "--model is missing: a directory, or a hub name such as microsoft/phi-2",
    "--stage mcq --model demo --train x": "--model cannot be the demo, which has no questions with options",
    "--stage mcq --model x": "--train FILE.jsonl is missing: the rows to tune x on",
    "--stage sft --last-turn-only --whole-text": "--last-turn-only has no effect beside --whole-text",
    "--stage sft --preset report": "--preset: invalid choice: 'report'",
    "--stage qat --to nf4 --preset 8gb": "--preset: invalid choice: '8gb'",
    "--stage qat": "--to is missing: number format of the weights (int8, llm.int8",
    "--stage qat --to nf4 --beta 1": "--beta is for --objective dpo; add that, or leave it out",
    "--stage quantize --to nf4": "--model is missing: a directory, or a hub name such as microsoft/phi-2",
    "--stage quantize --model x --to int8 --block 32": "--block has no effect on --to int8, which has one scale per row",
    "--stage chat": "--model is missing: a directory, or a hub name such as microsoft/phi-2",
    "--stage chat --model x --top-p 1.5": "--top-p 1.5: is a probability: above 0, at most 1",
    "--stage sweep": "--stage sweep takes either --grid FLAG=VALUES",
    "--stage sweep --grid beta=1 --preset report": "--stage sweep takes either",
    "--stage sweep --preset 8gb": "--preset: invalid choice: '8gb'",
    "--stage sweep --preset report --loss sigmoid": "--loss is for --grid; --preset report is about the robust loss",
    "--stage eval --model x --precisions nf5": "--precisions 'nf5': give some of fp32",
    "--stage eval --model x --precisions nf4 --dtype bf16": "--dtype has no effect beside --precisions",
    "--stage eval --model x x": "--model names a model twice",
    "--stage eval --model x --letter-only": "--letter-only is for --data; held-out rows are read as their run read them",
    "--stage eval --model x --samples 0 --bert y": "--bert needs answers; leave out --samples 0",
    "--stage eval --model x --budget 3": "--budget needs a teacher; add --teacher MODEL",
    "--stage data": "--sources is missing",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_line_that_says_what_to_type(line):
    with pytest.raises(InputError) as error:
        parse(line.split())
    assert MISTAKES[line] in str(error.value) and "\n" not in str(error.value)


def test_the_overview_fits_on_a_screen_and_names_every_stage():
    lines = overview().splitlines()
    assert len(lines) <= 24 and all(any(line.strip().startswith(f"{stage} ") for line in lines) for stage in STAGES)


@pytest.mark.parametrize("stage", STAGES)
def test_the_help_of_a_stage_has_a_line_for_each_of_its_flags_and_no_other(stage):
    lines = stage_help(stage).splitlines()
    flags = [line.split()[0] for line in lines if line.startswith("  --")]
    assert sorted(flags) == sorted(flag_name(f.name) for f in fields(STAGES[stage]))
    assert stage == "sweep" or len(lines) < 60


def test_help_comes_within_half_a_second_and_without_torch():
    code = "import sys; from runtime import flags; flags.stage_help('dpo'); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "False\n"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "train.py", "--stage", "dpo", "--help"], cwd=ROOT, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and b"--beta X" in done.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5  # of CPU: the machine may be busy


@pytest.mark.parametrize("words, status, told", [("--lrr 3", 2, "error: there is no flag --lrr; did you mean --lr?\n")])
def test_an_error_from_the_shell_is_one_line(words, status, told):
    done = subprocess.run([sys.executable, "train.py", *words.split()], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (status, "", told)


@pytest.mark.parametrize(
    "words, told",
    [
        ("--name ../x", "give a plain name"),
        ("--name .hidden", "give a plain name"),
        ("--name=", "--name is empty"),
        ("--out=a\x1b[2J", "--out 'a\\x1b[2J': give a directory whose name is plain text"),
        ("--out=a\udcff", "--out 'a\\udcff': give a directory whose name is plain text"),
        ("--lora=8 --lora-targets=", "--lora-targets '': give some of"),
        ("--device=", "--device is empty"),
        ("--seed 9223372036854775808", "--seed 9223372036854775808: must be a whole number from 0 to 2"),
        ("--seed -1", "--seed -1: must be"),
        ("--save-every 0", "--save-every 0: must be positive"),
        ("--lr nan", "--lr nan: must be positive"),
        ("--beta 1e999", "--beta inf: must be positive"),
        ("--loss dpo", "--loss: invalid choice: 'dpo'"),
        ("--loss sigmoid --eps 0.1", "--loss sigmoid takes no --eps; leave it out"),
        ("--loss conservative", "--loss conservative needs --eps, the share of labels that you believe to be flipped"),
    ],
)
def test_values_that_could_not_work_are_refused(words, told):
    with pytest.raises(InputError, match=re.escape(told)):
        parse(["--stage", "dpo", "--model", "x", "--train", "y", *words.split()])


def test_bytes_of_a_prompt_that_the_locale_does_not_know_are_read_as_utf_8():
    for argument, text in ((b"caf\xc3\xa9", "caf\u00e9"), (b"a\xff", "a\ufffd")):
        argument = argument.decode("ascii", "surrogateescape")  # as Python does under LC_ALL=C
        got = parse(["--stage", "chat", "--model", "x", "--prompt", argument, "--system-prompt", argument]).settings
        assert (got.prompt, got.system_prompt) == (text, text)


def test_the_largest_seed_and_an_empty_system_prompt_are_fine():
    got = parse(["--stage", "dpo", "--model", "x", "--train", "y", "--seed", str(2**63 - 1), "--system-prompt", ""]).settings
    assert (got.seed, got.system_prompt) == (2**63 - 1, "")
