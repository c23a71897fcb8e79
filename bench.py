"""Speed and memory, ours beside the peers', in one run.

    pip install -r requirements-peers.txt
    python bench.py                                   all cases, a few minutes on two CPU cores
    python bench.py --only dpo generate               some of them
    python bench.py --device cuda --json bench.json   on a GPU

    dpo        one training step (forward, loss, backward; no optimizer) of robust DPO on 8 pairs: random Phi, 6 layers, 256
               wide, 51,200 tokens, fp32; prompts of 100-166 tokens, completions of 45-190. Peer: TRL's DPOTrainer.
    generate   greedy decoding, 128 new tokens after 64, same model. Peer: transformers' generate.
    forward    logits of 4 x 256 tokens, same model. Peer: transformers.
    load       ours alone: a random full-size Phi-2 (2.78 B parameters, bf16, two shards of 5.6 GB, written to a temporary
               directory) is loaded and run; its peak memory. Only on request: --only load.

Times are medians of --repeats runs with the contenders taking turns, so that a noisy machine is noisy for both; read the
ratios, not the seconds. Memory is the peak above what the process held before the step, each contender in a process of
its own. Losses, gradients and tokens are compared before anything is timed.
"""

import argparse
import datetime
import gc
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from data import Example, collate
from dpo import objective
from files import InputError, write_json
from model import Phi, PhiConfig, completion_logprobs, generate

SHAPE = dict(
    hidden_size=256,
    intermediate_size=1024,
    num_hidden_layers=6,
    num_attention_heads=8,
    vocab_size=51200,
    partial_rotary_factor=0.4,
)
BETA, EPS = 0.1, 0.1
NEW_TOKENS = 128


def pairs(count: int = 8, seed: int = 0) -> list[Example]:
    draw = random.Random(seed)
    ids = lambda n: [draw.randrange(SHAPE["vocab_size"]) for _ in range(n)]  # noqa: E731
    return [Example(ids(draw.randint(100, 166)), [ids(draw.randint(45, 190)) for _ in range(2)]) for _ in range(count)]


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def medians(contenders: dict[str, Callable], repeats: int, device: str) -> dict[str, float]:
    """Median seconds of each contender; they take turns, after one round that is not counted."""
    seconds = {name: [] for name in contenders}
    for round_ in range(repeats + 1):
        for name, run in contenders.items():
            synchronize(device)
            began = time.perf_counter()
            run()
            synchronize(device)
            if round_:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


# ----------------------------------------------------------------------------------------------------------- DPO's step


def our_dpo_step(directory: Path, device: str, reference: str) -> Callable:
    """step() -> (loss, gradients by name), with the reference's log-probabilities "cached" or run "live"."""
    policy = Phi.from_pretrained(directory, device=device)
    frozen = Phi.from_pretrained(directory / "reference", device=device)
    examples = pairs()

    @torch.no_grad()
    def expected(batch):
        return completion_logprobs(frozen, batch)

    cached = expected(collate(examples).to(device))

    def step():
        policy.zero_grad()
        batch = collate(examples).to(device)
        logprobs = expected(batch) if reference == "live" else cached
        loss, _ = objective(completion_logprobs(policy, batch), logprobs, batch.lengths, "robust", BETA, EPS, 0.0)
        loss = loss / len(examples)
        loss.backward()
        return loss.item(), {name: p.grad for name, p in policy.named_parameters()}

    return step


def trl_dpo_step(directory: Path, device: str, reference: str) -> Callable:
    """The same with TRL, which runs its reference live unless it has precomputed the log-probabilities."""
    sys.path.insert(0, str(Path(__file__).parent / "tests" / "parity"))
    import transformers
    from peers import trl_batch, trl_trainer

    load = transformers.PhiForCausalLM.from_pretrained
    trainer = trl_trainer(
        tempfile.mkdtemp(),
        load(directory),
        load(directory / "reference"),
        use_cpu=device == "cpu",
        loss_type="robust",
        beta=BETA,
        label_smoothing=EPS,
    )
    trainer.model.train()
    batch = {name: value.to(device) for name, value in trl_batch(pairs()).items()}
    if reference == "cached":
        chosen, rejected = trainer.compute_ref_log_probs(trainer.ref_model, batch)
        batch |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        trainer.precompute_ref_logps = True

    def step():
        trainer.model.zero_grad()
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        return loss.item(), {name: p.grad for name, p in trainer.model.named_parameters()}

    return step


def peak_bytes(directory: Path, contender: str, device: str) -> int:
    """Peak memory of one step above what was held before it, measured in a fresh process."""
    command = [sys.executable, __file__, "--worker", contender, "--directory", str(directory), "--device", device]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"the memory measurement of {contender} failed:\n{done.stderr[-2000:]}")
    return int(done.stdout.split()[-1])


def worker(contender: str, directory: Path, device: str) -> int:
    owner, reference = contender.split()
    step = (our_dpo_step if owner == "ours" else trl_dpo_step)(directory, device, reference)
    gc.collect()
    if device.startswith("cuda"):
        held = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device) - held
    held = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak (Linux)
    step()
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(peak.split()[1]) * 1024 - held


def bench_dpo(directory: Path, device: str, repeats: int) -> list[dict]:
    makers = {"ours": our_dpo_step, "TRL": trl_dpo_step}
    steps = {
        f"{owner} {ref}": maker(directory, device, ref) for owner, maker in makers.items() for ref in ("cached", "live")
    }
    loss, gradients = steps["ours cached"]()
    their_loss, theirs = steps["TRL live"]()
    largest = max(g.norm() for g in theirs.values())
    gap = max((gradients[name].cpu() - g.cpu()).norm() / largest.cpu() for name, g in theirs.items()).item()
    print(
        f"  loss {loss:.7f} and {their_loss:.7f}; largest difference of a gradient / largest gradient: {gap:.1e}", flush=True
    )
    if not abs(loss - their_loss) <= 1e-5 or not gap <= 1e-5:
        raise InputError("the two do not compute the same step; their times cannot be compared")
    seconds = medians(steps, repeats, device)
    peaks = {name: peak_bytes(directory, name, device) for name in steps}
    rows = []
    for ours, peer in (("ours cached", "TRL live"), ("ours live", "TRL live"), ("ours cached", "TRL cached")):
        case = f"DPO step, ours with {ours.split()[1]}, TRL with {peer.split()[1]} reference"
        rows.append(dict(case=case, unit="s", ours=seconds[ours], peer=seconds[peer]))
        rows.append(dict(case=case + ", peak memory", unit="MB", ours=peaks[ours] / 1e6, peer=peaks[peer] / 1e6))
    return rows


# ------------------------------------------------------------------------------------------- generation, forward, load


def bench_generate(directory: Path, device: str, repeats: int) -> list[dict]:
    import transformers

    ours = Phi.from_pretrained(directory, device=device)
    theirs = transformers.PhiForCausalLM.from_pretrained(directory).to(device).eval()
    rows = []
    for size in (1, 16):
        ids = torch.randint(SHAPE["vocab_size"], (size, 64), generator=torch.Generator().manual_seed(size))
        padded, mask = ids.to(device), torch.ones_like(ids).to(device)

        def ours_run(ids=ids):
            return generate(ours, ids.tolist(), max_new_tokens=NEW_TOKENS)

        def theirs_run(padded=padded, mask=mask):
            return theirs.generate(
                padded, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0, eos_token_id=None
            )[:, 64:].tolist()

        if ours_run() != theirs_run():
            raise InputError("the two do not generate the same tokens; their times cannot be compared")
        seconds = medians({"ours": ours_run, "theirs": theirs_run}, repeats, device)
        rows.append(
            dict(
                case=f"generate, batch {size}",
                unit="tokens/s",
                ours=NEW_TOKENS * size / seconds["ours"],
                peer=NEW_TOKENS * size / seconds["theirs"],
            )
        )
    return rows


@torch.no_grad()
def bench_forward(directory: Path, device: str, repeats: int) -> list[dict]:
    import transformers

    ours = Phi.from_pretrained(directory, device=device)
    theirs = transformers.PhiForCausalLM.from_pretrained(directory).to(device).eval()
    ids = torch.randint(SHAPE["vocab_size"], (4, 256), generator=torch.Generator().manual_seed(0)).to(device)
    torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)
    seconds = medians({"ours": lambda: ours(ids), "theirs": lambda: theirs(ids)}, repeats, device)
    return [dict(case="forward, 4 x 256 tokens", unit="s", ours=seconds["ours"], peer=seconds["theirs"])]


@torch.no_grad()
def bench_load(directory: Path, device: str, repeats: int) -> list[dict]:
    """Writes a full-size Phi-2 of random weights, then loads and runs it in a fresh process."""
    full = directory / "full"
    with torch.device("meta"):
        phi = Phi(PhiConfig())
    phi.to_empty(device="cpu")
    phi.to(torch.bfloat16)
    for name, p in phi.named_parameters():
        p.fill_(1.0) if "layernorm.weight" in name else p.zero_() if name.endswith("bias") else p.uniform_(-0.03, 0.03)
    phi.save_pretrained(full)
    del phi
    code = (
        "import time, resource, torch; from model import Phi; began = time.perf_counter(); "
        f"phi = Phi.from_pretrained({str(full)!r}, dtype=torch.bfloat16, device={device!r}); "
        f"loaded = time.perf_counter(); ids = torch.arange(32, device={device!r})[None]; "
        "ok = bool(torch.isfinite(phi(ids)).all()); ended = time.perf_counter(); "
        "print(ok, loaded - began, ended - loaded, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent)
    ok, load, forward, peak = done.stdout.split()
    stored = sum(f.stat().st_size for f in full.glob("*.safetensors"))
    print(f"  {stored / 1e9:.2f} GB in {len(list(full.glob('*.safetensors')))} shards; logits finite: {ok}", flush=True)
    return [
        dict(case="load full-size Phi-2 (bf16)", unit="s", ours=float(load), peer=None),
        dict(case="  peak resident memory, process included", unit="MB", ours=float(peak) / 1e6, peer=None),
        dict(case="  first forward pass, 32 tokens", unit="s", ours=float(forward), peer=None),
    ]


CASES = {"dpo": bench_dpo, "generate": bench_generate, "forward": bench_forward, "load": bench_load}


def hardware(device: str) -> str:
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name(device)
    else:
        info = Path("/proc/cpuinfo")
        models = (
            [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
            if info.exists()
            else [platform.processor()]
        )
        name = f"{models[0]}, {torch.get_num_threads()} threads"
    return f"{name}; torch {torch.__version__}, Python {platform.python_version()}, {datetime.date.today()}"


def table(rows: list[dict]) -> str:
    lines = ["| case | unit | ours | peer | ours / peer |", "|---|---|---|---|---|"]
    for row in rows:
        peer, ratio = ("-", "-") if row["peer"] is None else (f"{row['peer']:,.4g}", f"{row['ours'] / row['peer']:.2f}")
        lines.append(f"| {row['case']} | {row['unit']} | {row['ours']:,.4g} | {peer} | {ratio} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CASES, default=["dpo", "generate", "forward"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", help="write the rows here too")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.worker:
        print(worker(flags.worker, flags.directory, flags.device))
        return 0
    try:
        rows = []
        with tempfile.TemporaryDirectory() as directory:
            phi = Phi(PhiConfig(**SHAPE)).init_weights(seed=0)
            phi.save_pretrained(directory)
            with torch.no_grad():  # a reference that differs a little, so that no margin is 0
                noise = torch.Generator().manual_seed(1)
                for p in phi.parameters():
                    p += 0.01 * torch.randn(p.shape, generator=noise)
            phi.save_pretrained(Path(directory) / "reference")
            del phi
            for name in flags.only:
                print(f"{name} ...", flush=True)
                rows += CASES[name](Path(directory), flags.device, flags.repeats)
    except ModuleNotFoundError as error:
        print(f"error: {error.name} is not installed; pip install -r requirements-peers.txt", file=sys.stderr)
        return 2
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"\n{hardware(flags.device)}\n\n{table(rows)}")
    if flags.json:
        write_json(flags.json, {"hardware": hardware(flags.device), "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
