"""The sizes of one FP8 block-scale mixture-of-experts layer, as a value.

Nothing here imports torch: the report reads geometries too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

BLOCK = 128  # one float32 scale stands for 1x128 of an activation row and 128x128 of a weight

Routing = Literal["deepseek_v3", "renormalize"]


@dataclass(frozen=True)
class MoEGeometry:
    """Sizes and routing method of a layer.

    `num_experts` counts the experts that routing chooses from, `num_local_experts` those whose weights are here.
    `n_group` and `topk_group` restrict DeepSeek-V3 routing to the best groups; both are 1 where there are no groups
    and for `renormalize` (softmax over the chosen logits).
    """

    num_experts: int
    num_local_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    routing: Routing = "deepseek_v3"
    n_group: int = 1
    topk_group: int = 1

    def __post_init__(self) -> None:
        for name in ("num_experts", "num_local_experts", "top_k", "hidden_size", "intermediate_size", "n_group", "topk_group"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("hidden_size", "intermediate_size"):
            if getattr(self, name) % BLOCK:
                raise ValueError(f"{name}: expected a multiple of {BLOCK}, got {getattr(self, name)}")
        if self.num_local_experts > self.num_experts:
            raise ValueError(f"num_local_experts: expected at most num_experts = {self.num_experts}, got {self.num_local_experts}")
        if self.num_experts % self.n_group:
            raise ValueError(f"n_group: expected a divisor of num_experts = {self.num_experts}, got {self.n_group}")
        if self.topk_group > self.n_group:
            raise ValueError(f"topk_group: expected at most n_group = {self.n_group}, got {self.topk_group}")
        if self.top_k > self.topk_group * (self.num_experts // self.n_group):
            raise ValueError(f"top_k: expected at most the experts of {self.topk_group} groups, got {self.top_k}")
        if self.routing not in ("deepseek_v3", "renormalize"):
            raise ValueError(f"routing: expected deepseek_v3 or renormalize, got {self.routing}")

    @property
    def experts_per_group(self) -> int:
        return self.num_experts // self.n_group

    @property
    def hidden_blocks(self) -> int:
        return self.hidden_size // BLOCK

    @property
    def intermediate_blocks(self) -> int:
        return self.intermediate_size // BLOCK

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert's e4m3 weights and float32 scales: 44.04 MB and 7 KB at the headline sizes."""
        weights = 3 * self.intermediate_size * self.hidden_size
        return weights + 4 * weights // (BLOCK * BLOCK)

    @property
    def pair_flops(self) -> int:
        """Floating-point operations of one pair in both GEMMs: 88.08 million at the headline sizes."""
        return 2 * 3 * self.intermediate_size * self.hidden_size

    @property
    def definition_name(self) -> str:
        sizes = f"e{self.num_local_experts}_h{self.hidden_size}_i{self.intermediate_size}"
        if self.routing == "deepseek_v3":
            return f"moe_fp8_block_scale_ds_routing_topk{self.top_k}_ng{self.n_group}_kg{self.topk_group}_{sizes}"
        return f"moe_fp8_block_scale_renormalize_routing_topk{self.top_k}_{sizes}"

    @classmethod
    def from_definition(cls, name: str) -> MoEGeometry | None:
        """The geometry of a bundled definition, or None for a definition that is not of this family."""
        return GEOMETRIES.get(name)


HEADLINE = MoEGeometry(256, 32, 8, 7168, 2048, "deepseek_v3", 8, 4)
TINY = MoEGeometry(32, 8, 4, 256, 128, "deepseek_v3", 4, 2)  # for tests and first contact

_ALL = (
    HEADLINE,
    MoEGeometry(384, 384, 8, 7168, 2048),
    MoEGeometry(384, 48, 8, 7168, 2048),
    MoEGeometry(128, 128, 8, 4096, 1536, "renormalize"),
    MoEGeometry(128, 128, 8, 2048, 768, "renormalize"),
    MoEGeometry(512, 128, 10, 2048, 512, "renormalize"),
    TINY,
)
GEOMETRIES: Mapping[str, MoEGeometry] = {geometry.definition_name: geometry for geometry in _ALL}
