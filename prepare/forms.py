"""The forms of a row: which of its fields hold the prompt and the answers.

    pairs   {"prompt", "chosen", "rejected"}, and whole dialogues, or two responses with a verdict
    sft     {"prompt", "completion"}, {"messages"}, {"instruction", "input", "output"}, ...
    mcq     {"question", "choices", "answer"}, ...

The fields decide, never their values: the first form in FORMS counts whose fields a row all has. A field that is null is
absent. All other fields mean nothing to the program. docs/rows.md lists the forms.

A field may hold text, messages ({"role", "content"} or {"from", "value"}), or a dialogue that was written as one text, in
ChatML or as "\\n\\nHuman: ... \\n\\nAssistant: ...". Whatever it is becomes messages first.
"""

import contextlib
import functools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from data import IM_END, IM_START, LETTERS, Row, lettered

ROLES = dict(system="system", user="user", human="user", assistant="assistant", gpt="assistant", chatgpt="assistant")
# What no row can teach as text, and what says with 0 or false that a message is not to be learned.
NOT_TEXT = {*"tool_calls function_call reasoning_content reasoning thinking refusal image images audio".split()}
WEIGHTS = ("weight", "train", "loss", "loss_mask")
CHATML = re.compile(r"<\|im_start\|>(\w+)(?:\n|\Z)(.*?)(?:<\|im_end\|>\s*|(?=<\|im_start\|>)|\Z)", re.DOTALL)
SPOKEN = re.compile(r"\n\n(Human|Assistant):(.*?)(?=\n\n(?:Human|Assistant):|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Form:
    """The fields that a row of one form has."""

    prompt: str = ""  # the prompt or, without answers, the whole dialogue; empty where each answer is a whole dialogue
    answers: tuple[str, ...] = ()  # the completion, or two responses, the better one first ...
    verdict: tuple[str, ...] = ()  # ... unless these say which is the better one: a field that names it, or their two scores
    options: str = ""  # of a multiple-choice question

    def fields(self) -> list[str]:
        return [name for name in (self.prompt, *self.answers, *self.verdict, self.options) if name]


PROMPTS = ("prompt", "conversations", "messages", "question", "instruction", "history", "input", "")
RIVALS = ("response_a response_b", "response_0 response_1", "response_1 response_2", "answer_0 answer_1")
RIVALS += ("conversation_a conversation_b", "human_ref_A human_ref_B")
VERDICTS = ("preference", "label", "winner", "better_response_id")


def _pair_forms() -> Iterator[Form]:
    answers = [Form(answers=("chosen", "rejected")), Form(answers=("response_j", "response_k"))]
    for two in (tuple(names.split()) for names in RIVALS):
        scores = tuple(f"score_{_suffix(name)}" for name in two)
        answers += [Form(answers=two, verdict=verdict) for verdict in (*((name,) for name in VERDICTS), scores)]
    return (replace(form, prompt=prompt) for form in answers for prompt in PROMPTS)


def _suffix(name: str) -> str:
    return name.rpartition("_")[2]


FORMS = {
    "pairs": [*_pair_forms()],
    "sft": [
        Form("messages"),
        Form("conversations"),
        Form("prompt", ("completion",)),
        Form("prompt", ("response",)),
        Form("instruction", ("output",)),  # with "input" or "context", if they are there
        Form("instruction", ("response",)),
        Form("question", ("answer",)),
        Form("question", ("response",)),
        Form("text"),
    ],
    "mcq": [
        Form("question", ("answer",), options="choices"),
        Form("question", ("answer",), options="options"),
        Form("question", ("answerKey",), options="choices"),
        Form("question_stem", ("answerKey",), options="choices"),
        Form("question", ("answer",)),  # the options are in the question's text
    ],
}
RENDERED = ", in ChatML"  # what `Row.form` ends with if the texts hold ChatML's marks


def read_row(kind: str, raw: dict, where: str = "") -> Row:
    """A row, checked; ValueError says why it cannot be used. `kind`: "pairs"; "sft", or "sft last" to learn only the last
    reply of a dialogue; "mcq", or "mcq letter" to learn the letter without the explanation. `where`: "file:record"."""
    row = {name: value for name, value in raw.items() if value is not None}
    family = kind.partition(" ")[0]
    form = find_form(family, frozenset(row))
    if isinstance(form, str):
        raise ValueError(form)
    made = {"pairs": read_pair, "sft": read_sft, "mcq": read_mcq}[family](row, form, kind)
    made.where, made.raw = where, raw
    made.form = ", ".join(form.fields()) + ("" if form.prompt else " (two dialogues with a shared prompt)")
    if any(_marked(row[name]) for name in form.fields()):
        made.form += RENDERED
    return made


@functools.lru_cache(1024)
def find_form(family: str, found: frozenset[str]) -> Form | str:
    """The form of a row with these fields, or why there is none. `family`: "pairs", "sft" or "mcq"."""
    for form in FORMS[family]:
        if found.issuperset(form.fields()):
            return form
    nearest = _nearest(family, found)
    missing = next(name for name in nearest.fields() if name not in found)
    shown = ", ".join(re.sub(r"\s+", " ", name)[:40] for name in sorted(map(str, found))[:20]) or "none"
    return f'"{missing}" is missing: the fields are {shown}; the nearest form is {", ".join(nearest.fields())}'


def _nearest(family: str, found: frozenset[str]) -> Form:
    """The form that lacks the smallest share of its fields."""
    return max(FORMS[family], key=lambda form: len(found.intersection(form.fields())) / len(form.fields()))


def kind_of_fields(found: frozenset[str], letter_only: bool = False) -> str:
    """Whether a row with these fields is one of "pairs", "mcq" or "sft". A question without options is multiple choice only
    if letters are asked for."""
    for family in ("pairs", "mcq", "sft"):
        form = find_form(family, found)
        if isinstance(form, Form) and (family != "mcq" or form.options or letter_only):
            return family
    return max(("pairs", "mcq", "sft"), key=lambda family: len(found.intersection(_nearest(family, found).fields())))


# ------------------------------------------------------------------------------------------------------- text and messages


def as_text(value: object, name: str, blank: bool = False) -> str:
    """`value` if it is a string, not empty unless `blank` ones will do; ValueError says what is wrong."""
    if value is None:
        raise ValueError(f'"{name}" is missing')
    if not isinstance(value, str):
        raise ValueError(f'"{name}" is {type(value).__name__}, not text')
    if not (blank or value.strip()):
        raise ValueError(f'"{name}" is empty')
    if not value.isascii() and re.search("[\ud800-\udfff]", value):
        raise ValueError(f'"{name}" holds half of a surrogate pair, which is no character')
    return value


def _marked(value: object) -> bool:
    """Whether a text, or one inside a list or an object, holds ChatML's marks."""
    if isinstance(value, str):
        return IM_START in value or IM_END in value
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(map(_marked, parts))


def _turns(text: str, name: str) -> list[dict] | None:
    """The turns of a dialogue that was written as one text; None for any other text. An empty last turn of the assistant is
    the place where it should answer, not a turn."""
    if text.lstrip().startswith(IM_START):
        if CHATML.sub("", text).strip():
            raise ValueError(f'"{name}" has {IM_START}, but not all of it are turns in ChatML')
        turns = CHATML.findall(text)
    elif text.lstrip().startswith("Human:") and "\n\nAssistant:" in text:
        turns = [(role, said.strip()) for role, said in SPOKEN.findall("\n\n" + text.lstrip())]
    else:
        return None
    if turns[-1][0].lower() == "assistant" and not turns[-1][1].strip():
        turns.pop()
    return [{"role": role.lower(), "content": said} for role, said in turns]


def _reply_text(value: object, name: str) -> str:
    """An assistant's text without ChatML's end mark: `ChatML.reply` writes the token itself. The marks' characters must not
    be taught."""
    text = as_text(value, name)
    while text.rstrip().endswith(IM_END):
        text = text.rstrip().removesuffix(IM_END)
    if _marked(text):
        raise ValueError(f'"{name}" has {IM_START} or {IM_END} inside; give the turns as messages')
    return as_text(text, name)


def _messages(row: dict, name: str, speaker: str = "user") -> list[dict]:
    """What a field holds as messages {"role", "content", "learned"}. Text without turns is one message of the `speaker`. The
    first message alone may be the system's; if it is empty, it is none."""
    value = row.get(name)
    if isinstance(value, str):
        value = _turns(value, name) or [{"role": speaker, "content": value}]
        places = [name] * len(value)
    else:
        value = [value] if isinstance(value, dict) else value
        if not isinstance(value, list) or not value:
            raise ValueError(f'"{name}" is neither text nor a list of messages')
        places = [f"{name}[{i}].content" for i in range(len(value))]
    messages = []
    for i, (message, place) in enumerate(zip(value, places)):
        message = {part: said for part, said in message.items() if said is not None} if isinstance(message, dict) else {}
        role = ROLES.get(str(message.get("role", message.get("from"))))
        if role is None or (role == "system" and i > 0):
            raise ValueError(f'"{name}"[{i}] is no message of the user, the assistant or, as the first, the system')
        if unlearned := [part for part in NOT_TEXT & message.keys() if message[part]]:
            raise ValueError(f'"{name}"[{i}] has {unlearned[0]}, which cannot be learned as text')
        weights = [message[part] for part in WEIGHTS if part in message]
        if any(type(weight) not in (int, float, bool) or weight not in (0, 1) for weight in weights):
            raise ValueError(f'"{name}"[{i}] has a weight other than 0 and 1, or false and true')
        content = _joined(message.get("content", message.get("value")), place)
        if role == "system" and not str(content or "").strip():
            continue
        content = _reply_text(content, place) if role == "assistant" else as_text(content, place)
        learned = role == "assistant" and all(weights)
        messages.append({"role": role, "content": content, "learned": learned})
    if not messages:
        raise ValueError(f'"{name}" holds nothing but an empty system message')
    return messages


def _joined(content: object, name: str) -> object:
    """The text of a message that is given in parts, if all of them are text. Any other content stays as it is."""
    if not isinstance(content, list):
        return content
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f'"{name}" has a part that is not text, such as an image')
    return "".join(part["text"] for part in content)


def _prompt(row: dict, name: str) -> list[dict]:
    """The prompt as messages: the field `name`, or none, with a task's input below it and the system's text before it."""
    messages = _messages(row, name) if name else []
    if name == "instruction":
        for more in ("input", "context"):
            if row.get(more, "") != "":
                messages[-1]["content"] += "\n\n" + as_text(row[more], more)
    for system in ("system", "system_prompt"):
        if row.get(system, "") != "":
            messages.insert(0, {"role": "system", "content": as_text(row[system], system), "learned": False})
    if sum(message["role"] == "system" for message in messages) > 1:
        raise ValueError("there are two system turns; give one of them")
    return messages


def _dialogue(row: dict, prompt: list[dict], form: Form, name: str) -> list[dict]:
    """The dialogue that ends with the answer in the field `name`: the prompt and that answer or, where the field repeats the
    prompt, what the field holds."""
    said = _messages(row, name, "assistant")
    asked = [message for message in prompt if message["role"] != "system"]
    if said[-1]["role"] != "assistant":
        raise ValueError(f'"{name}" ends with the user, not with the assistant')
    if said[0]["role"] == "assistant":
        if not asked:
            raise ValueError(f'"{name}" is an answer without its question; give the question as "prompt"')
        if asked[-1]["role"] != "user":
            raise ValueError(f'"{form.prompt}" ends with the assistant, not with the user')
        return [*prompt, *said]
    texts = {message["content"].strip() for message in said}
    if any(message["content"].strip() not in texts for message in asked):
        raise ValueError(f'"{name}" is a whole dialogue, but the prompt is not in it')
    return said if said[0]["role"] == "system" else [*prompt[: len(prompt) - len(asked)], *said]


def _plain(messages: list[dict]) -> list[dict]:
    return [{"role": message["role"], "content": message["content"]} for message in messages]


# ------------------------------------------------------------------------------------------------------------ the readers


def read_pair(row: dict, form: Form, kind: str) -> Row:
    """A preference pair. What both dialogues share is the prompt; each must go on with one answer."""
    better, worse = ranked(row, form)
    prompt = _prompt(row, form.prompt)
    chosen, rejected = (_plain(_dialogue(row, prompt, form, name)) for name in (better, worse))
    if chosen == rejected:
        raise ValueError(f'"{better}" and "{worse}" are the same text: there is nothing to prefer')
    shared = 0
    while chosen[shared : shared + 1] == rejected[shared : shared + 1]:
        shared += 1
    if {len(chosen), len(rejected)} != {shared + 1} or shared == 0 or chosen[shared - 1]["role"] != "user":
        raise ValueError(
            f'"{better}" and "{worse}" part before their last user turn, so they have no shared prompt with an answer each. '
            'Cut both after the first answers that differ, or learn the better ones as {"messages": [...]} with --stage sft'
        )
    return Row(chosen[:shared], [chosen[shared]["content"], rejected[shared]["content"]], "", {})


def ranked(row: dict, form: Form) -> tuple[str, str]:
    """The names of the fields with the better and the worse answer."""
    first, second = form.answers
    values = [str(row[name]) for name in form.verdict]
    for name, value in zip(form.verdict if len(values) == 2 else (), values):
        if not re.fullmatch(r"\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*", value):
            raise ValueError(f'"{name}" is {value[:40]!r}, not a number')
    for better, worse, i in ((first, second, 0), (second, first, 1)):
        names = [name.casefold() for name in (better, _suffix(better), f"model_{_suffix(better)}")]
        by_score = len(values) == 2 and float(values[i]) > float(values[1 - i])
        if not values or by_score or (len(values) == 1 and values[0].removesuffix(".0").strip().casefold() in names):
            return better, worse
    told = " and ".join(f'"{name}" {value[:40]!r}' for name, value in zip(form.verdict, values))
    raise ValueError(f"{told} do not say which of {first} and {second} is better")


def read_sft(row: dict, form: Form, kind: str) -> Row:
    """Replies to learn. Of a whole dialogue that is every reply but those marked "weight": 0 or "train": false."""
    if row.get("label") is False:  # as in the rows of KTO
        raise ValueError('"label" is false: the answer was judged to be bad, and SFT would imitate it')
    dialogue, name = _prompt(row, form.prompt), form.prompt
    if form.answers:
        (name,) = form.answers
        dialogue = _dialogue(row, [message | {"learned": False} for message in dialogue], form, name)
    if dialogue[-1]["role"] != "assistant":
        raise ValueError(f'"{name}" ends with the user, not with the assistant')
    learned = []
    for i, message in enumerate(dialogue):
        if message["role"] == "assistant" and i > 0 and dialogue[i - 1]["role"] == "assistant":
            raise ValueError(f'"{name}" has no user message between two replies')
        if message["learned"] and i > 0 and dialogue[i - 1]["role"] == "user":
            learned.append(i)
    if not learned:
        raise ValueError(f'"{name}" has no reply to a user that is to be learned')
    first = learned[-1 if kind == "sft last" else 0]
    later = dialogue[first + 1 : learned[-1] + 1]
    return Row(_plain(dialogue[:first]), [dialogue[first]["content"]], "", {}, later=later)


def written_options(question: str) -> list[str]:
    """The options in a question's own text, "A. ..." or "A) ..." each on a new line, after "Options:" if that is there.
    Their letters must run A, B, C, ..."""
    _, _, tail = question.rpartition("Options:")
    found = re.findall(r"(?ms)^([A-J])\s*[.)][ \t]*(.*?)(?=^[A-J]\s*[.)]|^Answer:|\Z)", tail)
    if "".join(letter for letter, _ in found) != LETTERS[: len(found)]:
        raise ValueError('the options in "question" are not lettered A, B, C, ...')
    return [text.strip() for _, text in found]


def named_options(value: object, name: str, blank: bool = False) -> dict[str, str]:
    """{label: text} of the options in a field: a list of texts, whose labels are letters, a list of {"label", "text"}, or
    {"label": [...], "text": [...]}."""
    if isinstance(value, str) and value.lstrip().startswith("["):  # in a cell of CSV
        with contextlib.suppress(json.JSONDecodeError):
            value = json.loads(value)
    if isinstance(value, dict) and value.keys() >= {"label", "text"}:
        texts, labels = value["text"], value["label"]
    elif isinstance(value, list) and value and all(isinstance(option, dict) for option in value):
        texts, labels = ([option.get(part) for option in value] for part in ("text", "label"))
    else:
        texts, labels = value, list(LETTERS[: len(value)]) if isinstance(value, list) else []
    counted = isinstance(texts, list) and isinstance(labels, list) and 2 <= len(texts) <= len(LETTERS)
    if not counted or len({str(label) for label in labels}) != len(texts):
        raise ValueError(f'"{name}" is not a list of 2 to {len(LETTERS)} texts, nor of texts with a label each')
    return {str(label): as_text(text, name, blank) for label, text in zip(labels, texts)}


def read_mcq(row: dict, form: Form, kind: str) -> Row:
    """A multiple-choice question. The reply is the explanation, if there is one, and then "Answer: C"."""
    (key,) = form.answers
    question, answer = as_text(row[form.prompt], form.prompt), row[key]
    if isinstance(answer, str):
        answer = answer.strip().strip("().").strip()  # "(B)", "B."
    if form.options:
        options = named_options(row[form.options], form.options)
        question = f"Question: {question}\n\nOptions:\n{lettered(options.values())}\n\nAnswer:"
    else:
        options = dict(zip(LETTERS, written_options(question)))
    labels, choices = list(options), list(options.values())
    for i, choice in enumerate(choices):
        if (same := [text.strip() for text in choices].index(choice.strip())) < i:
            raise ValueError(f"options {LETTERS[same]} and {LETTERS[i]} are the same text, so no letter is right alone")
    said = next((text for text in (str(answer), str(answer).upper()) if text in labels), None)
    if said and type(answer) in (str, int):
        right = labels.index(said)
    elif type(answer) is int and 0 <= answer < len(choices) and not labels[0].isdigit():
        right = answer
    else:
        raise ValueError(f'"{key}" is {str(answer)[:60]!r}, not the letter of an option, nor its number from 0 on')
    explanation = as_text(row.get("explanation", ""), "explanation", blank=True).strip()
    letter = LETTERS[right]
    reply = letter if kind == "mcq letter" else f"{explanation}\n\nAnswer: {letter}".strip()
    return Row([{"role": "user", "content": question}], [reply], "", {}, choices, right)
