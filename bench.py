"""Speed and memory, ours beside the peers', in one run.

    pip install -r requirements-peers.txt
    python bench.py                                   all cases, a few minutes on two CPU cores
    python bench.py --only dpo generate               some of them
    python bench.py --device cuda --json bench.json   on a GPU

    dpo        one training step (forward, loss, backward; no optimizer) of robust DPO on 8 pairs: random Phi, 6 layers, 256
               wide, 51,200 tokens, fp32; prompts of 100-166 tokens, completions of 45-190. Peer: TRL's DPOTrainer.
    generate   greedy decoding, 128 new tokens after 64, same model. Peer: transformers' generate.
    forward    logits of 4 x 256 tokens, same model. Peer: transformers.
    quant      one linear layer, 2,560 to 10,240: quantizing it, and its product with 1, 16 and 256 rows. Peer: bitsandbytes,
               on the CPU both its general code and, where the CPU has it, its AVX512-BF16 kernel.
    convert    ours alone: --stage quantize of a random full-size Phi-2; time, and peak memory above the size of what it
               writes. Only on request: --only convert.
    load       ours alone: a random full-size Phi-2 (2.78 B parameters, bf16, two shards of 5.6 GB, written to a temporary
               directory) is loaded and run; its peak memory. Only on request: --only load.

Times are medians of --repeats runs with the contenders taking turns, so that a noisy machine is noisy for both; read the
ratios, not the seconds. Memory is the peak above what the process held before the step, each contender in a process of
its own. Losses, gradients and tokens are compared before anything is timed.
"""

import argparse
import copy
import datetime
import gc
import logging
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
from quant import quantize_4bit, quantize_layer, use_kernels

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
def full_size_phi(directory: Path) -> Path:
    """Writes a full-size Phi-2 of random weights in bf16."""
    full = directory / "full"
    if not full.exists():
        with torch.device("meta"):
            phi = Phi(PhiConfig())
        phi.to_empty(device="cpu")
        phi.to(torch.bfloat16)
        for name, p in phi.named_parameters():
            p.fill_(1.0) if "layernorm.weight" in name else p.zero_() if name.endswith("bias") else p.uniform_(-0.03, 0.03)
        phi.save_pretrained(full)
    return full


def in_new_process(code: str) -> tuple[list[str], int]:
    """Runs Python code in a fresh process; the words of its last line and its peak memory in bytes (Linux). Its own VmHWM:
    `ru_maxrss` would count the peak of this process too, from before the new one's memory was its own."""
    peak = "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    command = [sys.executable, "-c", f"{code}\n{peak}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent)
    if done.returncode:
        raise InputError(f"a process of this benchmark failed:\n{done.stdout[-2000:]}")
    *_, last, peak = done.stdout.strip().splitlines()
    return last.split(), int(peak) * 1024


def bench_load(directory: Path, device: str, repeats: int) -> list[dict]:
    """A full-size Phi-2 is loaded and run in a fresh process."""
    full = full_size_phi(directory)
    code = (
        "import time, torch; from model import Phi; began = time.perf_counter(); "
        f"phi = Phi.from_pretrained({str(full)!r}, dtype=torch.bfloat16, device={device!r}); "
        f"loaded = time.perf_counter(); ids = torch.arange(32, device={device!r})[None]; "
        "ok = bool(torch.isfinite(phi(ids)).all()); ended = time.perf_counter(); print(ok, loaded - began, ended - loaded)"
    )
    (ok, load, forward), peak = in_new_process(code)
    stored = sum(f.stat().st_size for f in full.glob("*.safetensors"))
    print(f"  {stored / 1e9:.2f} GB in {len(list(full.glob('*.safetensors')))} shards; logits finite: {ok}", flush=True)
    return [
        dict(case="load full-size Phi-2 (bf16)", unit="s", ours=float(load), peer=None),
        dict(case="  peak resident memory, process included", unit="MB", ours=peak / 1e6, peer=None),
        dict(case="  first forward pass, 32 tokens", unit="s", ours=float(forward), peer=None),
    ]


# ------------------------------------------------------------------------------------------------------ number formats


def bench_convert(directory: Path, device: str, repeats: int) -> list[dict]:
    """--stage quantize of a full-size Phi-2, each format in a process of its own."""
    full, rows = full_size_phi(directory), []
    for to in ("nf4", "int8"):
        flags = ["--stage", "quantize", "--model", str(full), "--to", to, "--out", str(directory), "--name", to]
        began = time.perf_counter()
        (status,), peak = in_new_process(f"import train; print(train.main({[*flags, '--device', device]!r}))")
        seconds = time.perf_counter() - began
        if status != "0":
            raise InputError(f"train.py {' '.join(flags)} failed")
        written = sum(file.stat().st_size for file in (directory / to).glob("*.safetensors"))
        case = f"quantize full-size Phi-2 (bf16) to {to}"
        rows.append(dict(case=case, unit="s", ours=seconds, peer=None))
        rows.append(dict(case="  size written", unit="MB", ours=written / 1e6, peer=None))
        rows.append(dict(case="  peak memory, process included", unit="MB", ours=peak / 1e6, peer=None))
    return rows


@torch.no_grad()
def bench_quant(directory: Path, device: str, repeats: int) -> list[dict]:
    import bitsandbytes as bnb

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    plain = torch.nn.Linear(2560, 10240)
    plain.weight.normal_(0, 0.02)
    fast = {to: quantize_layer(plain.weight, plain.bias, to).to(device) for to in ("nf4", "int8")}
    eager = copy.deepcopy(fast)
    for layer in fast.values():
        print(
            use_kernels(layer, device, compiled=True) or f"  our {layer.format} layer runs {layer.kernel} kernels",
            flush=True,
        )
    theirs = {
        "nf4": bnb.nn.Linear4bit(2560, 10240, quant_type="nf4", compress_statistics=False),
        "int8": bnb.nn.Linear8bitLt(2560, 10240, has_fp16_weights=False, threshold=0.0),
    }
    for to, layer in theirs.items():
        layer.load_state_dict(plain.state_dict())
        theirs[to] = layer.to(device)
    plain = plain.to(device)
    weight = plain.weight.data
    packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4")
    if not torch.equal(packed, fast["nf4"].weight) or not torch.equal(state.absmax, fast["nf4"].absmax):
        raise InputError("the two do not quantize alike; their times cannot be compared")
    rows = []

    def compare(case: str, ours: Callable, peer: Callable) -> None:
        seconds = medians({"ours": ours, "peer": peer}, max(repeats, 9), device)
        rows.append(dict(case=case, unit="ms", ours=1e3 * seconds["ours"], peer=1e3 * seconds["peer"]))

    def their_quantizer():
        return bnb.functional.quantize_4bit(weight, quant_type="nf4")

    compare("quantize to NF4, plain PyTorch / bitsandbytes", lambda: quantize_4bit(weight), their_quantizer)
    compare("quantize to NF4, compiled / bitsandbytes", lambda: quantize_4bit(weight, compiled=True), their_quantizer)
    one, dtype = torch.randn(1, 2560, device=device), torch.float32 if device == "cpu" else torch.bfloat16
    x, dense = one.to(dtype), plain.to(dtype)
    compare("int8 layer, batch 1, plain PyTorch / unquantized layer", lambda: eager["int8"](x), lambda: dense(x))
    compare("int8 layer, batch 1, our kernel / unquantized layer", lambda: fast["int8"](x), lambda: dense(x))
    compare("NF4 layer, batch 1, our kernel / unquantized layer", lambda: fast["nf4"](x), lambda: dense(x))
    eager["int8"].threshold, peer = 6.0, theirs["int8"].eval()
    compare("LLM.int8() layer, batch 1 / bitsandbytes", lambda: eager["int8"](x), lambda: peer(x))
    # On a CPU with AVX512-BF16 bitsandbytes has a kernel for evaluation; in training mode it runs what other CPUs run.
    modes = {"bitsandbytes": "train"} | ({"bitsandbytes AVX512-BF16": "eval"} if _has_avx512_bf16(device) else {})
    for label, mode in modes.items():
        peer = copy.deepcopy(theirs["nf4"]).train(mode == "train")
        for size in (1, 16, 256):
            x = torch.randn(size, 2560, device=device, dtype=dtype)
            for which, layers in {"plain PyTorch": eager, "our kernel": fast}.items():
                if device != "cpu" or size == 1 or layers is eager:  # on the CPU our kernel is for one row
                    ours, case = layers["nf4"], f"NF4 layer, batch {size}, {which} / {label}"
                    compare(case, lambda ours=ours, x=x: ours(x), lambda peer=peer, x=x: peer(x))
    x = one.to(dtype)
    return rows + (_bandwidth(fast, x, repeats, device) if device != "cpu" else [])


def _has_avx512_bf16(device: str) -> bool:
    from bitsandbytes.functional import has_avx512bf16

    return device == "cpu" and bool(has_avx512bf16())


def _bandwidth(layers: dict, x: torch.Tensor, repeats: int, device: str) -> list[dict]:
    """Bytes of weights that decoding reads in a second, beside a copy in the same run (which reads and writes)."""
    source = torch.empty(2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / medians({"copy": lambda: target.copy_(source)}, 9, device)["copy"]
    rows = []
    for to, layer in layers.items():
        stored = sum(b.nbytes for b in layer.buffers() if b is not None)
        read = stored / medians({to: lambda layer=layer: layer(x)}, 9, device)[to]
        rows.append(dict(case=f"{to} layer, batch 1, bandwidth / copy's", unit="GB/s", ours=read / 1e9, peer=copied / 1e9))
    return rows


CASES = {
    "dpo": bench_dpo,
    "generate": bench_generate,
    "forward": bench_forward,
    "quant": bench_quant,
    "convert": bench_convert,
    "load": bench_load,
}


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
    parser.add_argument("--only", nargs="+", choices=CASES, default=["dpo", "generate", "forward", "quant"])
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
