"""Build what flashinfer_cutlass_moe needs of FlashInfer 0.6.7.post3 for Hopper, ahead of its first use, without a GPU:

    python scripts/build_flashinfer_moe.py PACKAGE OUT [--tvm-ffi DIR] [--include DIR]... [--library FILE]... [--jobs 16]

PACKAGE is FlashInfer's unpacked package folder. OUT/fused_moe_90/fused_moe_90.so and OUT/dsv3_fused_routing/dsv3_fused_routing.so
come out: copied to PACKAGE/data/aot/ they are loaded in the place of modules compiled at first use. FlashInfer compiles 181 sources
for every pair of types; this layer runs one pair, bfloat16 activations by e4m3 weights, whose products are FlashInfer's
DeepGEMM (compiled at run time, by shape) and whose own CUTLASS launchers are empty. So 14 sources are left, once the runner's
choice of types and its list of instantiations are cut to that pair. What is left is compiled as it is, with FlashInfer's flags.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

KERNELS = "nv_internal/tensorrt_llm/kernels"
_NAMES = ("envUtils.cpp", "logger.cpp", "stringUtils.cpp", "tllmException.cpp", "memoryUtils.cu")
COMMON = [f"nv_internal/cpp/common/{name}" for name in _NAMES]
INSTANTIATION = "fused_moe/cutlass_backend/cutlass_fused_moe_instantiation.cu"
BINDING = "fused_moe/cutlass_backend/flashinfer_cutlass_fused_moe_binding.cu"
MODULES = {
    "fused_moe_90": [
        INSTANTIATION,  # the longest first
        BINDING,
        f"{KERNELS}/cutlass_kernels/fp8_blockscale_gemm/fp8_blockscale_gemm.cu",
        f"{KERNELS}/cutlass_kernels/moe_gemm/moe_gemm_kernels_bf16_fp8.cu",
        f"{KERNELS}/cutlass_kernels/moe_gemm/moe_gemm_tma_warp_specialized_input.cu",
        "fused_moe/cutlass_backend/deepgemm_jit_setup.cu",
        f"{KERNELS}/preQuantScaleKernel.cu",
        f"{KERNELS}/cutlass_kernels/cutlass_heuristic.cpp",
        f"{KERNELS}/lora/lora.cpp",
        *COMMON,
    ],
    "dsv3_fused_routing": ["fused_moe/noAuxTcKernels.cu", *COMMON],
}
# (file, from, up to, what stands there instead)
CUTS = (
    (
        INSTANTIATION, "template class CutlassMoeFCRunner<float, float>;", "// Explicit instantiations for finalize",
        "template class CutlassMoeFCRunner<__nv_bfloat16, __nv_fp8_e4m3, __nv_bfloat16>;\n\n",
    ),
    (
        BINDING, "    // keep consistent with cpp/tensorrt_llm/plugins", "    if (!mKernelRunner) {",
        "    if (mActivationDtype == dl_bfloat16 && mWeightDtype == dl_float8_e4m3fn) {\n"
        "      mKernelRunner = std::make_unique<kernels::CutlassMoeFCRunner<__nv_bfloat16, __nv_fp8_e4m3>>();\n    }\n",
    ),
)  # fmt: skip
DEFINES = (
    "NDEBUG", "Py_LIMITED_API=0x03090000", "_GLIBCXX_USE_CXX11_ABI=1", "CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED",
    "FLASHINFER_ENABLE_F16", "FLASHINFER_ENABLE_BF16", "FLASHINFER_ENABLE_FP8_E4M3", "FLASHINFER_ENABLE_FP8_E5M2",
    "FLASHINFER_ENABLE_FP8_E8M0", "FLASHINFER_ENABLE_FP4_E2M1", "COMPILE_HOPPER_TMA_GEMMS", "COMPILE_HOPPER_TMA_GROUPED_GEMMS",
    "ENABLE_BF16", "ENABLE_FP8", "ENABLE_FP8_BLOCK_SCALE", "ENABLE_FP4", "USING_OSS_CUTLASS_MOE_GEMM",
)  # fmt: skip
DEVICE_FLAGS = (
    "--compiler-options=-fPIC", "--expt-relaxed-constexpr", "-static-global-template-stub=false", "-use_fast_math",
    "-gencode=arch=compute_90a,code=sm_90a",
)  # fmt: skip


def cut(sources: Path) -> None:
    """Leave one pair of types in the runner; raises ValueError where the sources are not those that this was written for."""
    for name, begin, end, instead in CUTS:
        text = (sources / name).read_text()
        if begin not in text or end not in text:
            raise ValueError(f"{name}: expected FlashInfer 0.6.7.post3")
        (sources / name).write_text(text[: text.index(begin)] + instead + text[text.index(end) :])


def flags(sources: Path, package: Path, arguments: argparse.Namespace) -> list[str]:
    inner = "nv_internal/tensorrt_llm"
    own = ["", "nv_internal", "nv_internal/include", f"{inner}/cutlass_extensions/include"]
    own += [f"{KERNELS}/cutlass_kernels/include", f"{KERNELS}/cutlass_kernels"]
    data = package / "data"
    system = [arguments.cuda / "include", arguments.cuda / "include/cccl", arguments.tvm_ffi / "include", data / "include"]
    system += [data / "cutlass/include", data / "cutlass/tools/util/include", data / "spdlog/include"]
    return [
        "-std=c++17", "-O3", *(f"-D{name}" for name in DEFINES),
        *(f"-I{sources / folder}" for folder in own), *(f"-I{folder}" for folder in arguments.include),
        *(word for folder in system for word in ("-isystem", str(folder))),
    ]  # fmt: skip


def compiled(source: Path, work: Path, common: list[str], nvcc: Path) -> Path:
    target = work / f"{source.name}.o"
    begun = time.time()
    if not target.exists():
        first = [str(nvcc), *DEVICE_FLAGS] if source.suffix == ".cu" else ["g++", "-fPIC"]
        partial = target.with_suffix(".partial")
        done = subprocess.run([*first, *common, "-c", str(source), "-o", str(partial)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{source.name}:\n{done.stderr[-4000:]}")
        partial.rename(target)
    print(f"{source.name} {time.time() - begun:.0f} s", flush=True)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tvm-ffi", type=Path, help="tvm_ffi's package folder; default: beside PACKAGE")
    parser.add_argument("--cuda", type=Path, default=Path("/usr/local/cuda"))
    parser.add_argument("--include", type=Path, action="append", default=[], help="headers that the CUDA folder lacks")
    parser.add_argument("--library", action="append", default=[], help="-lcuda -lcudart -lnvrtc, as files, where the linker finds none")
    parser.add_argument("--jobs", type=int, default=16)
    arguments = parser.parse_args()
    arguments.tvm_ffi = arguments.tvm_ffi or arguments.package.parent / "tvm_ffi"
    work = arguments.out / "work"
    work.mkdir(parents=True, exist_ok=True)
    sources = work / "csrc"
    if not sources.exists():
        shutil.copytree(arguments.package / "data/csrc", sources)
        cut(sources)
    common = flags(sources, arguments.package, arguments)
    libraries = arguments.library or [f"-L{arguments.cuda}/lib64", f"-L{arguments.cuda}/lib64/stubs", "-lcudart", "-lcuda", "-lnvrtc"]
    names = list(dict.fromkeys(name for module in MODULES.values() for name in module))
    with ThreadPoolExecutor(arguments.jobs) as pool:
        objects_of = pool.map(lambda name: compiled(sources / name, work, common, arguments.cuda / "bin/nvcc"), names)
        built = dict(zip(names, objects_of, strict=True))
    for module, parts in MODULES.items():
        target = arguments.out / module / f"{module}.so"
        target.parent.mkdir(exist_ok=True)
        objects = [str(built[name]) for name in parts]
        subprocess.run(["g++", "-shared", "-Wl,--no-as-needed", "-s", *objects, *libraries, "-o", str(target)], check=True)
        print(f"{target}: {target.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    sys.exit(main())
