"""The demo's world: STEM questions, a tokenizer and a tiny random Phi, so that every stage runs without a download.

    demo.write_world("out/noisy", seed=1, flip_rate=0.4)          train.py writes its own world, out/demo-seed0

    DIR/  model/       a Phi with a million random weights, and its tokenizer
          sft.jsonl    answers to learn from, 40% of them right; qat.jsonl: the same kind, for training through rounding
          pairs.jsonl  preference pairs, a known share of which is labelled wrongly; pairs.truth.jsonl: which ones
          test.jsonl   pairs to compare models on, test.truth.jsonl. No question is in two of these files

A question names a person, a thing and one or two small numbers. Its right answer applies one law; its wrong answer makes
one of the mistakes that people make:

    Mia pushes a cart of mass 7 kg so that it accelerates at 8 m/s^2. What net force acts on it?

    right         Newton's second law: F = m * a = 7 * 8 = 56 N.
    "formula"     Newton's second law: F = m + a = 7 + 8 = 15 N.       correct arithmetic, wrong formula
    "unit"        Newton's second law: F = m * a = 7 * 8 = 56 kg.
    "arithmetic"  Newton's second law: F = m * a = 7 * 8 = 48 N.       the neighbour in the times table

All arithmetic is a look-up in a one-digit table, which a million parameters learn in minutes. So preferences have to teach
*which formula* to apply. No operator is always right (resistors in series add up, speed and time do not), and the longer
answer is right about as often as the shorter one. All answers have one shape, so two regular expressions in the truth file
grade a sampled answer: its method is right if formula, substitution and unit are; method and number, if the value is, too.
"""

import itertools
import random
import re
from collections import namedtuple
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from data import Row, Truth, write_truth
from model import Phi, PhiConfig
from runtime import parallel
from runtime.files import InputError, read_json, whole_directory, write_json, write_jsonl, write_text
from runtime.flags import settle
from runtime.runs import stored_settings


@dataclass(frozen=True)
class Kind:
    """One kind of question. Single letters in `right` and `wrong` are the quantities that the wordings give in {braces}."""
    name: str
    topic: str
    law: str                    # opens every answer
    right: str                  # the formula
    wrong: tuple[str, ...]      # formulas that people confuse with it
    units: tuple[str, ...]      # the right one first, then those that people confuse with it
    things: tuple[str, ...]     # what {thing} may be
    wordings: tuple[str, ...]   # {who} is one of NAMES


STAGES = ("sft", "dpo", "qat", "sweep")  # those that --model demo has rows for
NAMES = "Mia Tom Ana Ben Eva Leo Zoe Max Ida Sam Ada Jan Lea Kai Nora Finn Rosa Paul Lina Omar Yuki Amir Clara Hugo".split()
CARTS = ("cart", "sledge", "crate", "barrow", "box", "boat")
VEHICLES = ("bus", "tram", "train", "ferry", "van", "bike")
DEVICES = ("lamp", "heater", "motor", "coil", "kettle", "fan")
SOLUTES = ("salt", "sugar", "soda", "dye", "acid", "starch")
PLACES = ("garden", "field", "yard", "hall", "room", "court")
SOURCES = ("lab", "star", "comet", "mine", "magnet", "crystal")
LOTS = ("ball", "bead", "stone", "chip", "card", "ticket")
CLOTHES = ("shirt", "coat", "dress", "jacket", "scarf", "belt")
EVENTS = ("song", "film", "race", "test", "dance", "talk")
WAYS = ("road", "river", "track", "bridge", "canal", "trail")
WATERS = ("lake", "pond", "pool", "bay", "river", "canal")

KINDS = (
    Kind("force", "mechanics", "Newton's second law", "F = m * a", ("F = m + a", "F = m * 10"), ("N", "kg", "J"), CARTS, (
        "{who} pushes a {thing} of mass {m} kg so that it accelerates at {a} m/s^2. What net force acts on it?",
        "What force gives {who}'s {thing} an acceleration of {a} m/s^2, if its mass is {m} kg?",
        "Mass: {m} kg. Acceleration: {a} m/s^2. How hard must {who} push the {thing}?")),
    Kind("net force", "mechanics", "Opposite forces", "F = P - Q", ("F = P + Q",), ("N", "kg", "J"), CARTS, (
        "{who} pulls a {thing} with {P} N while friction holds it back with {Q} N. What is the net force?",
        "Friction of {Q} N opposes {who}, who pushes a {thing} with {P} N. Find the net force.",
        "Two forces act on {who}'s {thing} in opposite directions, {P} N and {Q} N. Which force is left?")),
    Kind("distance", "mechanics", "Steady motion", "s = v * t", ("s = v + t",), ("m", "s", "m/s"), VEHICLES, (
        "A {thing} moves at {v} m/s for {t} s while {who} watches. How far does it get?",
        "For {t} s {who} rides a {thing} at a steady {v} m/s. What distance is covered?",
        "How many metres does {who}'s {thing} travel in {t} s at a constant speed of {v} m/s?")),
    Kind("speed", "mechanics", "Steady motion", "v = s / t", ("v = t / s", "v = s - t"), ("m/s", "m", "s"), VEHICLES, (
        "{who}'s {thing} covers {s} m in {t} s. How fast is it?",
        "In {t} s a {thing} passes the {s} m between two posts that {who} has set up. What is its speed?",
        "{who} clocks a {thing} at {t} s for a track of {s} m. Find the speed.")),
    Kind("voltage", "electricity", "Ohm's law", "U = R * I", ("U = R + I", "U = I * I"), ("V", "A", "W"), DEVICES, (
        "A current of {I} A flows through {who}'s {thing} of {R} ohm. What is the voltage across it?",
        "{who} connects a {thing} with a resistance of {R} ohm and reads {I} A. Find the voltage.",
        "Resistance: {R} ohm. Current: {I} A. How many volts does {who} measure on the {thing}?")),
    Kind("current", "electricity", "Ohm's law", "I = U / R", ("I = R / U", "I = U - R"), ("A", "V", "W"), DEVICES, (
        "{who} puts {U} V across a {thing} of {R} ohm. What current flows?",
        "How many amperes pass through {who}'s {thing}, which has {R} ohm and is fed with {U} V?",
        "A {thing} has a resistance of {R} ohm. Find the current when {who} applies {U} V.")),
    Kind("series", "electricity", "Series circuit", "R = A + B", ("R = A * B",), ("ohm", "A", "V"), DEVICES, (
        "{who} wires a {thing} of {A} ohm in series with one of {B} ohm. What is the total resistance?",
        "The current flows first through a {thing} of {A} ohm, then a wire of {B} ohm. Which resistance does {who} measure?",
        "What single resistor can replace {who}'s {thing} of {A} ohm and a second one of {B} ohm, joined end to end?")),
    Kind("concentration", "chemistry", "Solution", "c = n / V", ("c = V / n", "c = n - V"), ("mol/L", "mol", "g"), SOLUTES, (
        "{who} stirs {n} mol of {thing} into {V} L of water. What is the concentration?",
        "A tank of {V} L holds {n} mol of {thing}. How concentrated is {who}'s solution?",
        "Volume: {V} L. Content: {n} mol of {thing}. Find the concentration for {who}.")),
    Kind("dissolved", "chemistry", "Solution", "m = c * V", ("m = c + V",), ("g", "L", "g/L"), SOLUTES, (
        "Every litre of water holds {c} g of {thing}. How many grams are in {who}'s {V} L?",
        "{who} needs {V} L of {thing} solution at {c} g/L. What mass of {thing} goes in?",
        "A jar of {thing} in water is marked {c} g/L and {V} L. Find the mass that {who} has dissolved.")),
    Kind("mass number", "chemistry", "Nucleus", "A = Z + N", ("A = 2 * Z",), ("nucleons", "protons", "neutrons"), SOURCES, (
        "An atom from a {thing} has {Z} protons and {N} neutrons. Which mass number does {who} write down?",
        "{who} counts {N} neutrons beside {Z} protons in a nucleus from a {thing}. How many particles are that?",
        "Protons: {Z}. Neutrons: {N}. Find the mass number of {who}'s atom from the {thing}.")),
    Kind("area", "geometry", "Rectangle", "A = a * b", ("A = a + b", "A = a * a"), ("m^2", "m", "m^3"), PLACES, (
        "{who}'s {thing} is {a} m long and {b} m wide. What is its area?",
        "How much ground does {who}'s rectangular {thing} of {a} m by {b} m cover?",
        "Length: {a} m. Width: {b} m. Which area has the {thing} in {who}'s plan?")),
    Kind("perimeter", "geometry", "Square", "P = 4 * a", ("P = a * a", "P = a + 4"), ("m", "m^2", "m^3"), PLACES, (
        "A square {thing} has sides of {a} m. How long is the fence that {who} puts around it?",
        "{who} walks once around a square {thing} of side {a} m. What distance is that?",
        "What is the perimeter of {who}'s {thing}, a square with a side of {a} m?")),
    Kind("urn", "probability", "Chance", "P = r / ( r + b )", ("P = b / ( r + b )", "P = 1 / ( r + b )"), ("", "%"), LOTS, (
        "A bag holds {r} red and {b} blue {thing}s. What is the chance that {who} draws a red one?",
        "{who} picks one {thing} blindly from {b} blue and {r} red ones. Find the probability of red.",
        "How likely is a red {thing} if {who} mixes {r} red with {b} blue ones and takes one?")),
    Kind("choices", "probability", "Counting rule", "n = a * b", ("n = a + b",), ("ways", "%", "hats"), CLOTHES, (
        "A {thing} comes in {b} colours and a hat in {a}. How many different outfits has {who}?",
        "How many choices has {who}, who takes one of {a} hats and then a {thing} in one of {b} sizes?",
        "First {who} picks a hat out of {a}, then a {thing} out of {b}. Find the number of outcomes.")),
    Kind("seconds", "units", "Conversion", "t = m * 60", ("t = m * 100", "t = m + 60"), ("s", "min", "h"), EVENTS, (
        "{who}'s {thing} takes {m} minutes. How many seconds is that?",
        "How many seconds does {who} spend on a {thing} of {m} minutes?",
        "The plan says that a {thing} lasts {m} minutes, but {who} has to enter seconds. Which number fits?",
        "Express the {m} minutes of {who}'s {thing} in seconds.")),
    Kind("metres", "units", "Conversion", "l = k * 1000", ("l = k * 100", "l = k * 10"), ("m", "km", "cm"), WAYS, (
        "{who}'s {thing} is {k} km long. How many metres is that?",
        "How many metres does {who} walk along a {thing} of {k} km?",
        "A map gives the length of a {thing} as {k} km, but {who} needs metres. Which number fits?",
        "Express the {k} km of the {thing} that {who} measured in metres.")),
    Kind("wave", "waves", "Wave speed", "v = f * w", ("v = f + w",), ("m/s", "Hz", "m"), WATERS, (
        "A wave on {who}'s {thing} has a frequency of {f} Hz and a wavelength of {w} m. How fast does it travel?",
        "{who} sees crests {w} m apart on a {thing}, and {f} of them pass every second. What is the wave speed?",
        "Frequency: {f} Hz. Wavelength: {w} m. Find the speed of the wave on the {thing} for {who}.")),
)

MISTAKES = {"formula": 0.7, "unit": 0.2, "arithmetic": 0.1}  # shares of the wrong answers


def make_questions(count: int, seed: int) -> list[dict]:
    """`count` questions with distinct texts, the same for the same seed, all kinds about equally often. There are 400,000
    texts; after 40,000 questions the kinds with a single number run out of new ones.

    Each is {"prompt", "kind", "topic", "answer", "wrong", "mistake", "parts"}: `mistake` says what is wrong in `wrong`, and
    `parts` are formula, substitution, value and unit of the right answer. Two seeds share a few questions.
    """
    rng = random.Random(seed)
    questions: dict[str, dict] = {}  # by their texts
    while len(questions) < count:
        if question := _question(rng.choice(KINDS), rng):
            questions.setdefault(question["prompt"].casefold(), question)
    return list(questions.values())


def _question(kind: Kind, rng: random.Random) -> dict | None:
    """One question of this kind. The wrong answer is the right one with one part replaced. None if a wrong formula gives
    the right value by chance: 2 + 2 = 2 * 2 would teach nothing."""
    numbers = _numbers(kind.right, rng)
    prompt = rng.choice(kind.wordings).format(who=rng.choice(NAMES), thing=rng.choice(kind.things), **numbers)
    [mistake] = rng.choices(list(MISTAKES), weights=MISTAKES.values())
    right = [kind.right, *_work_out(kind.right, numbers), kind.units[0]]
    formula, substitution, value, unit = right
    if mistake == "formula":
        formula = rng.choice(kind.wrong)
        substitution, value = _work_out(formula, numbers)
        if value == right[2]:
            return None
    elif mistake == "unit":
        unit = rng.choice(kind.units[1:])
    else:
        value = _slip(substitution, value, rng)
    answers = {"answer": _answer(kind.law, *right), "wrong": _answer(kind.law, formula, substitution, value, unit)}
    return {"prompt": prompt, "kind": kind.name, "topic": kind.topic, **answers, "mistake": mistake, "parts": right}


def _numbers(formula: str, rng: random.Random) -> dict[str, int]:
    """2 ... 9 for each letter right of the equals sign; a dividend or a minuend is made such that the result is 2 ... 9."""
    terms = formula.split()[2:]
    numbers = {letter: rng.randint(2, 9) for letter in terms if letter.isalpha()}
    match terms:
        case [dividend, "/", divisor]:
            numbers[dividend] *= numbers[divisor]
        case [minuend, "-", subtrahend]:
            numbers[minuend] += numbers[subtrahend]
    return numbers


def _work_out(formula: str, numbers: dict[str, int]) -> tuple[str, str]:
    """("F = m * a", {"m": 7, "a": 8}) -> ("7 * 8", "56"), numbers in the order of the formula."""
    substitution = " ".join(str(numbers.get(term, term)) for term in formula.split()[2:])
    first, operator, *rest = substitution.split()
    a = int(first)
    b = sum(int(term) for term in rest if term.isdigit())  # brackets contain only sums
    if operator == "/" and "(" in rest:
        return substitution, f"{a} / {b}"  # not reduced: a probability shows the cases that were counted
    if operator == "/":
        return substitution, f"{a // b}" if a % b == 0 else f"1 / {b // a}"  # the latter is the right formula upside down
    return substitution, str({"*": a * b, "+": a + b, "-": a - b}[operator])


def _slip(substitution: str, value: str, rng: random.Random) -> str:
    """A value that is a little wrong: a neighbour in the times table, or off by one or ten. Never negative or right."""
    if " / " in value:
        top, bottom = value.split(" / ")
        return f"{top} / {int(bottom) + rng.choice((-1, 1))}"
    steps = (int(substitution.split()[-1]),) if "*" in substitution else (1, 10)
    slips = [int(value) + sign * step for step in steps for sign in (-1, 1)]
    return str(rng.choice([slip for slip in slips if slip >= 0]))


def _answer(law: str, formula: str, substitution: str, value: str, unit: str) -> str:
    return f"{law}: {formula} = {substitution} = {value} {unit}".rstrip() + "."


def grades(parts: list[str]) -> dict[str, str]:
    """{grade: regex} for sampled answers, from the `parts` of the right one. The method is right if formula, substitution
    and unit are. The law in front is not graded. A text that rambles on after its answer gets no grade."""
    formula, substitution, value, unit = (re.escape(part) for part in parts)
    start = rf"(?:[^:=\n]+: )?{formula} = {substitution} = "
    end = rf" {unit}\." if unit else r"\."
    return {"right method": rf"{start}[0-9]+(?: / [0-9]+)?{end}", "right method and number": f"{start}{value}{end}"}


def make_sft_rows(questions: list[dict], right_share: float, seed: int) -> list[Row]:
    """One row a question, whose completion is the right answer with probability `right_share`, else the wrong one."""
    rng = random.Random(f"{seed}-right")
    return [_row(q, completion=q["answer" if rng.random() < right_share else "wrong"]) for q in questions]


def make_pair_rows(questions: list[dict], flip_rate: float, seed: int) -> list[Row]:
    """One pair a question, with its truth. In exactly round(flip_rate * len(questions)) of them, drawn by the seed, the
    wrong answer is the chosen one. ValueError if `flip_rate` is not in [0, 0.5)."""
    if not 0 <= flip_rate < 0.5:
        raise ValueError(f"flip rate {flip_rate}: it lies in [0, 0.5); labels that are flipped half of the time say nothing")
    flips = set(random.Random(f"{seed}-flips").sample(range(len(questions)), round(flip_rate * len(questions))))
    rows = []
    for i, q in enumerate(questions):
        chosen, rejected = ("wrong", "answer") if i in flips else ("answer", "wrong")
        rows.append(_row(q, Truth(i in flips, q["answer"], grades(q["parts"])), chosen=q[chosen], rejected=q[rejected]))
    return rows


def _row(q: dict, truth: Truth | None = None, **completions: str) -> Row:
    raw = {"prompt": q["prompt"], **completions, "topic": q["topic"]}
    return Row([{"role": "user", "content": q["prompt"]}], [*completions.values()], "demo", raw, truth=truth)


CONTROL_TOKENS = ("<|endoftext|>", "<|im_end|>", "<|im_start|>")
NUMBERS = sorted({*range(101), *(n * step for n in range(1, 11) for step in (60, 100, 1000))})  # all that the world shows

TINY_PHI = {  # config.json of a Phi with a million parameters; vocab_size comes from the tokenizer
    "model_type": "phi", "architectures": ["PhiForCausalLM"],
    "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
    "partial_rotary_factor": 0.5, "rope_theta": 10000.0, "max_position_embeddings": 1024,
    "layer_norm_eps": 1e-5, "hidden_act": "gelu_new", "initializer_range": 0.06, "tie_word_embeddings": False,
}


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """A byte-level BPE of at most 768 entries, the same for the same texts. Any text decodes back unchanged.

    Every number of the world, with the blank before it, is a single token: a model this small learns 7 * 8 = 56 as one
    fact about three symbols. The control tokens have the last three ids.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=768 - len(CONTROL_TOKENS), show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    numbers = "".join(f" {n}" for n in NUMBERS)  # once per text, so that they outnumber words and are merged first
    tokenizer.train_from_iterator([*texts, *[numbers] * max(1, len(texts))], trainer)
    tokenizer.add_special_tokens(list(CONTROL_TOKENS))  # added after training, they come last
    return tokenizer


SIZES = {"sft": 26_000, "qat": 4_000, "pairs": 7_000, "test": 3_000}  # questions of each file, in this order
RIGHT_SHARE = 0.4  # of SFT answers; a model tuned on them samples the right method about half the time
World = namedtuple("World", ("model", *SIZES))  # the paths of its files


def write_world(directory: str | Path, seed: int = 0, flip_rate: float = 0.2, sizes: dict[str, int] | None = None) -> World:
    """Writes a world, complete or not at all, unless `directory` holds it already (of any size, if no `sizes` are given to
    replace some of SIZES). InputError if it holds something else, ValueError for an impossible flip rate."""
    directory = Path(directory)
    world = World(directory / "model", *(directory / f"{name}.jsonl" for name in SIZES))
    settings = {"seed": seed, "flip_rate": flip_rate, "sizes": SIZES | (sizes or {})}
    if directory.exists() and any(directory.iterdir()):
        found = read_json(directory / "world.json")
        wanted = settings if sizes else settings | {"sizes": found.get("sizes")}
        if found != wanted:
            raise InputError(f"{directory} holds a world with {found}, not with {wanted}; choose another directory")
        return world
    sizes = settings["sizes"]
    questions = make_questions(max(2_000, sum(sizes.values())), seed)
    with whole_directory(directory) as made:
        tokenizer = train_tokenizer([f"{q['prompt']}\n{q[part]}" for q in questions[:2_000] for part in ("answer", "wrong")])
        config = PhiConfig.from_dict({**TINY_PHI, "vocab_size": tokenizer.get_vocab_size()})
        Phi(config).init_weights(seed).save_pretrained(made / "model")
        write_text(made / "model" / "tokenizer.json", tokenizer.to_str(pretty=True))
        left = iter(questions)
        for name, count in sizes.items():
            part = list(itertools.islice(left, count))
            if name in ("sft", "qat"):
                rows = make_sft_rows(part, RIGHT_SHARE, seed)
            else:
                rows = make_pair_rows(part, flip_rate, seed if name == "pairs" else seed + 1)
            write_jsonl(made / f"{name}.jsonl", [row.raw for row in rows])
            write_truth(made / f"{name}.jsonl", rows)
        write_json(made / "world.json", settings)
    return world


def stages(settings: Any) -> list[Any]:
    """The stages to run for a command: its own and, on the demo, before it the SFT stage whose model it starts from."""
    if settings.stage not in STAGES or settings.model != "demo":
        return [settings]
    world = write_world(Path(settings.out) / f"demo-seed{settings.seed}", settings.seed)
    if settings.stage == "sft":
        return [replace(settings, model=str(world.model), train=settings.train or str(world.sft))]
    first = Path(settings.out) / f"demo-sft-seed{settings.seed}"
    rows = world.qat if settings.stage == "qat" and settings.objective == "sft" else world.pairs
    asked = replace(settings, model=str(first), train=settings.train or str(rows))
    if settings.stage == "sweep":
        asked = replace(asked, data=settings.data or str(world.test))
    if (first / "results.json").exists():
        return [asked]
    if settings.dry_run:
        print("The demo's SFT model is not there yet; a real run makes it first. Shown here: its untrained model.")
        return [replace(asked, model=str(world.model))]
    if (first / "run.json").exists():
        before = replace(stored_settings(first), resume=True, out=settings.out, device=settings.device)
    else:
        given = {"name": first.name, "out": settings.out, "seed": settings.seed, "device": settings.device}
        before = parallel.on_this_machine(settle("sft", given).settings)
    return [*stages(before), asked]
