"""What is timed: pieces of work, tools that do them, and the cases that set tools side by side.

Every worker imports this file, also in a peer's environment, so it needs the standard library alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

Kind = Literal["step", "end_to_end", "forward", "gemm", "adam"]


@dataclass(frozen=True)
class Work:
    """One piece of work; sizes are N tokens, D width, F latents, K active."""

    kind: Kind
    tokens: int = 2048
    width: int = 768
    latents: int = 6144
    k: int = 32
    dead_share: float = 0.0
    """Share of the latents that are dead at every step, so that AuxK works."""
    model: Literal["bert", "gpt2"] = "bert"
    model_dtype: Literal["fp32", "bf16"] = "fp32"
    blocks: int = 12
    heads: int = 12
    ctx_len: int = 512
    layers: tuple[int, ...] = (6,)
    """Blocks whose output is trained on, counted from 0."""


@dataclass(frozen=True, eq=False)
class Tool:
    """Who does the work: a module with ``build``, the environment it runs in, and its options."""

    name: str
    module: str
    environment: str | None = None
    """Folder under ``.bench/`` for a peer; None for our own environment."""
    options: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)
    """Fields of the case's work that this tool does otherwise, such as the model's dtype."""

    @property
    def peer(self) -> bool:
        """Whether it is somebody else's tool."""
        return self.environment is not None


@dataclass(frozen=True)
class Case:
    """Tools that do the same work and are timed in turn."""

    name: str
    group: str
    work: Work
    tools: tuple[Tool, ...]
    repeats: tuple[int, ...] = ()
    """Fixed numbers of steps, one sample each, in place of rounds of about equal length."""
    most_rounds: int = 100
    """Rounds at the most, where a sample takes long or is not compared with a peer's."""


def ours(kernels: str, compute_dtype: str, **changes: Any) -> Tool:
    """Our trainer by path."""
    name = f"ours {kernels} {compute_dtype}"
    return Tool(
        name,
        "benchmarks.saetrain_runner",
        options={"kernels": kernels, "compute_dtype": compute_dtype},
        changes=changes,
    )


PATHS: dict[str, tuple[Tool, ...]] = {
    "reference": (ours("reference", "fp32"),),
    "torch": (ours("torch", "bf16"), ours("torch", "fp32")),
    "native": (ours("native", "bf16"), ours("native", "fp32")),
}
"""Name of a path -> our tool by precision of the SAE's products, the fastest first."""

SPARSIFY = "benchmarks.peers.sparsify"
SAE_LENS = "benchmarks.peers.sae_lens"
DICTIONARY_LEARNING = "benchmarks.peers.dictionary_learning"
STEP_PEERS = (
    Tool("sparsify signum", SPARSIFY, "sparsify", {"optimizer": "signum"}),
    Tool("sparsify adam", SPARSIFY, "sparsify", {"optimizer": "adam"}),
    Tool("sae-lens", SAE_LENS, "sae-lens", {"autocast": False}),
    Tool("sae-lens autocast", SAE_LENS, "sae-lens", {"autocast": True}),
    Tool("dictionary_learning", DICTIONARY_LEARNING, "dictionary_learning"),
)
LONG_ROUNDS = 3
"""Rounds of the cases whose samples take many seconds."""
AUTOCAST = "sae-lens autocast + autocast_lm"
STEP_SHAPES = ((200, 32), (6144, 32), (6144, 192), (24576, 32), (24576, 192))


def step_cases(paths: list[str], peers: bool) -> list[Case]:
    """The SAE step alone, on prepared activations."""
    tools = tuple(tool for path in paths for tool in PATHS[path][:1]) + (STEP_PEERS if peers else ())
    return [
        Case(f"step F={latents} k={k}", "step", Work("step", latents=latents, k=k), tools) for latents, k in STEP_SHAPES
    ]


def fast(paths: list[str]) -> list[str]:
    """The paths but for the reference, where there are others: it is there to be compared with, in the steps."""
    return [path for path in paths if path != "reference"] or paths


def precision_cases(paths: list[str], peers: bool) -> list[Case]:
    """Our step with the SAE's products in fp32 beside the fastest precision."""
    tools = tuple(tool for path in fast(paths) for tool in PATHS[path])
    return [Case("precision F=6144 k=32", "precision", Work("step"), tools)]


def dead_cases(paths: list[str], peers: bool) -> list[Case]:
    """Our step with every latent alive and with 5 % of them dead (ours alone)."""
    tools = tuple(tool for path in fast(paths) for tool in PATHS[path][:1])
    dead = tuple(replace(tool, name=f"{tool.name}, 5 % dead", changes={"dead_share": 0.05}) for tool in tools)
    alive = tuple(replace(tool, name=f"{tool.name}, 0 % dead") for tool in tools)
    return [
        Case(f"dead latents F={latents} k={k}", "dead", Work("step", latents=latents, k=k), alive + dead, most_rounds=3)
        for latents, k in (STEP_SHAPES[1], *STEP_SHAPES[-1:] * peers)
    ]


def in_dtype(tool: Tool, dtype: str) -> Tool:
    """The tool over a model of that dtype."""
    return replace(tool, name=f"{tool.name}, {dtype} model", changes={**tool.changes, "model_dtype": dtype})


def floor(dtype: str) -> Tool:
    """Model forward to the hook, encoder GEMM in bf16 and fused Adam: what no trainer goes below."""
    return in_dtype(Tool("floor", "benchmarks.floors"), dtype)


def end_to_end_cases(paths: list[str], peers: bool) -> list[Case]:
    """From token ids to trained SAE: model, buffer and step."""
    dtypes = ("bf16", "fp32") if peers else ("bf16",)
    own = [in_dtype(PATHS[path][0], dtype) for path in fast(paths) for dtype in dtypes]
    own += [floor(dtype) for dtype in dtypes]
    bert: list[Tool] = []
    gpt2: list[Tool] = []
    if peers:
        signum = in_dtype(STEP_PEERS[0], "fp32")
        bert = [signum, in_dtype(STEP_PEERS[0], "bf16")]
        autocast = replace(STEP_PEERS[3], name=AUTOCAST, changes={"model_dtype": "bf16"})
        gpt2 = [signum, in_dtype(STEP_PEERS[2], "fp32"), autocast, in_dtype(STEP_PEERS[4], "fp32")]
    bert_work, gpt2_work = Work("end_to_end"), Work("end_to_end", model="gpt2")
    cases = [Case("end to end BERT", "end_to_end", bert_work, (*own, *bert), most_rounds=LONG_ROUNDS)]
    if peers:
        cases.append(Case("end to end GPT-2", "end_to_end", gpt2_work, (*own, *gpt2), most_rounds=LONG_ROUNDS))
    return cases


def layers_cases(paths: list[str], peers: bool) -> list[Case]:
    """All 12 layers of the model in one pass."""
    own = [in_dtype(PATHS[path][0], dtype) for path in fast(paths) for dtype in ("bf16", "fp32")]
    others = [in_dtype(STEP_PEERS[0], dtype) for dtype in ("fp32", "bf16")] if peers else []
    work = Work("end_to_end", layers=tuple(range(12)))
    return [Case("12 layers BERT", "layers", work, (*own, *others), most_rounds=LONG_ROUNDS)]


def floor_cases(paths: list[str], peers: bool) -> list[Case]:
    """What any trainer must pay at the least."""
    tool = Tool("torch", "benchmarks.floors")
    models: tuple[Literal["bert", "gpt2"], ...] = ("bert", "gpt2") if peers else ("bert",)
    dtypes: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16")
    works = {
        f"forward to block 6, {model}, {dtype}": Work("forward", model=model, model_dtype=dtype)
        for model in models
        for dtype in dtypes
    }
    sizes = sorted({latents for latents, _ in STEP_SHAPES})
    for latents in sizes:
        for dtype in dtypes:
            works[f"encoder GEMM F={latents}, {dtype}"] = Work("gemm", latents=latents, model_dtype=dtype)
        works[f"fused Adam F={latents}"] = Work("adam", latents=latents)
    return [Case(f"floor: {name}", "floors", work, (tool,), most_rounds=3) for name, work in works.items()]


def scaling_cases(paths: list[str], peers: bool) -> list[Case]:
    """Cost against latents, active latents and tokens of a step (ours alone)."""
    tools = tuple(PATHS[path][0] for path in fast(paths))
    works = [Work("step", latents=latents) for latents in (1536, 3072, 6144, 12288, 24576, 49152, 98304)]
    works += [Work("step", k=k) for k in (16, 64, 128, 256)]
    works += [Work("step", tokens=tokens) for tokens in (512, 1024, 4096, 8192, 16384)]
    return [Case(f"scaling F={w.latents} k={w.k} N={w.tokens}", "scaling", w, tools, most_rounds=2) for w in works]


def memory_cases(paths: list[str], peers: bool) -> list[Case]:
    """Peak memory against the number of tokens trained (ours alone)."""
    tools = tuple(PATHS[path][0] for path in paths)
    return [Case("memory over tokens", "memory", Work("step"), tools, repeats=(5, 10, 35, 50))]


GROUPS = {
    "step": step_cases,
    "precision": precision_cases,
    "dead": dead_cases,
    "end_to_end": end_to_end_cases,
    "layers": layers_cases,
    "floors": floor_cases,
    "scaling": scaling_cases,
    "memory": memory_cases,
}
"""Name in ``--cases`` -> the cases of that group."""

SHARED_WORKERS = ("floors",)
"""Groups whose workers are built anew for each case instead of started anew: their memory is not looked at."""
