"""README.md and docs/: short, with links that lead somewhere, commands that run, and names and figures that are true."""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import demo
from model import PhiConfig
from runtime import flags, memory
from runtime.files import read_json
from runtime.settings import STAGES, TRAINING

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, *DOCS]
WALK = "<!-- walk -->"


def code_blocks(text):
    """The code blocks of a page, indented or fenced, each with whether `<!-- walk -->` stands before it."""
    fenced = r"```\w*\n(?:.*\n)*?```"
    indented = r"(?<=\n\n)(?: {4}.*\n+)+"
    for found in re.finditer(f"{fenced}|{indented}", text):
        yield found[0], text[: found.start()].rstrip().endswith(WALK)


def prose(text):
    """A page without its code."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return "\n".join(line for line in text.splitlines() if not line.startswith("    "))


def commands(text, walk=False):
    """The words of every command in a page's code blocks; with `walk`, only in those that are marked."""
    made = []
    for block, marked in code_blocks(text):
        for line in block.replace("\\\n", " ").splitlines():
            if line.strip().startswith(("python ", "pip ", "torchrun ")) and (marked or not walk):
                made += [shlex.split(command, comments=True) for command in line.split("&&")]
    return made


def slug(heading):
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(page):
    text = page.read_text(encoding="utf-8")
    return {slug(heading) for heading in re.findall(r"(?m)^#+ (.+)$", text)} | set(re.findall(r'<a id="(\w+)">', text))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_are_short(page):
    lines = len(page.read_text(encoding="utf-8").splitlines())
    assert lines <= (200 if page == README else 250)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text(encoding="utf-8")))
    broken = []
    for link in links:
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert links and not broken


def test_every_page_of_docs_is_linked_from_the_readme():
    text = README.read_text(encoding="utf-8")
    assert [page.name for page in DOCS if f"(docs/{page.name})" not in text] == []


TERMS = (
    "DPO SFT reference reward margin beta eps nats KL NF4 absmax LoRA QLoRA QAT FSDP2 MFU McNemar teacher the-report "
    "robust-DPO flip-rate truth-file"
).split()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_that_uses_a_term_links_to_its_explanation(page):
    if page.name == "glossary.md":
        assert {slug(term) for term in TERMS} <= anchors(page)
        return
    text = prose(page.read_text(encoding="utf-8"))
    text = re.sub(r"`[^`]*`|\[[^]]*\]\([^)]*\)|(?m:^\|.*\|$)", "", text)  # names in code, links, cells of tables
    used = [term for term in TERMS if re.search(rf"\b{term.replace('-', ' ')}\b", text)]
    missing = [term for term in used if f"glossary.md#{slug(term)}" not in page.read_text(encoding="utf-8")]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_train_py_understands_every_command(page):
    """Flags that do not exist, or do not go together, are an error here; whether the files exist is not asked."""
    for words in commands(page.read_text(encoding="utf-8")):
        if "train.py" in words and "..." not in words and "--help" not in words:
            flags.parse(words[words.index("train.py") + 1 :])


def test_the_functions_that_the_readme_names_exist():
    section = README.read_text(encoding="utf-8").partition("## I want to learn")[2].partition("\n## ")[0]
    named = set(re.findall(r"`([A-Za-z_][\w.]*)`", section))
    assert len(named) > 10
    defined = set()
    files = ("prepare/rows.py", "prepare/forms.py", "runtime/settings.py")
    for path in [*ROOT.glob("*.py"), *(ROOT / name for name in files)]:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign):
                defined |= {target.id for target in node.targets if isinstance(target, ast.Name)}
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names = [getattr(part, "name", getattr(getattr(part, "target", None), "id", "")) for part in node.body]
                defined |= {node.name, *(f"{node.name}.{name}" for name in names)}
    assert named - defined == set()


def test_the_readme_quotes_the_example():
    [quoted] = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    example = (ROOT / "examples" / "from_python.py").read_text(encoding="utf-8").splitlines()
    assert [line for line in quoted.splitlines() if line not in example] == []


@pytest.mark.parametrize("page", [README, ROOT / "docs" / "adapters-and-memory.md"], ids=lambda page: page.name)
@pytest.mark.parametrize("preset", ["8gb", "24gb", "80gb", "report"])
def test_the_memory_of_a_preset_is_what_the_estimate_says(page, preset):
    """For pairs whose two answers are as long as the preset allows, and CUDA's own 0.6 GB."""
    [row] = re.findall(rf"(?m)^\| `{preset}` .*$", page.read_text(encoding="utf-8"))
    printed = float(re.search(r"([\d.]+) GB", row)[1])
    settings = flags.parse(["--preset", preset, "--model", "DIR", "--train", "pairs.jsonl"]).settings
    settings = replace(settings, device="cuda")
    parts = memory.estimate(PhiConfig(), settings, tokens=settings.micro_batch_size * 2 * settings.max_length)
    assert printed == pytest.approx(0.6 + sum(parts.values()) / 1e9, rel=0.03)


def test_the_project_is_as_small_as_the_readme_says():
    sentence = re.search(r"The project stays small:(.*?)\.\n", README.read_text(encoding="utf-8"), re.DOTALL)[1]
    files, longest, lines, tuning, every = (int(n.replace(",", "")) for n in re.findall(r"\d[\d,]*\b", sentence))
    root = list(ROOT.glob("*.py"))
    rooms = ("runtime", "prepare", "metrics", "publish", "experiments", "bench")
    sizes = [
        len(path.read_text(encoding="utf-8").splitlines())
        for path in [*root, *(p for r in rooms for p in (ROOT / r).glob("*.py"))]
    ]
    names = {stage: {f.name for f in fields(settings)} for stage, settings in STAGES.items()}
    assert len(root) <= files and max(sizes) <= longest and sum(sizes) <= lines
    assert len(set().union(*(names[stage] for stage in TRAINING))) <= tuning
    assert len(set().union(*names.values())) <= every


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of the project's code with a demo world that is there already, small enough for a few seconds of training: a
    hundred questions, one layer."""
    directory = tmp_path_factory.mktemp("clone")
    for path in ROOT.iterdir():
        if path.suffix == ".py":
            shutil.copy(path, directory)
        elif (path / "__init__.py").exists():
            shutil.copytree(path, directory / path.name, ignore=shutil.ignore_patterns("__pycache__"))
    world = demo.write_world(directory / "out" / "demo-seed0", sizes={"sft": 100, "qat": 0, "pairs": 60, "test": 0})
    config = read_json(world.model / "config.json")
    (world.model / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    weights = load_file(world.model / "model.safetensors")
    kept = {name: w for name, w in weights.items() if ".layers." not in name or ".layers.0." in name}
    save_file(kept, world.model / "model.safetensors")
    return directory


@pytest.mark.slow
def test_the_walk_runs(clone):
    """The commands of the README that are marked as its walk, in their order, each as it is printed."""
    walk = [words for words in commands(README.read_text(encoding="utf-8"), walk=True) if words[0] == "python"]
    walk = [words for words in walk if words[1:] != ["-m", "pytest"]]
    assert walk[0] == ["python", "train.py", "--stage", "dpo"] and len(walk) >= 5
    for words in walk:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, *words[1:]], cwd=clone, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
    assert words[-1] == "examples.from_python" and "loss 0.6931" in done.stdout  # ln 2, before the first step
