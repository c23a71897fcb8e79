"""What tests/runtime/test_parallel.py runs under torchrun: `ranks.py MODEL FOLDER ENDING`. Every function named check_* runs
on all ranks; FOLDER/checks.json says for each which ranks it failed on, and how. Then the job comes to one of the ENDINGs:
"killed" in mid-step, or a "mistake" that one rank alone notices."""

import functools
import json
import os
import signal
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from data import Example, collate  # noqa: E402
from lora import add_lora  # noqa: E402
from model import Phi, completion_logprobs  # noqa: E402
from quant import train_quantized  # noqa: E402
from runtime import parallel  # noqa: E402
from runtime.files import InputError  # noqa: E402
from runtime.flags import settle  # noqa: E402
from runtime.optimizer import AdamW8bit  # noqa: E402
from train import clip_gradients, step_gradients  # noqa: E402

TINY, FOLDER = Path(sys.argv[1]), Path(sys.argv[2])
close = functools.partial(torch.testing.assert_close, atol=1e-6, rtol=1e-5)


def pairs(count: int) -> list[Example]:
    """Pairs of all lengths, the same on every rank."""
    draw = torch.Generator().manual_seed(count)
    ids = lambda n: torch.randint(1, 256, (n,), generator=draw).tolist()  # noqa: E731
    return [Example(ids(3 + 5 * i % 11), [ids(2 + 3 * i % 7), ids(1 + i % 4)]) for i in range(count)]


# ------------------------------------------------------------------------------------------------------------- loading


class Counted:
    """A slice of a safetensors file that counts the values that are read from it."""

    read = 0

    def __init__(self, stored):
        self.stored = stored

    def __getitem__(self, rows):
        part = self.stored[rows]
        Counted.read += part.numel()
        return part


def load_sharded(directory: Path) -> Phi:
    return Phi.sharded(directory, "cpu")


def check_each_rank_reads_and_holds_its_share():
    whole, Counted.read, copy = Phi.from_pretrained(TINY), 0, parallel.copy_own_rows
    parallel.copy_own_rows = lambda x, stored: copy(x, Counted(stored))
    model = load_sharded(TINY)
    parallel.copy_own_rows = copy
    held = 0
    for (name, p), (expected, q) in zip(model.named_parameters(), whole.named_parameters(), strict=True):
        begin, end = parallel.own_rows(p)
        assert name == expected and end - begin <= -(-len(q) // parallel.size())
        assert torch.equal(parallel.own(p), q[begin:end])
        held += parallel.own(p).numel()
    assert Counted.read == held
    total = sum(p.numel() for p in whole.parameters())
    assert parallel.sum_over_ranks(torch.tensor(held)).item() == total


def check_a_model_in_bf16_is_read_by_rows():
    half = FOLDER / "half"
    with parallel.main_first():
        if parallel.is_main():
            half.mkdir()
            tensors = {k: v.to(torch.bfloat16) for k, v in load_file(TINY / "model.safetensors").items()}
            save_file(tensors, half / "model.safetensors")
            (half / "config.json").write_text((TINY / "config.json").read_text())
    whole = Phi.from_pretrained(half)
    for p, q in zip(load_sharded(half).parameters(), whole.parameters(), strict=True):
        assert torch.equal(parallel.own(p), q[slice(*parallel.own_rows(p))])


def check_a_checkpoint_that_lacks_a_tensor_is_refused():
    """Else a model would be trained with whatever stood in the memory of that tensor."""
    short = FOLDER / "short"
    with parallel.main_first():
        if parallel.is_main():
            short.mkdir()
            tensors = load_file(TINY / "model.safetensors")
            del tensors["lm_head.bias"]
            save_file(tensors, short / "model.safetensors")
            (short / "config.json").write_text((TINY / "config.json").read_text())
    try:
        load_sharded(short)
    except InputError as error:
        assert str(error).endswith("1 tensors are missing, the first 'lm_head.bias'")
    else:
        raise AssertionError("lm_head.bias was never read")


# ------------------------------------------------------------------------------------------------------------ training


def optimizer_for(model: Phi) -> torch.optim.Optimizer:
    """A large eps: without it, a gradient that is 0 but for rounding, as that of the keys' bias, moves weights by +-lr."""
    matrices, vectors = ([p for p in model.parameters() if (p.ndim == 2) == matrix] for matrix in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-3, eps=1e-3, fused=True)


def bf16(on: bool) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=on)


def whole_step(model: Phi, examples: list[Example], low: bool = False) -> None:
    with bf16(low):
        loss = -completion_logprobs(model, collate(examples)).sum() / len(examples)
    loss.backward()


def dealt_step(model: Phi, examples: list[Example], micro: int, low: bool = False) -> None:
    """A rank's part of the same gradient. Where it has none left for a round, it runs an example that does not count."""
    for part in parallel.deal(examples, micro):
        with bf16(low):
            loss = -model.logprobs(collate(part or examples[:1])).sum() / len(examples)
        (loss if part else 0 * loss).backward()


@torch.no_grad()
def dealt_table(model: Phi, examples: list[Example], micro: int) -> torch.Tensor:
    table = torch.zeros(len(examples), 2)
    for part in parallel.deal(range(len(examples)), micro):
        logprobs = model.logprobs(collate([examples[k] for k in part or [0]])).view(-1, 2)
        if part:
            table[list(part)] = logprobs
    return parallel.sum_over_ranks(table)


def check_gradients_norms_weights_and_tables_are_those_of_one_process(quantized=False, counts=(8, 7, 1, 6)):
    """Over several updates, with evaluations in between; one batch has fewer examples than there are ranks."""
    one, many = Phi.from_pretrained(TINY), load_sharded(TINY)
    if quantized:
        for model in (one, many):
            train_quantized(model, "nf4", 32)
    one_optimizer, many_optimizer = optimizer_for(one), optimizer_for(many)
    many.gradient_checkpointing = True
    for step, count in enumerate(counts):
        examples = pairs(count)
        whole_step(one, examples)
        dealt_step(many, examples, micro=1 + step % 2)
        for (name, p), q in zip(one.named_parameters(), many.parameters(), strict=True):
            close(
                parallel.whole(q.grad),
                p.grad,
                atol=3e-6,
                msg=lambda text, name=name, step=step: f"step {step}, {name}: {text}",
            )
        norms = [torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0) for model in (one, many)]
        close(parallel.whole(norms[1]), norms[0])
        if step % 2:  # an evaluation between gradient and update leaves nothing old behind
            dealt_table(many, examples, micro=2)
        for optimizer in (one_optimizer, many_optimizer):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            expected = completion_logprobs(one, collate(examples)).view(-1, 2)
        close(dealt_table(many, examples, micro=2), expected, atol=2e-5)
    for p, q in zip(one.parameters(), many.parameters(), strict=True):
        close(parallel.whole(q), p)


def check_so_are_those_of_quantization_aware_training():
    check_gradients_norms_weights_and_tables_are_those_of_one_process(quantized=True)


def check_two_machines_with_two_ranks_each_hold_a_copy_each_and_give_the_same():
    if parallel.size() != 4:
        return
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    assert parallel.shards() == 2
    model = load_sharded(TINY)
    held = sum(parallel.own(p).numel() for p in model.parameters())
    assert parallel.sum_over_ranks(torch.tensor(held)).item() == 2 * sum(p.numel() for p in model.parameters())
    check_gradients_norms_weights_and_tables_are_those_of_one_process(counts=(7, 1))
    check_whole_weights_and_moments_reach_the_main_process_and_go_back()
    os.environ["LOCAL_WORLD_SIZE"] = "4"


def check_bf16_compute_gives_about_the_gradients_of_one_process():
    one, many = Phi.from_pretrained(TINY), load_sharded(TINY)
    whole_step(one, pairs(5), low=True)
    dealt_step(many, pairs(5), micro=1, low=True)
    for p, q in zip(one.parameters(), many.parameters(), strict=True):
        assert q.grad.dtype == torch.float32
        assert (parallel.whole(q.grad) - p.grad).norm() <= 0.02 * p.grad.norm() + 1e-3


def check_data_parallel_gradients_are_those_of_one_process():
    """Every rank holds the whole model, as under --lora; frozen parameters stay without a gradient."""
    one, many = Phi.from_pretrained(TINY), Phi.from_pretrained(TINY)
    for model in (one, many):
        model.model.embed_tokens.weight.requires_grad_(False)
    whole_step(one, pairs(7))
    dealt_step(many, pairs(7), micro=2)
    parallel.sum_gradients(many.parameters())
    for p, q in zip(one.parameters(), many.parameters(), strict=True):
        assert (q.grad is None) == (p.grad is None)
        if p.grad is not None:
            close(q.grad, p.grad)
            assert len(set(parallel.gather(q.grad.double().sum().item()))) == 1  # to the bit, or the ranks drift apart


def check_dropout_differs_from_rank_to_rank():
    """And the step that is made of it does not."""
    flags = {"model": "x", "device": "cpu", "dtype": "fp32", "micro_batch_size": 1, "lora": 4, "lora_dropout": 0.5}
    settings = settle("sft", flags).settings
    examples = [Example(e.prompt, e.completions[:1]) for e in pairs(5)]
    model = add_lora(Phi.from_pretrained(TINY), 4, dropout=0.5)
    step_gradients(model, examples, None, settings, step=2)
    assert len(set(parallel.gather(torch.initial_seed()))) == parallel.size()
    assert len(set(parallel.gather(clip_gradients(model, 1.0)))) == 1


def check_rows_can_be_filled_again_after_a_pass():
    """A resumed DPO run measures the reference with the first weights, then goes on with those of its checkpoint."""
    one, many, examples = Phi.from_pretrained(TINY).init_weights(7), load_sharded(TINY), pairs(5)
    before = dealt_table(many, examples, micro=2)
    for p, q in zip(one.parameters(), many.parameters(), strict=True):
        parallel.copy_own_rows(q, p)
    with torch.no_grad():
        expected = completion_logprobs(one, collate(examples)).view(-1, 2)
    after = dealt_table(many, examples, micro=2)
    close(after, expected, atol=2e-5)
    assert not torch.allclose(before, after)


class Odd(torch.nn.Module):
    """Neither 5 rows nor 1 divide among the ranks; some get none."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(3, 5), torch.nn.Linear(5, 1)

    def squares(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).tanh()).square().sum()


def check_rows_that_do_not_divide():
    torch.manual_seed(0)
    one = Odd()
    with torch.device("meta"):
        many = Odd()
    parallel.shard(many, [many.first], "squares", "cpu")
    many.to_empty(device="cpu")
    for p, q in zip(one.parameters(), many.parameters(), strict=True):
        parallel.copy_own_rows(q, p)
        begin, end = parallel.own_rows(q)
        assert torch.equal(parallel.own(q), p[begin:end]) and torch.equal(parallel.whole(q), p)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.01, fused=True) for model in (one, many)]
    for _ in range(3):
        x = torch.randn(4, 3)
        one.squares(x).backward()
        for part in x.split(1)[parallel.rank() :: parallel.size()]:
            many.squares(part).backward()
        norms = [torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1) for model in (one, many)]
        close(parallel.whole(norms[1]), norms[0])
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    for p, q in zip(one.parameters(), many.parameters(), strict=True):
        close(parallel.whole(q), p)


def check_blocks_gathered_in_bf16_compute_what_autocast_computes():
    """It rounds the same weights, after they were gathered. Gradients are rounded once each and added up in fp32. (Not with
    Phi, as on a CPU LayerNorm takes no fp32 input with bf16 weights.)"""
    one, x = Odd(), torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    with torch.device("meta"):
        many = Odd()
    parallel.shard(many, [many.first], "squares", "cpu", bf16=True)
    many.to_empty(device="cpu")
    for p, q in zip(one.parameters(), many.parameters(), strict=True):
        p.data.copy_(torch.arange(p.numel()).view(p.shape) / 7)
        parallel.copy_own_rows(q, p)
    with bf16(True):
        assert torch.equal(many.squares(x), one.squares(x))
        one.squares(x).backward()
        (many.squares(x) / parallel.size()).backward()
    for p, q in zip(one.parameters(), many.parameters(), strict=True):
        assert parallel.own(q).dtype == q.grad.dtype == torch.float32
        close(parallel.whole(q.grad), p.grad, rtol=1e-2)


# -------------------------------------------------------------------------------------------------------------- saving


def check_whole_weights_and_moments_reach_the_main_process_and_go_back():
    one, many = Phi.from_pretrained(TINY), load_sharded(TINY)
    optimizer = optimizer_for(many)
    dealt_step(many, pairs(5), micro=2)
    weights = parallel.whole_on_main(many.named_parameters())
    optimizer.step()
    names = {p: name for name, p in many.named_parameters()}
    moments = parallel.whole_on_main((f"{key}.{names[p]}", x) for p in names for key, x in optimizer.state[p].items())
    with parallel.main_first():
        if parallel.is_main():
            for name, p in one.named_parameters():
                assert torch.equal(weights[name], p)
            save_file({name: x.contiguous() for name, x in moments.items()}, FOLDER / "moments.safetensors")
        else:
            assert weights == moments == {}
    with safe_open(FOLDER / "moments.safetensors", framework="pt") as stored:
        for p, name in names.items():
            assert optimizer.state[p]["step"].item() == stored.get_tensor(f"step.{name}").item() == 1
            for key in ("exp_avg", "exp_avg_sq"):
                mine = torch.zeros_like(p)
                parallel.copy_own_rows(mine, stored.get_slice(f"{key}.{name}"))
                assert torch.equal(parallel.own(mine), parallel.own(optimizer.state[p][key]))


def check_8_bit_moments_reach_the_main_process_and_go_back():
    """Codes and scales are sharded like the parameter, also where its rows do not divide among the ranks."""
    torch.manual_seed(0)
    start = torch.randn(21, 256)
    one = torch.nn.Linear(256, 21)
    with torch.device("meta"):
        many = torch.nn.Linear(256, 21)
    parallel.shard(many, [], "forward", "cpu")
    many.to_empty(device="cpu")
    optimizers = []
    for model in (one, many):
        parallel.copy_own_rows(model.weight, start)
        parallel.copy_own_rows(model.bias, start[:, 0])
        optimizers.append(AdamW8bit(model.parameters(), lr=0.01))
    for _ in range(2):
        x = torch.randn(4, 256)
        one(x).square().sum().backward()
        many(x).square().sum().div(parallel.size()).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    expected, state = optimizers[0].state[one.weight], optimizers[1].state[many.weight]
    assert state["exp_avg"].shape == (21, 256) and state["exp_avg_absmax"].shape == (21, 1)
    whole = parallel.whole_on_main(state.items())
    if parallel.is_main():
        assert whole["exp_avg"].dtype == torch.uint8 and whole["step"] == 2
        close(whole["exp_avg_absmax"], expected["exp_avg_absmax"])
    for key, value in state.items():
        again = torch.zeros_like(value)
        if value.ndim:
            parallel.copy_own_rows(again, parallel.whole(value))
            assert torch.equal(parallel.own(again), parallel.own(value)), key
    close(parallel.whole(many.weight), one.weight, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------- small change


def check_texts_and_numbers_are_gathered():
    rank, size = parallel.rank(), parallel.size()
    assert parallel.gather({"text": "ü\n" * rank, "none": None}) == [{"text": "ü\n" * r, "none": None} for r in range(size)]
    for count in range(2 * size + 1):
        items = [f"{i}. 数" for i in range(count)]
        own = [part[0] for part in parallel.deal(items, 1) if part]
        assert parallel.collect([x + "!" for x in own]) == [x + "!" for x in items]
        for per_round in (1, 2, 3):  # every rank has as many rounds as the one with the most items needs
            dealt = parallel.gather(parallel.deal(items, per_round))
            most = max(len(sum(rounds, [])) for rounds in dealt)
            assert {len(rounds) for rounds in dealt} == {-(-most // per_round)}
            assert sorted(item for rounds in dealt for part in rounds for item in part) == sorted(items)
    x = torch.tensor([rank, 1.0])
    assert parallel.sum_over_ranks(x).tolist() == [size * (size - 1) / 2, size] and x.tolist() == [rank, 1.0]


def check_the_main_process_goes_first():
    file = FOLDER / "fetched"
    with parallel.main_first():
        found = file.exists()
        if not found:
            file.write_text("once")
    assert found == (not parallel.is_main())
    parallel.gather(None)  # all ranks have looked


def check_ranks_that_do_not_share_their_files_are_refused():
    parallel.check_shared(FOLDER / "shared")
    assert not parallel.is_main() or not any((FOLDER / "shared").iterdir())
    try:
        parallel.check_shared(FOLDER / f"own {parallel.rank()}")
    except InputError as error:
        assert str(error).startswith("rank 1 does not see the files of rank 0 in") and "--out" in str(error)
    else:
        raise AssertionError("each rank has a directory of its own")


def check_each_process_has_its_own_device():
    assert parallel.own_device("cpu") == "cpu"
    try:
        parallel.own_device("cuda:1")
    except InputError as error:
        assert "--device cuda" in str(error)
    else:
        raise AssertionError("two processes on one GPU")


# -------------------------------------------------------------------------------------------------------------- the job


def run_checks() -> None:
    results = {}
    for name, check in [(name, check) for name, check in globals().items() if name.startswith("check_")]:
        try:
            check()
            failure = None
        except InputError:
            raise
        except Exception:
            failure = traceback.format_exc()
        results[name] = {r: text for r, text in enumerate(parallel.gather(failure)) if text}
    if parallel.is_main():
        (FOLDER / "checks.json").write_text(json.dumps(results))


def end(how: str) -> None:
    model, last = load_sharded(TINY), parallel.size() - 1
    signal.signal(signal.SIGTERM, lambda *_: None)  # torchrun's to the others; the training loop also ends its step first
    for step in range(1, 4):
        if step == 3 and parallel.rank() == last and how == "mistake":
            raise InputError("a mistake that one rank alone noticed")
        loss = -model.logprobs(collate(pairs(2))).sum()
        if step == 3 and parallel.rank() == last and how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        loss.backward()


def main() -> int:
    torch.set_num_threads(1)
    try:
        with parallel.job():
            print("This is said once.")
            run_checks()
            end(sys.argv[3])
        return 0
    except InputError as error:
        if parallel.first_to_report():
            print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
