"""bench.py's inference on the CPU, ours beside transformers': logits, generation, and decoding against the memory's speed.

    forward     logits of 4 x 256 tokens; the model of bench_training.py
    generate    greedy decoding of 1 and of 16 rows, 128 new tokens after 64; same model
    decode      8 layers, 1,024 wide, 51,200 tokens, fp32, one row: 32 new tokens after 16

One row of decoding multiplies each weight with one number: it can be no faster than the weights are read. `decode` states
bytes of weights x tokens a second beside the speed at which a buffer of the same size is read, by the faster of torch.sum
and torch.dot, in the same process, in turn: nothing is written, nothing else computed. (Keys, values and the one row of the
embedding are not counted: 0.3% here.)
"""

from collections.abc import Callable
from pathlib import Path

import torch

from bench.peers import load_phi
from bench.timing import medians, row
from bench.training import SHAPE
from model import Phi, PhiConfig, generate
from runtime.files import InputError

PROMPT, NEW_TOKENS = 64, 128
WIDE = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=8, num_attention_heads=16, partial_rotary_factor=0.5)


def prompts(rows: int, tokens: int, vocab_size: int) -> torch.Tensor:
    """Random token ids [rows, tokens], the same for the same sizes."""
    return torch.randint(vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(rows))


def greedy(model, ids: torch.Tensor, new_tokens: int) -> Callable:
    """run() -> the new tokens of each row, as lists: our `generate` or, for any other model, transformers'."""
    if isinstance(model, Phi):
        return lambda: generate(model, ids.tolist(), max_new_tokens=new_tokens)
    padded, mask = ids.to(model.device), torch.ones_like(ids).to(model.device)
    settings = dict(max_new_tokens=new_tokens, do_sample=False, pad_token_id=0, eos_token_id=None)
    return lambda: model.generate(padded, attention_mask=mask, **settings)[:, ids.shape[1] :].tolist()


def both_greedy(ours: Phi, theirs, ids: torch.Tensor, new_tokens: int) -> dict[str, Callable]:
    """Both, InputError if they do not generate the same tokens."""
    runs = {"ours": greedy(ours, ids, new_tokens), "peer": greedy(theirs, ids, new_tokens)}
    if runs["ours"]() != runs["peer"]():
        raise InputError("the two do not generate the same tokens; their times cannot be compared")
    return runs


@torch.no_grad()
def bench_forward(directory: Path, device: str, repeats: int) -> list[dict]:
    ours, theirs = Phi.from_pretrained(directory, device=device), load_phi(directory, device).eval()
    ids = prompts(4, 256, SHAPE["vocab_size"]).to(device)
    torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)
    seconds = medians({"ours": lambda: ours(ids), "peer": lambda: theirs(ids)}, max(repeats, 5), device)
    return [row("forward, 4 x 256 tokens / transformers", "s", seconds["ours"], seconds["peer"], "<= 1.0")]


def bench_generate(directory: Path, device: str, repeats: int) -> list[dict]:
    ours, theirs = Phi.from_pretrained(directory, device=device), load_phi(directory, device).eval()
    rows = []
    for size in (1, 16):
        runs = both_greedy(ours, theirs, prompts(size, PROMPT, SHAPE["vocab_size"]), NEW_TOKENS)
        speeds = {name: NEW_TOKENS * size / s for name, s in medians(runs, max(repeats, 5), device).items()}
        rows.append(row(f"generate, batch {size} / transformers", "tokens/s", speeds["ours"], speeds["peer"], ">= 1.5"))
    return rows


def read_bytes(model) -> int:
    """Bytes of weights that one step of decoding reads: all but the embedding, of which it reads one row."""
    state = {name: tensor for name, tensor in model.state_dict().items() if "embed_tokens" not in name}
    return sum(tensor.nbytes for tensor in state.values())


@torch.no_grad()
def bench_decode(directory: Path, device: str, repeats: int, new_tokens: int = 32, **shape) -> list[dict]:
    """`shape`: other fields of the config than WIDE's, for a quick test."""
    wide = directory / "wide"
    ours = Phi(PhiConfig(**(SHAPE | WIDE | shape))).init_weights(seed=0)
    ours.save_pretrained(wide)
    theirs, ours = load_phi(wide, device).eval(), ours.to(device)
    size = read_bytes(ours)
    buffer = torch.ones(size // 4, device=device)
    runs = both_greedy(ours, theirs, prompts(1, 16, ours.config.vocab_size), new_tokens)
    runs |= {"sum": buffer.sum, "dot": lambda: torch.dot(buffer, buffer)}
    seconds = medians(runs, max(repeats, 5), device)
    limit = size / min(seconds["sum"], seconds["dot"]) / 1e9
    ours_read = size * new_tokens / seconds["ours"] / 1e9
    case = f"decode, {ours.config.num_hidden_layers} layers, {ours.config.hidden_size:,} wide, batch 1"
    note = f"{size / 1e6:,.0f} MB of weights a token; the limit is a read of as many bytes (sum or dot) in turn with it"
    tokens = [new_tokens / seconds[name] for name in ("ours", "peer")]
    return [
        row(f"{case}, weights read / memory's limit", "GB/s", ours_read, limit, ">= 0.8", note=note),
        row(f"{case} / transformers", "tokens/s", *tokens),
    ]
