"""n ranks do what one does: the same weights and figures from the same global batch."""

from __future__ import annotations

import re
import shlex
import shutil
import signal
from pathlib import Path

import pytest

from tests.distributed.conftest import (
    SIZES,
    STEPS,
    Launcher,
    ended,
    free_port,
    records,
    same_run,
    wait_for_step,
    workers,
)

CASES = {
    "native-two-micro-steps": (
        "tiny_bert",
        "--layers 1 --kernels native --grad_acc_steps 2 --auxk_alpha 0.1 --lr 0.01 --num_latents 512 "
        "--dead_window_tokens 600",
        (2, 4),
    ),
    "native-clipped": ("tiny_bert", "--layers 1 --kernels native --grad_acc_steps 2 --max_grad_norm 0.1", (2,)),
    "torch-two-layers-two-seeds": (
        "tiny_bert",
        "--layers 0 2 --init_seeds 1 2 --kernels torch --parallel data --weight_decay 0.01",
        (2,),
    ),
    "reference-streaming-sgd": (
        "tiny_bert",
        "--layers 1 --kernels reference --streaming true --optimizer sgd --lr 1",
        (2,),
    ),
    "decoder-three-uneven-ranks": ("tiny_gpt2", "--layers 1 --kernels torch --batch_size 12", (3,)),
    "hookpoints": (
        "tiny_bert",
        "--layers 0 2 4 --init_seeds 1 2 --kernels native --parallel hookpoints --eval_every 20",
        (2, 4),
    ),
    "kl-two-micro-steps": ("tiny_gpt2", "--layers 1 --loss_fn kl --grad_acc_steps 2 --e2e_recon_weight 0.5", (2,)),
    "masked-ce": ("tiny_mlm", "--layers 1 --loss_fn ce", (4,)),
}


@pytest.mark.parametrize("case", CASES)
def test_n_ranks_equal_one(case: str, launcher: Launcher, topics_jsonl: str, request: pytest.FixtureRequest) -> None:
    model, flags, worlds = CASES[case]
    words = flags.split()
    sequences = 8
    if "--batch_size" in words:
        at = words.index("--batch_size")
        sequences = int(words[at + 1])
        del words[at : at + 2]
    micro_steps = 2 if "--grad_acc_steps" in words else 1
    tokens = str(STEPS * sequences * 32 * micro_steps)
    common = [request.getfixturevalue(model), topics_jsonl, *words, "--max_tokens", tokens, "--batch_size"]
    one = launcher.run(1, "one", [*common, str(sequences)])
    for world in worlds:
        several = launcher.run(world, f"of{world}", [*common, str(sequences // world)])
        same_run(one, several)
        train = [line for line in records(several) if line["kind"] == "train"]
        dead = max(sae["dead_not_fired"] for line in train for sae in line["saes"].values())
        assert dead > 0 or "--dead_window_tokens" not in words, "nothing was lifted"
        last = train[-1]
        assert {f"rank{number}/waiting" for number in range(world)} <= last.keys()


def test_two_ranks_by_triton_s_kernels_equal_one(launcher: Launcher, topics_jsonl: str, tiny_bert: str) -> None:
    """Few steps, for without a GPU they are interpreted."""
    pytest.importorskip("triton")
    launcher.environment |= {"TRITON_INTERPRET": "1"}
    words = [
        tiny_bert,
        topics_jsonl,
        "--layers",
        "1",
        "--kernels",
        "triton",
        "--device",
        "cpu",
        "--grad_acc_steps",
        "2",
    ]
    words += ["--auxk_alpha", "0.1", "--num_latents", "30", "--k", "2", "--ctx_len", "8", "--dead_window_tokens", "40"]
    words += ["--max_tokens", "256", "--batch_size"]
    one, several = launcher.run(1, "one", [*words, "2"]), launcher.run(2, "two", [*words, "1"])
    same_run(one, several, steps=8)
    assert any(line["saes"]["encoder.layer.1"]["loss_auxk"] > 0 for line in records(several) if line["kind"] == "train")


def test_micro_steps_and_ranks_share_a_batch_alike(launcher: Launcher, topics_jsonl: str, tiny_bert: str) -> None:
    common = [tiny_bert, topics_jsonl, "--layers", "1", "--kernels", "native", "--max_tokens", str(STEPS * 256)]
    one = launcher.run(1, "one", [*common, "--batch_size", "8"])
    several = launcher.run(2, "two", [*common, "--batch_size", "2", "--grad_acc_steps", "2"])
    same_run(one, several)


def test_two_hosts_with_disks_of_their_own(
    launcher: Launcher, topics_jsonl: str, tiny_bert: str, tmp_path: Path
) -> None:
    """Two agents of torchrun, as on two hosts; the second can't see the first one's folder."""
    words = [tiny_bert, topics_jsonl, "--layers", "1", "--kernels", "native", "--save_every", "20", "--batch_size"]
    one = launcher.run(1, "run", [*words, "4", "--max_tokens", str(STEPS * 128)])
    for steps in (30, STEPS):
        meeting = ["--nnodes", "2", "--rdzv_backend", "c10d", "--rdzv_id", "run", "--nproc_per_node", "1"]
        meeting += ["--rdzv_endpoint", f"127.0.0.1:{free_port()}"]
        processes = []
        for host in range(2):
            launcher.folder = tmp_path / f"host{host}"
            processes.append(launcher.start(2, "run", [*words, "2", "--max_tokens", "6400", "--resume"], agent=meeting))
        if steps < STEPS:
            wait_for_step(processes[0], tmp_path / "host0" / "run", steps)
            for process in processes:
                for worker in workers(process).values():
                    worker.send_signal(signal.SIGTERM)
        for process in processes:
            ended(process, 0)
    same_run(one, tmp_path / "host0" / "run")
    assert not (tmp_path / "host1").exists()


def test_without_torchrun(launcher: Launcher, topics_jsonl: str, tiny_bert: str, tmp_path: Path) -> None:
    """Processes that another launcher (SLURM's srun) starts meet at rank 0."""
    words = [tiny_bert, topics_jsonl, "--layers", "1", "--max_tokens", "2560", "--batch_size", "4"]
    launcher.environment |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = []
    for number in range(2):
        launcher.environment |= {"RANK": str(number)}
        processes.append(launcher.start(1, "run", words))
    for process in processes:
        ended(process, 0)
    assert (tmp_path / "run" / "sae").exists()


def test_the_commands_of_the_page(
    launcher: Launcher, topics_jsonl: str, tiny_bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = Path(__file__).parents[2] / "docs" / "distributed.md"
    (command,) = re.findall(r"^```bash\n(torchrun .*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    before, _, words = command.replace("\\\n", " ").partition(" -m saetrain ")
    model, data, *rest = shlex.split(words)
    shutil.copytree(tiny_bert, tmp_path / model)
    (tmp_path / data).mkdir()
    shutil.copy(topics_jsonl, tmp_path / data / "train.jsonl")
    agent = [*shlex.split(before)[1:], "--nproc_per_node", "2"]
    monkeypatch.chdir(tmp_path)
    small = [*SIZES.split(), "--max_tokens", "2048", "--grad_acc_steps", "2"]
    output = ended(launcher.start(2, "page", [model, data, *rest, *small], agent=agent), 0)
    assert "2 processes, data parallel" in output
