"""GPUs that a plan knows: their memory and their speed."""

from __future__ import annotations

from dataclasses import dataclass

RESERVE = 0.1
"""Assumed share of GPU memory for CUDA, NCCL and fragmentation. Not measured."""


@dataclass(frozen=True)
class Gpu:
    """A GPU model: its memory, and its peak of dense bfloat16 operations per second."""

    memory_bytes: int
    bf16_flops: float

    @property
    def usable_bytes(self) -> int:
        """Memory less the reserve."""
        return int(self.memory_bytes * (1 - RESERVE))


# Operations: dense bfloat16 tensor-core peaks (no sparsity) of NVIDIA's data sheets of each card (H100 2023, H200 2024,
# A100 2021, L40S, L4, A10 and B200 in DGX B200 2024), and of the GA102, AD102 and GB202 whitepapers for RTX 3090, 4090
# and 5090 (float32 accumulation).
# Memory: GiB that PyTorch reports as total capacity in its out-of-memory message, rounded down; less than the nominal
# size.
GPUS = {
    name: Gpu(int(gibibytes * 2**30), teraflops * 1e12)
    for name, gibibytes, teraflops in (
        ("h100-80gb", 79.1, 989.4),
        ("h100-pcie-80gb", 79.1, 756.0),
        ("h200-141gb", 139.7, 989.4),
        ("a100-80gb", 79.1, 312.0),
        ("a100-40gb", 39.3, 312.0),
        ("l40s-48gb", 44.3, 362.0),
        ("a10-24gb", 21.9, 125.0),
        ("l4-24gb", 21.9, 121.0),
        ("rtx3090-24gb", 23.5, 71.0),
        ("rtx4090-24gb", 23.5, 165.2),
        ("b200-180gb", 178.3, 2250.0),
        ("rtx5090-32gb", 31.3, 209.5),
    )
}
