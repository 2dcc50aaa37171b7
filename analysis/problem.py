"""The problem that a result is about: its size in words, options and arithmetic."""

from dataclasses import dataclass

ITEM_BYTES = {"f16": 2, "bf16": 2, "f32": 4}


@dataclass(frozen=True)
class Shape:
    """Self-attention of one sequence: [1, length, heads, dim]."""
    length: int
    heads: int
    dim: int
    dtype: str
    causal: bool
    kv_heads: int = 0  # 0: as many as query heads

    def flops(self):
        kept = self.length * (self.length + 1) // 2 if self.causal else self.length ** 2
        return 4 * self.dim * self.heads * kept

    def options(self):
        options = ["--shape", f"1,{self.length},{self.heads},{self.dim}", "--dtype", self.dtype]
        options += ["--kv-heads", str(self.kv_heads)] if self.kv_heads else []
        return options + ["--causal"] * self.causal

    def __str__(self):
        heads = f"{self.heads}/{self.kv_heads}" if self.kv_heads else str(self.heads)
        return (f"N={self.length} H={heads} D={self.dim} {self.dtype} "
                f"{'causal' if self.causal else 'full'}")
