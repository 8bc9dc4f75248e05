"""A signal also stops a run whose steps are done, while its coders calibrate on a stream."""

from __future__ import annotations

import signal
from types import SimpleNamespace
from typing import Any

import pytest

from saetrain.runs.train import loop
from saetrain.runs.train.loop import TrainLoop
from saetrain.training.preemption import Preempted, PreemptionHandler
from tests.architectures.threshold import Threshold


def test_a_signal_stops_the_calibration(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def read(run: Any, cursors: Any) -> None:
        stopped.preemption.received_signal = signal.SIGTERM
        raise Preempted

    stopped: Any = TrainLoop.__new__(TrainLoop)
    stopped.preemption, stopped.context = (
        PreemptionHandler(),
        SimpleNamespace(plans={"h.0": SimpleNamespace(config=SimpleNamespace(coder_class=Threshold))}),
    )
    stopped.trainer, stopped.checkpointing = SimpleNamespace(step=7), SimpleNamespace(saved_step=7)
    stopped.batch_source = SimpleNamespace(state_dict=dict, read_cursors=dict)
    monkeypatch.setattr(loop, "RankGather", lambda context: SimpleNamespace(gather_states=dict))
    monkeypatch.setattr(loop, "read_batches_at", read)
    assert stopped._calibrate_coders() is False
    assert "stopped by SIGTERM after step 7; everything is saved; continue with --resume" in capsys.readouterr().err
    assert stopped.preemption.exit_code == 0
