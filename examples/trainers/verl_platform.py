"""verl on a CPU, by its own registry of platforms; import it before anything else of verl."""

from __future__ import annotations

import contextlib
import os
import warnings

os.environ["VERL_PLATFORM"] = "cpu"
os.environ.setdefault("VERL_LOGGING_LEVEL", "ERROR")
warnings.filterwarnings("ignore", message=".*engine is not available")

import torch  # noqa: E402
from verl.plugin.platform.platform_base import PlatformBase  # noqa: E402
from verl.plugin.platform.platform_manager import PlatformRegistry  # noqa: E402


def _nothing(self, *args, **kwargs):
    """Streams, memory and profilers are of no concern to a CPU."""


_METHODS = {
    "device_name": property(lambda self: "cpu"),
    "vendor_name": property(lambda self: "cpu"),
    "device_module": property(lambda self: torch.cpu),
    "is_available": lambda self: True,
    "is_platform_available": lambda self, use_smi_check=False: True,
    "current_device": lambda self: "cpu",
    "device_count": lambda self: 1,
    "get_device_capability": lambda self, device_index=0: (None, None),
    "communication_backend_name": lambda self: "gloo",
    "visible_devices_envvar": lambda self: "CPU_VISIBLE_DEVICES",
    "nvtx_range": lambda self, msg: contextlib.nullcontext(),
    "ray_resource_name": lambda self: "CPU",
    "ray_noset_envvars": lambda self: [],
    "is_ipc_supported": lambda self: False,
}
_OTHERS = {name: _nothing for name in PlatformBase.__abstractmethods__ if name not in _METHODS}
PlatformCPU = PlatformRegistry.register("cpu")(type("PlatformCPU", (PlatformBase,), {**_METHODS, **_OTHERS}))
