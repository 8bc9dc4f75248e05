"""n ranks equal one: the same weights and metrics from the same global batch."""

from __future__ import annotations

import re
import shlex
import shutil
import signal
from pathlib import Path

import pytest

from saetrain.coders import CODERS
from tests.distributed.conftest import (
    SIZES,
    STEPS,
    Launcher,
    Ranks,
    bits,
    finish_torchrun,
    free_port,
    records,
    same_run,
    wait_for_step,
)
from tests.integration.test_resume import calibrate_on_few_tokens
from tests.processes import ForkedCommand

CASES: dict[str, tuple[str, str, tuple[int, ...]]] = {
    "native-two-micro-batches": (
        "tiny_bert",
        "--layers 1 --kernels native --grad_acc_steps 2 --auxk_alpha 0.1 --lr 0.01 --num_latents 512 "
        "--dead_window_tokens 600",
        (2,),
    ),
    "native-clipped": ("tiny_bert", "--layers 1 --kernels native --grad_acc_steps 2 --max_grad_norm 0.1", (2,)),
    "torch-two-layers-two-seeds": (
        "tiny_bert",
        "--layers 0 2 --init_seeds 1 2 --kernels torch --parallel data --weight_decay 0.01",
        (2,),
    ),
    "reference-streaming-sgd": (
        "tiny_bert",
        "--layers 1 --kernels reference --streaming true --data_shards 4 --optimizer sgd --lr 1",
        (2,),
    ),
    "decoder-three-uneven-ranks": ("tiny_gpt2", "--layers 1 --kernels torch --batch_size 12", (3,)),
    "hookpoints": (
        "tiny_bert",
        "--layers 0 2 4 --init_seeds 1 2 --kernels native --parallel hookpoints --eval_every 20",
        (4,),
    ),
    "kl-two-micro-batches": ("tiny_gpt2", "--layers 1 --loss_fn kl --grad_acc_steps 2 --e2e_recon_weight 0.5", (2,)),
    "abs-topk-two-hookpoints": (
        "tiny_bert",
        "--layers 0 2 --architecture tests.architectures.abs_topk:AbsTopK --parallel hookpoints",
        (2,),
    ),
    "threshold-two-micro-batches": (
        "tiny_bert",
        "--hookpoints encoder.layer.1.intermediate --architecture tests.architectures.threshold:Threshold "
        "--grad_acc_steps 2",
        (2,),
    ),
    "threshold-two-hookpoints": (
        "tiny_bert",
        "--hookpoints encoder.layer.[12].intermediate --architecture tests.architectures.threshold:Threshold "
        "--parallel hookpoints",
        (2,),
    ),
    "batchtopk-shared-group": ("tiny_bert", "--layers 1 --architecture batchtopk --auxk_alpha 0.1", (4,)),
    "batchtopk-four-groups": (
        "tiny_bert",
        "--layers 1 --architecture batchtopk --grad_acc_steps 2 --group_tokens 64",
        (2,),
    ),
    "batchtopk-two-hookpoints": (
        "tiny_bert",
        "--layers 0 2 --architecture batchtopk --group_tokens 32 --parallel hookpoints",
        (2,),
    ),
    "batchtopk-kl": ("tiny_gpt2", "--layers 1 --loss_fn kl --architecture batchtopk --grad_acc_steps 2", (2,)),
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
    micro_batches = 2 if "--grad_acc_steps" in words else 1
    tokens = str(STEPS * sequences * 32 * micro_batches)
    common = [request.getfixturevalue(model), topics_jsonl, *words, "--max_tokens", tokens, "--batch_size"]
    prepare = calibrate_on_few_tokens if "--loss_fn" in words else None
    one = launcher.run(1, "one", [*common, str(sequences)], prepare)
    for world in worlds:
        several = launcher.run(world, f"of{world}", [*common, str(sequences // world)], prepare)
        same_run(one, several)
        train = [line for line in records(several) if line["kind"] == "train"]
        dead = max(sae["dead_not_fired"] for line in train for sae in line["saes"].values())
        assert dead > 0 or "--dead_window_tokens" not in words, "nothing was lifted"
        last = train[-1]
        assert {f"rank{number}/waiting" for number in range(world)} <= last.keys()


@pytest.mark.parametrize("architecture", sorted(CODERS.keys() - {"topk"}))
def test_each_architecture_on_two_ranks_and_resumed(
    architecture: str, launcher: Launcher, topics_jsonl: str, tiny_bert: str
) -> None:
    words = [tiny_bert, topics_jsonl, "--layers", "1", "--architecture", architecture, "--save_every", str(STEPS // 2)]
    words += ["--max_tokens", str(STEPS * 128), "--batch_size"]
    one, two = launcher.run(1, "one", [*words, "4"]), launcher.run(2, "two", [*words, "2"])
    same_run(one, two)
    before = bits(two)
    shutil.rmtree(two / "sae")
    shutil.rmtree(two / "checkpoints" / f"step_{STEPS:09d}")
    output = launcher.start(2, "two", [*words, "2", "--resume"]).finish()
    assert f"at step {STEPS // 2} of {STEPS}" in output
    assert bits(two) == before


def test_two_ranks_with_triton_equal_one(launcher: Launcher, topics_jsonl: str, tiny_bert: str) -> None:
    """Few steps, because without a GPU the kernels are interpreted."""
    pytest.importorskip("triton")
    launcher.environment |= {"TRITON_INTERPRET": "1"}
    flags = (
        "--layers 1 --kernels triton --device cpu --grad_acc_steps 2 --auxk_alpha 0.1 --num_latents 30 --k 2 "
        "--ctx_len 8 --dead_window_tokens 40 --max_tokens 160 --batch_size"
    )
    words = [tiny_bert, topics_jsonl, *flags.split()]
    one, several = launcher.run(1, "one", [*words, "2"]), launcher.run(2, "two", [*words, "1"])
    same_run(one, several, steps=5)
    assert any(line["saes"]["encoder.layer.1"]["loss_auxk"] > 0 for line in records(several) if line["kind"] == "train")


def test_micro_batches_and_ranks_share_a_batch_alike(launcher: Launcher, topics_jsonl: str, tiny_bert: str) -> None:
    common = [tiny_bert, topics_jsonl, "--layers", "1", "--kernels", "native", "--max_tokens", str(STEPS * 256)]
    one = launcher.run(1, "one", [*common, "--batch_size", "8"])
    several = launcher.run(2, "two", [*common, "--batch_size", "2", "--grad_acc_steps", "2"])
    same_run(one, several)


def start_hosts(launcher: Launcher, tmp_path: Path, name: str, words: list[str]) -> Ranks:
    """Start one rank on each of two hosts; the hosts have different disks."""
    port = str(free_port())
    commands = []
    for host in range(2):
        folder = tmp_path / f"host{host}"
        folder.mkdir(exist_ok=True)
        numbers = {"RANK": host, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
        environment = {**launcher.environment, **{key: str(value) for key, value in numbers.items()}}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        output = ["--save_dir", str(folder / "output"), "--run_name", name]
        commands.append(ForkedCommand([*words[:2], *SIZES.split(), *words[2:], *output], environment, folder))
    return Ranks(commands)


def test_two_hosts_with_disks_of_their_own(
    launcher: Launcher, topics_jsonl: str, tiny_bert: str, tmp_path: Path
) -> None:
    """The second host can't see the run directory, which is on the first one's disk."""
    words = [tiny_bert, topics_jsonl, "--layers", "1", "--kernels", "native", "--save_every", "20", "--batch_size"]
    one = launcher.run(1, "run", [*words, "4", "--max_tokens", str(STEPS * 128)])
    words = [*words, "2", "--max_tokens", str(STEPS * 128), "--resume"]
    run = tmp_path / "host0" / "output" / "run"
    first = start_hosts(launcher, tmp_path, "run", words)
    wait_for_step(first, run, 20)
    first.send_signal(signal.SIGTERM)
    first.finish()
    start_hosts(launcher, tmp_path, "run", words).finish()
    same_run(one, run)
    assert not (tmp_path / "host1" / "output").exists()


def test_the_commands_of_the_page(
    launcher: Launcher, topics_jsonl: str, tiny_bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page's torchrun command; its ranks equal a single process with the same global batch."""
    page = Path(__file__).parents[2] / "docs" / "distributed.md"
    (command,) = re.findall(r"^```bash\n(torchrun .*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    before, _, words = command.replace("\\\n", " ").partition(" -m saetrain ")
    model, data, *rest = shlex.split(words)
    shutil.copytree(tiny_bert, tmp_path / model)
    (tmp_path / data).mkdir()
    shutil.copy(topics_jsonl, tmp_path / data / "train.jsonl")
    arguments = [*shlex.split(before)[1:], "--nproc_per_node", "2"]
    monkeypatch.chdir(tmp_path)
    words = [model, data, *rest, *SIZES.split(), "--grad_acc_steps", "1", "--max_tokens", str(STEPS * 128)]
    process = launcher.start_torchrun("page", [*words, "--batch_size", "2"], arguments)
    assert "2 processes, data parallel" in finish_torchrun(process, 0)
    same_run(launcher.run(1, "one", [*words, "--batch_size", "4"]), tmp_path / "page")


def test_ranks_share_a_cache_of_activations(launcher: Launcher, topics_jsonl: str, tiny_bert: str) -> None:
    words = [tiny_bert, topics_jsonl, "--layers", "1", "--max_tokens", str(STEPS * 128), "--batch_size"]
    cache = ["--cache_activations", "--cache_dir", str(launcher.folder / "cache")]
    before = {world: bits(launcher.run(world, f"before{world}", [*words, str(4 // world)])) for world in (1, 2)}
    for name in ("computed", "read"):
        output = launcher.start(2, name, [*words, "2", *cache]).finish()
        assert bits(launcher.folder / name) == before[2]
        assert (" 0 were computed" in output) == (name == "read")
    output = launcher.start(1, "one", [*words, "4", *cache]).finish()
    assert bits(launcher.folder / "one") == before[1]
    assert " 0 were computed" in output
