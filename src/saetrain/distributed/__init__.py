"""Communication between ranks: launch environment, rendezvous, heartbeat, process group, collectives."""

from __future__ import annotations

from saetrain.distributed.collectives import (
    AsyncAllReduce,
    all_gather_json,
    all_reduce_max,
    all_reduce_sum,
    all_to_all_by_owner,
    barrier,
    broadcast_from_rank0,
    broadcast_tensors,
    gather_tensors_to_rank0,
    local_rank0_first,
    run_on_rank0,
)
from saetrain.distributed.gradient_buckets import (
    GradientBuckets,
)
from saetrain.distributed.process_group import (
    CommStats,
    CoordinatedExit,
    comm_stats,
    destroy_process_group,
    exit_now,
    init_process_group,
    init_tensor_group,
    on_peer_failure,
    phase,
    process_group_context,
    rank_prefix,
    record_progress,
    report_failure,
    set_phase,
    set_progress,
    was_restarted,
)

__all__ = [
    "AsyncAllReduce",
    "CommStats",
    "CoordinatedExit",
    "GradientBuckets",
    "all_gather_json",
    "all_reduce_max",
    "all_reduce_sum",
    "all_to_all_by_owner",
    "barrier",
    "broadcast_from_rank0",
    "broadcast_tensors",
    "comm_stats",
    "destroy_process_group",
    "exit_now",
    "gather_tensors_to_rank0",
    "init_process_group",
    "init_tensor_group",
    "local_rank0_first",
    "on_peer_failure",
    "phase",
    "process_group_context",
    "rank_prefix",
    "record_progress",
    "report_failure",
    "run_on_rank0",
    "set_phase",
    "set_progress",
    "was_restarted",
]
