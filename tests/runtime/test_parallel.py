"""Several processes give what one gives. The checks are in helpers/ranks.py; one launch of 2 and one of 4 run them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from runtime import parallel
from runtime.files import InputError, read_json
from runtime.flags import settle

WORKER = Path(__file__).resolve().parents[1] / "helpers" / "ranks.py"
CHECKS = re.findall(r"^def (check_\w+)", WORKER.read_text(), re.MULTILINE)
ENDINGS = {2: "killed", 4: "mistake"}


@pytest.fixture(scope="session", params=ENDINGS, ids=lambda size: f"{size}_ranks")
def launched(request, tiny, tmp_path_factory):
    """(how many ranks, the failures of each check, the finished process)"""
    folder = tmp_path_factory.mktemp("ranks")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(request.param)]
    done = subprocess.run(
        [*torchrun, str(WORKER), str(tiny), str(folder), ENDINGS[request.param]], capture_output=True, text=True, timeout=300
    )
    assert (folder / "checks.json").exists(), done.stderr
    return request.param, read_json(folder / "checks.json"), done


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
def test_on_several_ranks(launched, check):
    failures = launched[1][check]
    assert not failures, "\n".join(f"rank {rank}: {text}" for rank, text in failures.items())


@pytest.mark.slow
def test_the_end_of_one_rank_ends_the_job_with_one_line(launched):
    size, _, done = launched
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    if ENDINGS[size] == "killed":
        expected = (
            "error: another process of this job ended (torchrun names it below), so rank 0 stopped. "
            "No file is half-written; the same command with --resume continues from the last checkpoint."
        )
    else:
        expected = "error: a mistake that one rank alone noticed"
    assert lines == [expected], done.stderr
    assert done.returncode == 1 and "gloo" not in done.stderr and "worker" not in done.stdout
    assert done.stdout.count("This is said once.") == 1


def test_a_single_process_shares_with_nobody():
    x, p = torch.arange(6.0).view(3, 2), torch.nn.Parameter(torch.zeros(3, 2))
    with parallel.job():
        assert (parallel.rank(), parallel.size(), parallel.is_main()) == (0, 1, True)
        assert parallel.own_device("cpu") == "cpu"
        assert parallel.deal([3, 4, 5], 2) == [[3, 4], [5]] and parallel.collect([3, 4]) == [3, 4]
        assert parallel.sum_over_ranks(x) is x and parallel.gather("a") == ["a"]
        parallel.copy_own_rows(p, x)
        assert torch.equal(p, x) and parallel.own_rows(p) == (0, 3) and parallel.whole(x) is x
        assert torch.equal(parallel.whole_on_main({"p": p}.items())["p"], x)
        parallel.sum_gradients([p])
        with parallel.main_first():
            pass
    assert parallel.first_to_report()
    with pytest.raises(RuntimeError, match="own"), parallel.job():
        raise RuntimeError("an error of its own")


def test_device_and_number_type_are_chosen_for_the_machine():
    settings = settle("dpo", {}).settings
    assert (settings.device, settings.dtype) == (None, None)
    here = parallel.on_this_machine(settings)
    assert (here.device, here.dtype) == (("cuda", "bf16") if torch.cuda.is_available() else ("cpu", "fp32"))
    assert parallel.on_this_machine(settle("dpo", {"device": "cpu", "dtype": "bf16"}).settings).dtype == "bf16"
    data = settle("data", {}).settings  # has no device
    assert parallel.on_this_machine(data) == data
    with pytest.raises(InputError, match="--device gpu: give cpu, cuda"):
        parallel.own_device("gpu")
    with pytest.raises(InputError, match="--device cuda:99: PyTorch sees"):
        parallel.own_device("cuda:99")
