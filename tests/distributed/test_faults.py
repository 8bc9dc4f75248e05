"""One rank is killed, stuck, or raises: the other ranks exit with the reason, and the run can be resumed."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from saetrain.training.checkpoint import find_damage, list_checkpoints
from tests.distributed.conftest import (
    PEER_EXIT_S,
    Launcher,
    bits,
    finish_torchrun,
    free_port,
    records,
    same_run,
    steps_done,
    torchrun_workers,
    wait_for_step,
    weights,
)
from tests.distributed.raises import (
    install_dead_file_server,
    install_faults,
    install_frequent_beats,
    install_lock_holder,
    install_quick_heartbeat,
    install_slow_model,
)
from tests.processes import finish

LONG = 3000
WORDS = ["--layers", "1", "--kernels", "native", "--save_every", "40"]


@pytest.fixture
def words(tiny_bert: str, topics_jsonl: str) -> list[str]:
    return [tiny_bert, topics_jsonl, *WORDS]


def tokens(steps: int) -> list[str]:
    """Return the flag for this many steps of 4 sequences."""
    return ["--max_tokens", str(steps * 4 * 32)]


def check_interrupted_run(run: Path) -> None:
    """Check that every checkpoint is intact and that no SAE was saved."""
    checkpoints = list_checkpoints(run / "checkpoints")
    assert checkpoints
    assert all(find_damage(path) is None for path in checkpoints)
    assert not (run / "sae").exists()


def test_a_killed_rank_is_named_and_a_restart_resumes(launcher: Launcher, words: list[str]) -> None:
    """The store outlives the ranks, as torchrun's does."""
    words = [*words, *tokens(120), "--batch_size", "2"]
    untouched = launcher.run(2, "untouched", words)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = launcher.start(2, "killed", words, install_frequent_beats, store=store)
    wait_for_step(ranks, launcher.folder / "killed", 45)
    ranks.commands[1].kill()
    output = finish(ranks.commands[0], None, PEER_EXIT_S)
    assert re.search(r"rank 1 has not answered for .* last phase was .*, step \d+", output), output
    assert "resumed from" in launcher.start(2, "killed", words, store=store).finish()
    assert bits(launcher.folder / "killed") == bits(untouched)


@pytest.mark.soak
def test_torchrun_restarts_a_run_whose_rank_was_killed(launcher: Launcher, words: list[str]) -> None:
    words = [*words, *tokens(300), "--batch_size", "2"]
    untouched = launcher.run(2, "untouched", words)
    arguments = ["--standalone", "--nproc_per_node", "2", "--max_restarts", "2", "--monitor_interval", "0.1"]
    process = launcher.start_torchrun("killed", words, arguments)
    wait_for_step(process, launcher.folder / "killed", 90)
    torchrun_workers(process)[1].kill()
    output = finish_torchrun(process, 0)
    assert re.search(r"rank 1 has not answered for .* last phase was .*, step \d+", output), output
    assert "resumed from" in output
    assert bits(launcher.folder / "killed") == bits(untouched)


def test_a_stuck_rank_is_named(launcher: Launcher, words: list[str]) -> None:
    ranks = launcher.start(2, "stuck", [*words, *tokens(LONG), "--batch_size", "2"], install_quick_heartbeat)
    wait_for_step(ranks, launcher.folder / "stuck", 50)
    ranks.commands[1].send_signal(signal.SIGSTOP)
    begun = time.monotonic()
    output = finish(ranks.commands[0], None, PEER_EXIT_S + 30)
    assert "saetrain: rank 0: error: rank 1 has not answered" in output
    assert time.monotonic() - begun < PEER_EXIT_S + 5
    check_interrupted_run(launcher.folder / "stuck")


def test_a_rank_that_waits_forever_for_text_is_named(launcher: Launcher, words: list[str]) -> None:
    """Rank 0 serves the store, and its main thread waits for the thread that reads."""
    launcher.environment["SAETRAIN_PROGRESS_TIMEOUT_MINUTES"] = "0.06"
    ranks = launcher.start(2, "stalled", [*words, *tokens(LONG), "--batch_size", "2"], install_dead_file_server)
    ranks.finish(1, PEER_EXIT_S)
    first, second = (command.read_output() for command in ranks.commands)
    failure = r"error: rank 0 failed in training, step \d+: no progress for \d+ s, and the limit is 4 s .*result \("
    assert re.search(f"saetrain: rank 0: {failure}", first), first
    assert re.search(f"saetrain: rank 1: {failure}", second), second
    assert first.count("in read_from_dead_server") == 1, first
    assert "read_from_dead_server" not in second


@pytest.mark.soak
def test_torchrun_restarts_a_rank_that_makes_no_progress(launcher: Launcher, words: list[str]) -> None:
    launcher.environment |= {"SAETRAIN_PROGRESS_TIMEOUT_MINUTES": "0.1", "HANGS_AT": "90"}
    words = [*words, *tokens(150), "--batch_size", "2"]
    arguments = ["--standalone", "--nproc_per_node", "2", "--max_restarts", "1", "--monitor_interval", "0.1"]
    program = [str(Path(__file__).with_name("raises.py"))]
    output = finish_torchrun(launcher.start_torchrun("stalled", words, arguments, program), 0)
    failure = r"error: rank 1 failed in training, step 91: no progress for .* innermost first: wait_for_device \("
    for rank in range(2):
        assert re.search(f"rank {rank}: {failure}", output), output
    assert output.count("in wait_for_device\n") == 1, output
    assert "resumed from" in output
    assert steps_done(launcher.folder / "stalled") == 150


def test_a_rank_that_holds_pythons_lock_prints_its_stacks(launcher: Launcher, words: list[str]) -> None:
    ranks = launcher.start(2, "locked", [*words, *tokens(LONG), "--batch_size", "2"], install_lock_holder)
    output = finish(ranks.commands[0], 1, PEER_EXIT_S + 30)
    assert "saetrain: rank 0: error: rank 1 has not answered" in output
    assert "in hold_python_lock" in ranks.commands[1].read_output()


def test_a_slow_rank_is_no_failure(launcher: Launcher, words: list[str]) -> None:
    """Rank 0 waits for rank 1 for longer than the limit."""
    launcher.environment["SAETRAIN_PROGRESS_TIMEOUT_MINUTES"] = "0.06"
    words = [*words, *tokens(50), "--batch_size", "2", "--model_batch_tokens", "32"]
    output = launcher.start(2, "slow", words, install_slow_model).finish()
    assert records(launcher.folder / "slow")[0]["rank0/waiting"] > 0.5
    assert "no progress" not in output


def test_an_error_of_one_rank_ends_all(launcher: Launcher, words: list[str]) -> None:
    launcher.environment["RAISES_AT"] = "60"
    ranks = launcher.start(2, "raising", [*words, *tokens(LONG), "--batch_size", "2"], install_faults)
    output = ranks.finish(None, PEER_EXIT_S + 30)
    assert "ValueError: made to fail" in output
    assert "rank 0: error: rank 1 failed in training, step 61: ValueError: made to fail" in output, output
    check_interrupted_run(launcher.folder / "raising")


def test_a_data_set_that_fails_on_one_rank_ends_all(launcher: Launcher, tiny_bert: str, tmp_path: Path) -> None:
    """Two hosts, each with a copy of the text on its own disk; one copy is damaged."""
    launcher.environment |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    launcher.environment |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    hosts = []
    for host in range(2):
        launcher.home = tmp_path / f"host{host}"
        launcher.home.mkdir()
        rows = [json.dumps({"text": f"{number} " + "some words of a row " * 20}) for number in range(300)]
        if host == 1:
            rows[250] = rows[250][:20]
        (launcher.home / "text.jsonl").write_text("\n".join(rows) + "\n")
        launcher.environment |= {"RANK": str(host)}
        hosts.append(launcher.start(1, "run", [tiny_bert, "text.jsonl", *WORDS, *tokens(20), "--batch_size", "2"]))
    first, second = [host.finish(2, PEER_EXIT_S) for host in hosts]
    assert "text.jsonl, line 251: is not valid JSON" in second
    assert (
        "rank 0: error: rank 1 failed in reading and tokenizing the data set: data set 'text.jsonl' could not" in first
    )
    assert "Traceback" not in first + second
    assert not list((launcher.folder / "run").glob("[!.]*"))


def test_sigterm_saves_and_another_number_of_processes_resumes(launcher: Launcher, words: list[str]) -> None:
    words = [*words, *tokens(150)]
    one = launcher.run(1, "one", [*words, "--batch_size", "4"])
    run = launcher.folder / "moved"
    output = ""
    for world, until in ((4, 30), (2, 80), (4, None)):
        ranks = launcher.start(world, "moved", [*words, "--batch_size", "1", *(["--resume"] if until != 30 else [])])
        if until is None:
            ranks.finish()
            break
        wait_for_step(ranks, run, until)
        ranks.send_signal(signal.SIGTERM)
        output = ranks.finish()
        assert "stopped by SIGTERM after step" in output
        assert "everything is saved" in output
        assert steps_done(run) < 150
    assert "--batch_size 1 --grad_acc_steps 2 keep the run's steps of 4 sequences on 2 processes" in output
    # In so many steps rounding decides some of the choices among pre-activations that are nearly the same.
    same_run(one, run, 1e-3)
    assert [line["step"] for line in records(run) if line["kind"] == "train"] == list(range(1, 151))


@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM to torchrun"])
def test_a_stop_waits_for_a_slow_checkpoint(launcher: Launcher, words: list[str], how: str) -> None:
    launcher.environment["SAVES_IN"] = "4"
    words = [*words, *tokens(LONG), "--batch_size", "2", "--save_every", "1000000"]
    run = launcher.folder / "slow"
    if how == "Ctrl-C":
        ranks = launcher.start(2, "slow", words, install_faults)
        wait_for_step(ranks, run, 50)
        ranks.send_signal(signal.SIGINT)
        output = ranks.finish(None, PEER_EXIT_S)
    else:
        program = [str(Path(__file__).with_name("raises.py"))]
        process = launcher.start_torchrun("slow", words, ["--standalone", "--nproc_per_node", "2"], program)
        wait_for_step(process, run, 50)
        process.terminate()
        output = finish_torchrun(process, None, PEER_EXIT_S)
    assert f"stopped by {'SIGINT' if how == 'Ctrl-C' else 'SIGTERM'} after step" in output, output
    assert "error" not in output[: output.index("stopped by")]
    assert int(list_checkpoints(run / "checkpoints")[-1].name[5:]) == steps_done(run)
    check_interrupted_run(run)


@pytest.mark.soak
def test_several_hosts_restart(launcher: Launcher, words: list[str], tmp_path: Path) -> None:
    """Of two torchruns, only that of the killed process counts the restart."""
    words = [*words, *tokens(400), "--batch_size", "2", "--overwrite"]
    arguments = ["--nnodes", "2", "--rdzv_backend", "c10d", "--rdzv_id", "restart", "--nproc_per_node", "1"]
    arguments += ["--max_restarts", "2", "--monitor_interval", "0.1", "--rdzv_endpoint", f"127.0.0.1:{free_port()}"]
    agents = [launcher.start_torchrun("run", words, arguments) for _ in range(2)]
    run = launcher.folder / "run"
    wait_for_step(agents[0], run, 90)
    ((number, worker),) = torchrun_workers(agents[1]).items()
    worker.kill()
    outputs = [finish_torchrun(agent, 0) for agent in agents]
    assert any(f"rank {number} has not answered" in output for output in outputs), outputs
    assert any("resumed from" in output for output in outputs), outputs
    assert steps_done(run) == 400


def test_a_number_of_processes_that_does_not_divide_a_step_is_refused(launcher: Launcher, words: list[str]) -> None:
    words = [*words, *tokens(4)]
    launcher.run(2, "run", [*words, "--batch_size", "2"])
    refused = launcher.start(3, "run", [*words, "--batch_size", "2", "--resume"]).finish(None)
    assert "steps of 4 sequences (2 x 1 micro-batches x 2 processes) can't be split evenly over 3" in refused
    refused = launcher.start(1, "run", [*words, "--batch_size", "3", "--resume"]).finish(2)
    assert "--batch_size is 3 now and was 2" in refused
    assert "the number of processes is 1 now and was 2" in refused
    assert weights(launcher.folder / "run")


@pytest.mark.parametrize("parallel", ["data", "hookpoints"])
def test_a_spike_on_one_rank_ends_all_with_one_message(
    parallel: str, launcher: Launcher, tiny_bert: str, topics_jsonl: str
) -> None:
    words = [tiny_bert, topics_jsonl, "--layers", "0", "1", "--parallel", parallel, "--batch_size", "2"]
    words += ["--lr", "1e12", "--max_grad_norm", "0", *tokens(200)]
    # This store outlives rank 0, so that rank 1 learns that rank 0 has reported the spike.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    output = launcher.start(2, "spiking", words, store=store).finish(None)
    assert output.count("the batch's position is in") == 1, output
    place = json.loads((launcher.folder / "spiking" / "spike.json").read_text())
    assert len(place["shards"]) == 16


def test_processes_must_agree(launcher: Launcher, words: list[str]) -> None:
    starts, port = [], str(free_port())
    for number, k in enumerate(("3", "5")):
        launcher.environment |= {
            "RANK": str(number),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        more = [*tokens(4), "--batch_size", "2", "--config", write_config(launcher, k)]
        starts.append(launcher.start(1, "differing", [*words, *more]))
    outputs = [start.finish(2, 120) for start in starts]
    assert any("--lr is " in output and "on rank 1 and" in output for output in outputs), outputs


def write_config(launcher: Launcher, rate: str) -> str:
    """Write a settings file with another learning rate."""
    path = launcher.folder / f"{rate}.yaml"
    path.write_text(f"lr: 0.00{rate}\n")
    return str(path)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0"}, "the environment lacks MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "two"}, "environment variable WORLD_SIZE=two: must be a whole number"),
        (
            {"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29515"},
            "environment variable RANK=2: must be below WORLD_SIZE=2",
        ),
        (
            {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29515"}
            | {"SAETRAIN_PROGRESS_TIMEOUT_MINUTES": "soon"},
            "environment variable SAETRAIN_PROGRESS_TIMEOUT_MINUTES=soon: must be a number of minutes",
        ),
    ],
)
def test_a_broken_launch(launcher: Launcher, words: list[str], variables: dict[str, str], message: str) -> None:
    launcher.environment |= variables
    output = launcher.start(1, "run", words).finish(2, 60)
    assert message in output
    assert "Traceback" not in output


def test_too_few_shards(launcher: Launcher, words: list[str]) -> None:
    output = launcher.start(2, "run", [*words, *tokens(4), "--batch_size", "2", "--data_shards", "1"]).finish(None)
    assert "--data_shards 1: fewer than the 2 processes" in output
