"""What is timed: workloads, the tools that run them, and cases that compare tools on one workload.

Every worker imports this file, also in the environment of another tool, so it needs only the standard library.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

Kind = Literal["step", "end_to_end", "forward", "gemm", "adam"]


@dataclass(frozen=True)
class Work:
    """A workload; its sizes are N tokens, D width, F latents, K active."""

    kind: Kind
    architecture: str = "topk"
    tokens: int = 2048
    width: int = 768
    latents: int = 6144
    k: int = 32
    dead_share: float = 0.0
    """Share of the latents that are dead at every step, so that AuxK has work to do."""
    model: Literal["bert", "gpt2"] = "bert"
    model_dtype: Literal["fp32", "bf16"] = "fp32"
    blocks: int = 12
    heads: int = 12
    ctx_len: int = 512
    layers: tuple[int, ...] = (6,)
    """Blocks whose output is trained on, counted from 0."""
    grid: tuple[tuple[int, int], ...] = ()
    """Latents and active latents of each SAE of a layer; empty: one SAE with ``latents`` and ``k``."""

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Latents and active latents of each SAE of a layer."""
        return self.grid or ((self.latents, self.k),)


@dataclass(frozen=True, eq=False)
class Tool:
    """A way to run a workload: a module with ``build``, its environment and its options."""

    name: str
    module: str
    environment: str | None = None
    """Folder under ``.bench/`` of another tool; None for saetrain's own environment."""
    options: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)
    """Fields of the case's workload that this tool overrides, such as the model's dtype."""

    @property
    def peer(self) -> bool:
        """Whether the tool is not part of this project."""
        return self.environment is not None


@dataclass(frozen=True)
class Case:
    """Tools that run the same workload and are timed in turn."""

    name: str
    group: str
    work: Work
    tools: tuple[Tool, ...]
    repeats: tuple[int, ...] = ()
    """Fixed numbers of steps, one sample each, instead of rounds of about equal length."""
    max_rounds: int = 100
    """Lower where a sample takes long, or is not compared with a peer's."""


def saetrain_tool(kernels: str, compute_dtype: str) -> Tool:
    """saetrain with the given kernels and dtype of the SAE's matrix products."""
    name = f"saetrain {kernels} {compute_dtype}"
    return Tool(name, "benchmarks.saetrain_runner", options={"kernels": kernels, "compute_dtype": compute_dtype})


KERNELS: dict[str, tuple[Tool, ...]] = {
    "reference": (saetrain_tool("reference", "fp32"),),
    "torch": (saetrain_tool("torch", "bf16"), saetrain_tool("torch", "fp32")),
    "native": (saetrain_tool("native", "bf16"), saetrain_tool("native", "fp32")),
}
"""Name of the kernels -> saetrain with each dtype of the SAE's matrix products, the fastest first."""

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


def step_cases(kernels: list[str], peers: bool) -> list[Case]:
    """The SAE's training step alone, on prepared activations."""
    tools = tuple(tool for name in kernels for tool in KERNELS[name][:1]) + (STEP_PEERS if peers else ())
    return [
        Case(f"step F={latents} k={k}", "step", Work("step", latents=latents, k=k), tools) for latents, k in STEP_SHAPES
    ]


ARCHITECTURE_SHAPES = (
    ("batchtopk", 6144),
    ("batchtopk", 24576),
    ("matryoshka", 6144),
    ("jumprelu", 6144),
    ("standard", 6144),
    ("abstopk", 6144),
)
MATRYOSHKA_PARTS = (16, 8, 4, 2, 1)
"""The default prefixes of matryoshka are the latents divided by these."""
FIRST_STEPS = (20,) * 10
"""Rounds of the first 200 steps, in which the number of active latents changes."""


NOT_NATIVE = ("standard", "abstopk")
"""Architectures that only the torch kernels train."""


def architecture_tools(architecture: str, kernels: list[str]) -> tuple[Tool, ...]:
    """saetrain with the kernels that train an architecture."""
    names = [name for name in without_reference(kernels) if name != "native" or architecture not in NOT_NATIVE]
    return tuple(tool for name in names for tool in KERNELS[name][:1])


def architecture_works() -> dict[str, Work]:
    """{name: the training step of another architecture than topk}; k is the wanted L0."""
    return {
        f"{architecture} F={latents} k=32": Work("step", architecture, latents=latents)
        for architecture, latents in ARCHITECTURE_SHAPES
    }


def architecture_cases(kernels: list[str], peers: bool) -> list[Case]:
    """The training step of each architecture next to our topk, after the first 200 steps of our own."""
    cases = []
    for name, work in architecture_works().items():
        own = architecture_tools(work.architecture, kernels)
        topk = tuple(replace(tool, name=f"{tool.name}, topk", changes={"architecture": "topk"}) for tool in own)
        settled = tuple(replace(tool, options={**tool.options, "warmup": sum(FIRST_STEPS)}) for tool in own)
        tools = (*settled, *topk, *(STEP_PEERS[2:] if peers else ()))
        cases.append(Case(f"architecture {name}", "architectures", work, tools, max_rounds=LONG_ROUNDS))
    return cases


def first_steps_cases(kernels: list[str], peers: bool) -> list[Case]:
    """The first 200 steps of the architectures whose number of active latents changes."""
    others = STEP_PEERS[2:] if peers else ()
    return [
        Case(
            *(f"first 200 steps, {name}", "first_steps", work),
            (*architecture_tools(work.architecture, kernels), *others),
            repeats=FIRST_STEPS,
        )
        for name, work in architecture_works().items()
        if work.latents == 6144 and work.architecture in ("batchtopk", "matryoshka", "jumprelu")
    ]


def without_reference(kernels: list[str]) -> list[str]:
    """All kernels but the reference, which only the step cases compare with; the reference where it is alone."""
    return [name for name in kernels if name != "reference"] or kernels


def precision_cases(kernels: list[str], peers: bool) -> list[Case]:
    """saetrain's step with the SAE's matrix products in bf16 and in fp32."""
    tools = tuple(tool for name in without_reference(kernels) for tool in KERNELS[name])
    return [Case("precision F=6144 k=32", "precision", Work("step"), tools)]


def dead_cases(kernels: list[str], peers: bool) -> list[Case]:
    """saetrain's step without dead latents and with 5 % of them dead."""
    tools = tuple(tool for name in without_reference(kernels) for tool in KERNELS[name][:1])
    dead = tuple(replace(tool, name=f"{tool.name}, 5 % dead", changes={"dead_share": 0.05}) for tool in tools)
    alive = tuple(replace(tool, name=f"{tool.name}, 0 % dead") for tool in tools)
    return [
        Case(f"dead latents F={latents} k={k}", "dead", Work("step", latents=latents, k=k), alive + dead, max_rounds=3)
        for latents, k in (STEP_SHAPES[1], *STEP_SHAPES[-1:] * peers)
    ]


def with_model_dtype(tool: Tool, dtype: str) -> Tool:
    """The tool with the model in the given dtype."""
    return replace(tool, name=f"{tool.name}, {dtype} model", changes={**tool.changes, "model_dtype": dtype})


def floor_tool(dtype: str) -> Tool:
    """The lower bound of an end-to-end step: forward pass to the hook, encoder GEMM in bf16, and fused Adam."""
    return with_model_dtype(Tool("floor", "benchmarks.floors"), dtype)


def end_to_end_cases(kernels: list[str], peers: bool) -> list[Case]:
    """From token ids to a trained SAE: model, buffer and step."""
    dtypes = ("bf16", "fp32") if peers else ("bf16",)
    own = [with_model_dtype(KERNELS[name][0], dtype) for name in without_reference(kernels) for dtype in dtypes]
    own += [floor_tool(dtype) for dtype in dtypes]
    bert: list[Tool] = []
    gpt2: list[Tool] = []
    if peers:
        signum = with_model_dtype(STEP_PEERS[0], "fp32")
        bert = [signum, with_model_dtype(STEP_PEERS[0], "bf16")]
        autocast = replace(STEP_PEERS[3], name=AUTOCAST, changes={"model_dtype": "bf16"})
        gpt2 = [signum, with_model_dtype(STEP_PEERS[2], "fp32"), autocast, with_model_dtype(STEP_PEERS[4], "fp32")]
    bert_work, gpt2_work = Work("end_to_end"), Work("end_to_end", model="gpt2")
    cases = [Case("end to end BERT", "end_to_end", bert_work, (*own, *bert), max_rounds=LONG_ROUNDS)]
    if peers:
        cases.append(Case("end to end GPT-2", "end_to_end", gpt2_work, (*own, *gpt2), max_rounds=LONG_ROUNDS))
    return cases


def layers_cases(kernels: list[str], peers: bool) -> list[Case]:
    """All 12 layers of the model in one pass."""
    own = [
        with_model_dtype(KERNELS[name][0], dtype) for name in without_reference(kernels) for dtype in ("bf16", "fp32")
    ]
    others = [with_model_dtype(STEP_PEERS[0], dtype) for dtype in ("fp32", "bf16")] if peers else []
    work = Work("end_to_end", layers=tuple(range(12)))
    return [Case("12 layers BERT", "layers", work, (*own, *others), max_rounds=LONG_ROUNDS)]


GRIDS = {
    "1 SAE": ((6144, 32),),
    "16 SAEs": ((6144, 32),) * 16,
    "5 sizes": STEP_SHAPES,
}
"""{name: latents and active latents of the SAEs of one layer}."""


def with_grid(tool: Tool, name: str) -> Tool:
    """The tool with the SAEs of one of GRIDS."""
    return replace(tool, name=f"{tool.name}, {name}", changes={**tool.changes, "grid": GRIDS[name]})


def grid_cases(kernels: list[str], peers: bool) -> list[Case]:
    """Many SAEs on one layer in one run, next to one SAE; and SAEs of several sizes, next to each alone."""
    own = KERNELS[without_reference(kernels)[-1]][0]
    cases = []
    for model in ("bert", "gpt2") if peers else ("bert",):
        tools = [
            with_model_dtype(with_grid(own, name), dtype) for dtype in ("fp32", "bf16") for name in ("1 SAE", "16 SAEs")
        ]
        if model == "gpt2":
            tools += [with_model_dtype(with_grid(STEP_PEERS[2], name), "fp32") for name in ("1 SAE", "16 SAEs")]
        work = Work("end_to_end", model=model)
        cases.append(Case(f"grid on one layer, {model}", "grid", work, tuple(tools), max_rounds=LONG_ROUNDS))
    alone = [
        replace(own, name=f"{own.name}, F={latents} k={k}", changes={"grid": ((latents, k),)})
        for latents, k in STEP_SHAPES
    ]
    cases.append(Case("step of 5 sizes", "grid", Work("step"), (with_grid(own, "5 sizes"), *alone)))
    return cases


def floor_cases(kernels: list[str], peers: bool) -> list[Case]:
    """The parts of the lower bound, one by one."""
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
    return [Case(f"floor: {name}", "floors", work, (tool,), max_rounds=3) for name, work in works.items()]


def scaling_cases(kernels: list[str], peers: bool) -> list[Case]:
    """saetrain's step over numbers of latents, active latents and tokens per step."""
    tools = tuple(KERNELS[name][0] for name in without_reference(kernels))
    works = [Work("step", latents=latents) for latents in (1536, 3072, 6144, 12288, 24576, 49152, 98304)]
    works += [Work("step", k=k) for k in (16, 64, 128, 256)]
    works += [Work("step", tokens=tokens) for tokens in (512, 1024, 4096, 8192, 16384)]
    return [Case(f"scaling F={w.latents} k={w.k} N={w.tokens}", "scaling", w, tools, max_rounds=2) for w in works]


def memory_cases(kernels: list[str], peers: bool) -> list[Case]:
    """saetrain's peak memory after more and more tokens."""
    tools = tuple(KERNELS[name][0] for name in kernels)
    return [Case("memory over tokens", "memory", Work("step"), tools, repeats=(5, 10, 35, 50))]


GROUPS = {
    "step": step_cases,
    "architectures": architecture_cases,
    "first_steps": first_steps_cases,
    "precision": precision_cases,
    "dead": dead_cases,
    "end_to_end": end_to_end_cases,
    "layers": layers_cases,
    "grid": grid_cases,
    "floors": floor_cases,
    "scaling": scaling_cases,
    "memory": memory_cases,
}
"""Name in ``--cases`` -> the cases of that group."""

SHARED_WORKERS = ("floors",)
"""Groups whose workers serve all cases of the group, because their memory is not reported."""
