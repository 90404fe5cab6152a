"""Measures the load time of a checkpoint compared with a plain read of its files, and the host memory that it needs.

    python -m benchmarks.checkpoint_load /tmp/olmoe --write --device cuda

`--write` first fills the folder with an OLMoE-1B-7B-shaped checkpoint of random bf16 weights in shards. The plain read
reads each file into a buffer of 64 MiB, with one thread and with as many threads as the loader uses. Every
measurement runs in its own process; with `--cold` the page cache is dropped before each (root, Linux).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

OLMOE = {
    "model_type": "olmoe",
    "architectures": ["OlmoeForCausalLM"],
    "vocab_size": 50304,
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "clip_qkv": None,
    "attention_bias": False,
    "torch_dtype": "bfloat16",
}


def write(folder: Path, device: str, layers_per_shard: int) -> None:
    """Random weights: matrices of standard deviation 1/sqrt(in), the embedding 1, norms 1."""
    import torch
    from safetensors.torch import save_file

    D, F, V, L, E = (
        OLMOE[key] for key in ("hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers", "num_experts")
    )
    generator = torch.Generator(device).manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        values = torch.randn(rows, columns, device=device, generator=generator) * columns**-0.5
        return values.to(torch.bfloat16).cpu()

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(OLMOE, indent=1))
    ones = torch.ones(D, dtype=torch.bfloat16)
    shards = [
        {"model.embed_tokens.weight": matrix(V, D) * D**0.5, "lm_head.weight": matrix(V, D), "model.norm.weight": ones}
    ]
    for layer in range(L):
        if layer % layers_per_shard == 0:
            shards.append({})
        at, shard = f"model.layers.{layer}", shards[-1]
        for name in ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"):
            shard[f"{at}.{name}.weight"] = ones.clone()
        for name in "qkvo":
            shard[f"{at}.self_attn.{name}_proj.weight"] = matrix(D, D)
        shard[f"{at}.mlp.gate.weight"] = matrix(E, D)
        for expert in range(E):
            for name, shape in (("gate_proj", (F, D)), ("up_proj", (F, D)), ("down_proj", (D, F))):
                shard[f"{at}.mlp.experts.{expert}.{name}.weight"] = matrix(*shape)
    index = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(shard, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def read(folder: Path, threads: int) -> float:
    """Seconds of a plain read of all safetensors files."""
    pieces = []
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        pieces += [(path, at, min(1 << 26, size - at)) for at in range(0, size, 1 << 26)]

    def one(some: list[tuple[Path, int, int]]) -> None:
        buffer = bytearray(1 << 26)
        for path, at, length in some:
            with open(path, "rb", buffering=0) as stream:
                stream.seek(at)
                stream.readinto(memoryview(buffer)[:length])

    start = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(one, [pieces[i::threads] for i in range(threads)]))
    return time.perf_counter() - start


def load(folder: Path, device: str, dtype: str) -> tuple[float, float, float]:
    """(seconds to build and load, host memory at its peak and before in MB), the device woken before."""
    import torch

    import moe_lab
    from moe_lab.runs import build

    cfg = moe_lab.compose(
        ["model=checkpoint", f"model.path={folder}", "router=native", f"device={device}", f"dtype={dtype}"]
    )
    torch.zeros(1, device=device)
    before = _resident()
    start = time.perf_counter()
    build.build_model(cfg)
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return seconds, _peak(), before


def _status(key: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1e3


def _resident() -> float:
    return _status("VmRSS")


def _peak() -> float:
    return _status("VmHWM")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--layers-per-shard", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--only", choices=("read1", "readN", "load"), help="run only this measurement, in this process")
    options = parser.parse_args()
    threads = min(8, os.cpu_count() or 1)
    if options.only == "load":
        print(json.dumps(load(options.folder, options.device, options.dtype)))
        return
    if options.only:
        print(json.dumps(read(options.folder, 1 if options.only == "read1" else threads)))
        return
    if options.write and not (options.folder / "config.json").exists():
        write(options.folder, options.device, options.layers_per_shard)
    sizes = [path.stat().st_size for path in options.folder.glob("*.safetensors")]
    print(f"command: python -m benchmarks.checkpoint_load {' '.join(sys.argv[1:])}")
    print(f"{len(sizes)} files, {sum(sizes) / 1e9:.2f} GB, the largest {max(sizes) / 1e9:.2f} GB; {threads} threads")
    print(f"page cache: {'dropped before each' if options.cold else 'warm'}\n")
    for what in ("read1", "readN", "load"):
        for _ in range(options.repeats):
            if options.cold:
                subprocess.run("sync; echo 3 > /proc/sys/vm/drop_caches", shell=True, check=True)
            command = [sys.executable, "-m", "benchmarks.checkpoint_load", *sys.argv[1:], "--only", what]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            if what == "load":
                seconds, peak, before = found
                largest = max(sizes) / 1e6
                print(
                    f"load   {seconds:6.2f} s  {sum(sizes) / 1e9 / seconds:6.2f} GB/s  host memory {peak:.0f} MB, "
                    f"{before:.0f} before: {(peak - before) / largest:.2f} x the largest file"
                )
            else:
                print(f"{what}  {found:6.2f} s  {sum(sizes) / 1e9 / found:6.2f} GB/s")


if __name__ == "__main__":
    main()
