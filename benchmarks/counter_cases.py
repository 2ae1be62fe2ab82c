"""Which calls have their kernels counted, and what is counted of each kernel."""

from typing import Any, NamedTuple

# The kernel that runs before a case is named so, with the case's place in its group.
MARK = "case_{}_begins"


class Case(NamedTuple):
    """One call of `attention_calls.implementations`."""

    shape: tuple[int, int, int, int, int]  # B, T, query heads, key heads, head size
    mask: str  # "full" or "causal"
    implementation: str
    is_backward: bool = False  # forward and backward

    def fields(self) -> dict[str, Any]:
        batch, length, heads, kv_heads, size = self.shape
        return {"B": batch, "T": length, "S": length, "H": heads, "K": kv_heads, "D": size,
                "mask": self.mask,
                "direction": "forward_backward" if self.is_backward else "forward",
                "implementation": self.implementation}  # fmt: skip


_64, _128, _256 = (8, 2048, 32, 32, 64), (8, 2048, 16, 16, 128), (8, 2048, 8, 8, 256)
_128_LONG, _128_LONGEST = (4, 4096, 16, 16, 128), (1, 16384, 16, 16, 128)
_256_GROUPED = (4, 4096, 16, 4, 256)
GROUPS = {
    "forward": (
        *(Case(shape, "full", "dpfa") for shape in (_64, _128, _128_LONG, _256)),
        *(Case(shape, "causal", "dpfa") for shape in (_64, _128, _128_LONG, _256)),
    ),
    "noise": tuple(
        Case(_128, "full", name) for name in ("dpfa_example", "dpfa_bound", "dpfa_example_bound")
    ),
    "noise_elsewhere": (
        Case(_128, "full", "dpfa_example_after"),
        Case(_128, "causal", "dpfa_example"),
        Case(_64, "full", "dpfa_example"),
        Case(_256, "full", "dpfa_example"),
    ),
    "backward": (
        *(Case(shape, "full", "dpfa", True) for shape in (_64, _128, _256)),
        Case(_128_LONGEST, "causal", "dpfa", True),
        Case(_256_GROUPED, "causal", "dpfa", True),
    ),
    "memory": tuple(Case(shape, "full", "dpfa_memory") for shape in (_128, _256, _128_LONG)),
    "peer": (
        Case(_128, "full", "cudnn", True),
        Case(_64, "full", "cudnn", True),
        Case(_128_LONG, "full", "cudnn"),
        Case(_128, "full", "cudnn_posthoc"),
    ),
}

_PERCENT = ".avg.pct_of_peak_sustained_elapsed"
METRICS = {
    "nanoseconds": "gpu__time_duration.sum",
    "cycles": "sm__cycles_elapsed.max",
    "tensor": f"sm__pipe_tensor_op_hmma_cycles_active{_PERCENT}",  # wgmma's too
    "tensor_instructions": "sm__inst_executed_pipe_tensor_op_gmma.sum",
    "issue": f"smsp__issue_active{_PERCENT}",
    "instructions": "smsp__inst_executed.sum",
    **{
        pipe: f"sm__inst_executed_pipe_{pipe}{_PERCENT}"
        for pipe in ("alu", "fma", "xu", "lsu", "uniform")
    },
    "shared_by_lsu": f"l1tex__data_pipe_lsu_wavefronts_mem_shared{_PERCENT}",
    "shared_conflicts": "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum",
    "l1_bank_reads": f"l1tex__data_bank_reads{_PERCENT}",
    "l1_bank_writes": f"l1tex__data_bank_writes{_PERCENT}",
    "l2_sectors": f"lts__t_sectors{_PERCENT}",
    "l2_hits": "lts__t_sector_hit_rate.pct",
    "dram": "dram__bytes.sum.pct_of_peak_sustained_elapsed",
    "dram_bytes_read": "dram__bytes_read.sum",
    "dram_bytes_written": "dram__bytes_write.sum",
    "occupancy": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "registers_a_thread": "launch__registers_per_thread",
    "blocks": "launch__grid_size",
    "threads_a_block": "launch__block_size",
}
STALLS = {
    reason: f"smsp__average_warps_issue_stalled_{reason}_per_issue_active.ratio"
    for reason in (
        "barrier", "branch_resolving", "dispatch_stall", "drain", "gmma", "imc_miss", "lg_throttle",
        "long_scoreboard", "math_pipe_throttle", "membar", "mio_throttle", "misc", "no_instruction",
        "not_selected", "selected", "short_scoreboard", "sleeping", "tex_throttle", "wait",
    )
}  # fmt: skip
