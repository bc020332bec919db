"""AMD GPUs: a ROCm build of torch answers under `torch.cuda`, so only the description differs."""

from __future__ import annotations

import torch

from lmesh_kernels.platforms.cuda import CudaPlatform
from lmesh_kernels.platforms.platform import DeviceInfo


def is_rocm_build() -> bool:
    """Whether this torch was built against HIP."""
    return torch.version.hip is not None


class RocmPlatform(CudaPlatform):
    """One HIP device."""

    name = "rocm"

    def describe(self) -> DeviceInfo:
        """Name and memory; HIP's major and minor are no compute capability, the architecture's name is noted."""
        properties = torch.cuda.get_device_properties(self.device)
        free, total = torch.cuda.mem_get_info(self.device)
        return DeviceInfo(
            name=properties.name,
            kind=self.name,
            total_bytes=total,
            free_bytes=free,
            notes=(f"hip={torch.version.hip}", f"arch={getattr(properties, 'gcnArchName', 'unknown')}"),
        )

    def default_dtype(self) -> torch.dtype:
        """bfloat16: every accelerator that ROCm builds support has it."""
        return torch.bfloat16
