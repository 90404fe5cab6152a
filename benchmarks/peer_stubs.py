"""Modules in place of those that the kernels of vLLM and FlashInfer import but do not need: `benchmarks.pack_peers`."""

from __future__ import annotations

_FUSED_MOE = "vllm/model_executor/layers/fused_moe"

VLLM = {
    "vllm/__init__.py": '__version__ = "0.26.0"\n',
    "vllm/utils/__init__.py": "",
    "vllm/third_party/__init__.py": "",
    "vllm/model_executor/__init__.py": "",
    "vllm/model_executor/layers/__init__.py": "",
    "vllm/logger.py": """
import logging


class _Logger(logging.LoggerAdapter):
    def info_once(self, *args, scope=None):
        pass

    def warning_once(self, message, *args, scope=None):
        self.warning(message, *args)


def init_logger(name):
    return _Logger(logging.getLogger(name), {})
""",
    "vllm/platforms/__init__.py": """
import pathlib

import torch


class _Cuda:
    dispatch_key = "CUDA"

    def is_cuda(self):
        return True

    def is_rocm(self):
        return False

    is_cpu = is_xpu = is_tpu = is_rocm

    def is_pin_memory_available(self):
        return True

    def fp8_dtype(self):
        return torch.float8_e4m3fn

    def get_device_name(self, device_id=0):
        return torch.cuda.get_device_name(device_id)

    def import_kernels(self):
        for name in ("_C_stable_libtorch", "_moe_C_stable_libtorch"):
            torch.ops.load_library(pathlib.Path(__file__).parents[1] / f"{name}.abi3.so")


current_platform = _Cuda()
""",
    "vllm/utils/flashinfer.py": """
def flashinfer_quant_nvfp4_8x4_sf_layout(*args):
    raise NotImplementedError("not in this pack")
""",
    f"{_FUSED_MOE}/__init__.py": """
def get_config():
    return None
""",
    f"{_FUSED_MOE}/config.py": """
import types

import torch

FusedMoEQuantConfig = types.SimpleNamespace
_NAMES = "ocp_mx_scheme w1_scale w2_scale w1_zp w2_zp a1_scale a2_scale block_shape w1_bias w2_bias"
_FLAGS = "use_fp8_w8a8 use_int8_w8a8 use_int8_w8a16 use_int4_w4a16 per_act_token_quant"
FUSED_MOE_UNQUANTIZED_CONFIG = FusedMoEQuantConfig(
    **dict.fromkeys(_NAMES.split()), **dict.fromkeys(_FLAGS.split(), False)
)


def _get_config_dtype_str(dtype, **quantised):
    assert not any(quantised.values())
    return "float32" if dtype == torch.float else None
""",
    f"{_FUSED_MOE}/modular_kernel.py": """
class FusedMoEExpertsModular:
    @staticmethod
    def adjust_N_for_activation(N, activation):
        return N if not activation.is_gated else N // 2
""",
    f"{_FUSED_MOE}/utils.py": """
def enable_swap_ab(*block):
    raise NotImplementedError("only for fp8, which is not in this pack")


def moe_kernel_quantize_input(A, A_scale, quant_dtype, **options):
    assert quant_dtype is None
    return A, A_scale
""",
}

_CUTE = "flashinfer/fused_moe/cute_dsl"
FROST = "flashinfer/fused_moe/backends/frost_low_latency/fma"

FLASHINFER = {
    "flashinfer/__init__.py": '__version__ = "0.7.4"\n',
    "flashinfer/cute_dsl/__init__.py": "",
    "flashinfer/jit/__init__.py": "",
    "flashinfer/fused_moe/__init__.py": "",
    f"{_CUTE}/__init__.py": "",
    "flashinfer/fused_moe/backends/__init__.py": "",
    "flashinfer/fused_moe/backends/frost_low_latency/__init__.py": "",
    f"{FROST}/__init__.py": "",
    f"{FROST}/bf16/__init__.py": "",
    f"{FROST}/nvfp4/__init__.py": "",
    f"{FROST}/activation_config.py": """
def lower_activation(activation):
    raise NotImplementedError("not in this pack")
""",
    "flashinfer/fi_trace.py": """
_REGISTRY = {}


def build_fi_trace_fn(*arguments, **options):
    return None
""",
    "flashinfer/jit/moe_utils.py": """
def gen_moe_utils_module():
    raise NotImplementedError("not in this pack")
""",
    "flashinfer/utils.py": """
import functools

import torch


@functools.cache
def get_compute_capability(device):
    return torch.cuda.get_device_capability(device.index)


def check_shape_dtype_device(*arguments):
    raise NotImplementedError("not in this pack")
""",
}
"""Path in the pack: source. The kernels, their launches and the tables of tiles are the projects' own files."""
