"""Whether growing keeps the function of Hugging Face's model families: every family along every axis, in every room.

    python tools/check_families.py --write README.md

Every model is tiny and its own code. Each cell is the largest difference of the logits after twice the width, with
every unit copied, over the largest logit, all in fp32:

- module: a plain module, grown by itself, with parameters that all matter.
- engine: trained by ZeRO-3 on two ranks, under AutoEP where DeepSpeed has a preset for the family, grown in place.
- offline: the same engine's checkpoint, widened as files and loaded into a wide engine by plain DeepSpeed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

from benchmarks.common import free_port
from ds_sparkling.discovery.comparison import difference_after, first_runnable
from ds_sparkling.discovery.factory import HuggingFaceFactory, import_transformers
from ds_sparkling.discovery.instance import Instance
from ds_sparkling.discovery.resolve import find_axes
from ds_sparkling.errors import ConfigError, PlanError
from ds_sparkling.progress import progress_bar

#: What the table stands between in a file.
BEGIN, END = "<!-- families -->", "<!-- end of families -->"
#: The largest difference that counts as the same function.
KEPT = 1e-5
RANKS = 2

_COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT2 = {key: value for key, value in _COMMON.items() if key not in ("intermediate_size", "num_key_value_heads")}
_EXPERTS = {"moe_intermediate_size": 24, "num_experts_per_tok": 2}
_DEEPSEEK = {
    **_EXPERTS,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "topk_group": 1,
}


@dataclass(frozen=True)
class Family:
    """One architecture of the transformers library.

    Attributes:
        name: as people call it.
        config: a tiny model of it.
        experts: its axis of the experts' inner width; None for a dense model.
        preset: DeepSpeed's AutoEP preset for it, if there is one.
    """

    name: str
    config: Mapping[str, Any]
    experts: str | None = None
    preset: str | None = None


_INNER, _DENSE = "moe_intermediate_size", "intermediate_size"

FAMILIES = (
    Family("Qwen3-MoE", {"model_type": "qwen3_moe", **_COMMON, **_EXPERTS, "num_experts": 4, "head_dim": 8,
           "mlp_only_layers": [0]}, _INNER, "qwen3_moe"),
    Family("Qwen2-MoE", {"model_type": "qwen2_moe", **_COMMON, **_EXPERTS, "num_experts": 4,
           "shared_expert_intermediate_size": 40}, _INNER, "qwen3_moe"),
    Family("Mixtral", {"model_type": "mixtral", **_COMMON, "num_local_experts": 4, "num_experts_per_tok": 2},
           _DENSE, "mixtral"),
    Family("DeepSeek-V2", {"model_type": "deepseek_v2", **_COMMON, **_DEEPSEEK, "topk_method": "greedy",
           "n_group": 1}, _INNER, "deepseek_v2"),
    Family("DeepSeek-V3", {"model_type": "deepseek_v3", **_COMMON, **_DEEPSEEK, "n_group": 2}, _INNER, "deepseek_v3"),
    Family("OLMoE", {"model_type": "olmoe", **_COMMON, "num_experts": 4, "num_experts_per_tok": 2}, _DENSE),
    Family("GPT-OSS", {"model_type": "gpt_oss", **_COMMON, "num_local_experts": 4, "num_experts_per_tok": 2,
           "head_dim": 8, "sliding_window": 4}, _DENSE),
    Family("GLM-4-MoE", {"model_type": "glm4_moe", **_COMMON, **_EXPERTS, "n_routed_experts": 4,
           "n_shared_experts": 1, "first_k_dense_replace": 1, "head_dim": 8, "n_group": 1, "topk_group": 1,
           "use_qk_norm": True, "attention_bias": True}, _INNER),
    Family("Llama", {"model_type": "llama", **_COMMON}),
    Family("Qwen3", {"model_type": "qwen3", **_COMMON, "head_dim": 8, "tie_word_embeddings": True}),
    Family("Gemma", {"model_type": "gemma", **_COMMON, "head_dim": 8, "tie_word_embeddings": True}),
    Family("GPT-2", {"model_type": "gpt2", **_GPT2, "tie_word_embeddings": True}),
)  # fmt: skip

#: Widths that hang together, smallest set first: where heads hang on the hidden width, they have to grow along.
_HIDDEN = (
    ("hidden_size",),
    ("hidden_size", "num_attention_heads"),
    ("hidden_size", "num_attention_heads", "num_key_value_heads"),
)
COLUMNS = ("hidden", "experts", "dense MLP", "shared experts", "heads", "vocabulary")


def axis_sets(family: Family, column: str) -> Sequence[tuple[str, ...]]:
    """Sets of axes that may be a column's for a family, to be tried in this order."""
    return {
        "hidden": _HIDDEN,
        "experts": ((family.experts,),) if family.experts is not None else (),
        "dense MLP": ((_DENSE,),) if family.experts != _DENSE else (),
        "shared experts": (("shared_expert_intermediate_size",), ("n_shared_experts",)),
        "heads": (("num_attention_heads", "num_key_value_heads"), ("num_attention_heads",)),
        "vocabulary": (("vocab_size",),),
    }[column]


@dataclass(frozen=True)
class Cell:
    """What was found of a family and a column.

    Attributes:
        axes: that were grown.
        after: their widths afterwards.
        differences: of the logits, by room; empty if the growth is refused.
        refusal: why.
    """

    axes: tuple[str, ...]
    after: Mapping[str, int]
    differences: Mapping[str, float]
    refusal: str = ""


def grow_module(family: Family, column: str) -> Cell | None:
    """Grow a family's plain module; None if it has no such width."""
    factory = HuggingFaceFactory(family.config)
    settings = import_transformers().AutoConfig.for_model(**family.config)
    refused = None
    for axes in axis_sets(family, column):
        known = {axis: getattr(settings, axis, None) for axis in axes}
        widths = {axis: width for axis, width in known.items() if isinstance(width, int)}
        if widths.keys() != known.keys():
            continue
        after = {axis: 2 * width for axis, width in widths.items()}
        try:
            found = find_axes(factory, widths, [axes]).axes
        except PlanError as error:
            if not str(error).startswith("no parameter changes"):
                refused = refused or Cell(axes, after, {}, str(error))
            continue
        runnable = first_runnable([Instance(factory, widths, after)], None, torch.float32, seed=0)
        return Cell(axes, after, {"module": difference_after(runnable, found)})
    return refused


def measure(families: Sequence[Family]) -> dict[tuple[str, str], Cell]:
    """All cells of some families."""
    found = {(family.name, column): grow_module(family, column) for family in families for column in COLUMNS}
    cells = {key: cell for key, cell in found.items() if cell is not None}
    jobs = [
        (key, family.config, family.preset, cells[key].after)
        for family in families
        for key in cells
        if key[0] == family.name and not cells[key].refusal
    ]
    with tempfile.TemporaryDirectory(prefix="families-") as directory:
        torch.multiprocessing.spawn(_rank, (jobs, free_port(), Path(directory)), nprocs=RANKS)
        results = json.loads((Path(directory) / "results.json").read_text())
    for (key, *_), differences in zip(jobs, results, strict=True):
        cells[key] = replace(cells[key], differences={**cells[key].differences, **differences})
    return cells


def _rank(rank: int, jobs: Sequence[tuple[Any, ...]], port: int, scratch: Path) -> None:
    """What every spawned process does; rank 0 leaves the results in ``scratch``."""
    os.environ["DS_ACCELERATOR"] = "cpu"  # must be set before DeepSpeed is imported
    os.environ["OMP_NUM_THREADS"] = "1"
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what DeepSpeed prints must not get into the table
    from benchmarks.family_ranks import grow_both_ways, join

    join(rank, RANKS, port)
    quiet()
    results = []
    with progress_bar(jobs, desc="engines", unit="growth", shown=rank == 0) as bar:
        for index, (_, config, preset, after) in enumerate(bar):
            results.append(grow_both_ways(config, preset, after, scratch / str(index)))
    if rank == 0:
        (scratch / "results.json").write_text(json.dumps(results))
    sys.stderr.flush()
    os._exit(0)  # the interpreter's own way out aborts now and then in a thread of the backend


def quiet() -> None:
    """No advice about tokens and RoPE of tiny models."""
    import_transformers().logging.set_verbosity_error()


def markdown(families: Sequence[Family], cells: Mapping[tuple[str, str], Cell]) -> str:
    """The table, with the reasons of refusals below it."""
    reasons: list[str] = []
    lines = ["| family | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for family in families:
        row = [family.name + (" (AutoEP)" if family.preset else "")]
        for column in COLUMNS:
            cell = cells.get((family.name, column))
            if cell is None:
                row.append("-")
            elif cell.refusal:
                reasons.append(f"{family.name}, {column} ({', '.join(cell.axes)}): {cell.refusal}")
                row.append(f"refused [{len(reasons)}]")
            else:
                worst = "{module:.0e} / {engine:.0e} / {offline:.0e}".format(**cell.differences)
                along = "" if len(cell.axes) == 1 or column == "heads" else " (with heads)"
                row.append(worst.replace("0e+00", "0").replace("e-0", "e-") + along)
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join([*lines, "", *(f"[{number}] {reason}" for number, reason in enumerate(reasons, start=1))]) + "\n"


def write_into(path: Path, table: str) -> None:
    """Replace what stands between the marks in ``path``.

    Raises:
        ConfigError: if it has no marks.
    """
    text = path.read_text()
    before, mark, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not mark or not end:
        raise ConfigError(f"{path} has no lines {BEGIN!r} and {END!r} to put the table between")
    path.write_text(f"{before}{BEGIN}\n\n{table}\n{END}{after}")


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    names = [family.name for family in FAMILIES]
    parser = argparse.ArgumentParser(
        prog="check_families.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"all by default: {', '.join(names)}")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table between its marks in FILE")
    options = parser.parse_args(argv)
    unknown = [name for name in options.families if name not in names]
    if unknown:
        parser.error(f"unknown family {unknown[0]!r}; known: {', '.join(names)}")
    quiet()
    families = [family for family in FAMILIES if not options.families or family.name in options.families]
    cells = measure(families)
    table = markdown(families, cells)
    sys.stdout.write(table)
    if options.write is not None:
        write_into(options.write, table)
    worst = max((d for cell in cells.values() for d in cell.differences.values()), default=0.0)
    if not worst <= KEPT:
        sys.exit(f"error: a growth changes logits by {worst:.1e} of the largest, more than {KEPT:.0e}")


if __name__ == "__main__":
    main()
