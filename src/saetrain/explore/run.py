"""``saetrain explore RUN``: load the model and SAEs of a run, and serve its page with a view of prompts."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from saetrain.config import EvaluateConfig
from saetrain.errors import SaetrainError
from saetrain.explore.prompt import PromptModel, describe_model
from saetrain.explore.settings import ExploreConfig
from saetrain.logs.console import log_rank0, print_rank0
from saetrain.report.build import load_run_saes, render_pages
from saetrain.runs.evaluate.setup import build_eval_context
from saetrain.runs.train.setup import quiet_libraries

if TYPE_CHECKING:
    from saetrain.explore.server import PageServer

PACKAGES = ("starlette", "uvicorn")


def explore_run(config: ExploreConfig) -> None:
    """Serve the page of a run until Ctrl-C; SaetrainError for a user's errors."""
    require_packages()
    server = build_server(config)
    log_rank0("open this address in a browser; Ctrl-C ends the server:")
    print_rank0(server.url)
    sys.stdout.flush()
    server.serve_requests()


def build_server(config: ExploreConfig) -> PageServer:
    """Load a run and its model, and return the server of its page, which answers nothing yet."""
    from saetrain.explore.server import PageServer, open_socket

    quiet_libraries()
    run = Path(config.run)
    loaded = load_run_saes(run)
    eval_config = EvaluateConfig(path=config.run, model=config.model, base=config.base)
    with contextlib.ExitStack() as on_error:
        opened = on_error.enter_context(open_socket(config.port))
        context = build_eval_context(eval_config, loaded, None)
        # The pages need the weights on the CPU.
        pages = render_pages(run, loaded, prompt=describe_model(context))
        server = PageServer(pages, PromptModel(context), opened)
        on_error.pop_all()
    return server


def require_packages() -> None:
    """Raise SaetrainError if a package of the server is missing."""
    for package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise SaetrainError(f"explore: the package {package} is not installed; run pip install 'saetrain[explore]'")
