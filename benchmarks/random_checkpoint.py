"""Writes a checkpoint of a released model's shape with random bf16 weights, in shards as transformers saves them.

    python -m benchmarks.random_checkpoint deepseek_v2_lite /tmp/deepseek --layers 8 --device cuda

`--layers` are the first ones of the model; the folder's name says nothing of it, its config.json does. `--mxfp4` writes
the experts of gpt_oss_20b as they are released: blocks of 4 bits with a scale for each.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

SHAPES: dict[str, dict[str, Any]] = {
    "olmoe_1b_7b": {
        "model_type": "olmoe",
        "vocab_size": 50304,
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
    },
    "deepseek_v2_lite": {
        "model_type": "deepseek_v2",
        "vocab_size": 102400,
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 512,
        "q_lora_rank": None,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "max_position_embeddings": 163840,
        "rope_theta": 10000,
        "rope_scaling": {
            "type": "yarn",
            "factor": 40,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
        },
    },
    "gpt_oss_20b": {
        "model_type": "gpt_oss",
        "vocab_size": 201088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 24,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
        "max_position_embeddings": 131072,
        "rope_theta": 150000,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
        },
    },
    "qwen3_30b_a3b": {
        "model_type": "qwen3_moe",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000,
    },
    "mixtral_8x7b": {
        "model_type": "mixtral",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000,
    },
    "gemma4_26b_a4b": {  # the text part
        "model_type": "gemma4_text",
        "vocab_size": 262144,
        "hidden_size": 2816,
        "intermediate_size": 2112,
        "moe_intermediate_size": 704,
        "num_hidden_layers": 30,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "num_global_key_value_heads": 2,
        "global_head_dim": 512,
        "attention_k_eq_v": True,
        "enable_moe_block": True,
        "hidden_size_per_layer_input": 0,
        "num_experts": 128,
        "top_k_experts": 8,
        "sliding_window": 1024,
        "final_logit_softcapping": 30.0,
        "max_position_embeddings": 262144,
    },
    "glm_4_5_air": {
        "model_type": "glm4_moe",
        "vocab_size": 151552,
        "hidden_size": 4096,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 46,
        "num_attention_heads": 96,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "attention_bias": True,
        "use_qk_norm": False,
        "partial_rotary_factor": 0.5,
        "n_routed_experts": 128,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "max_position_embeddings": 131072,
        "rope_theta": 1000000,
    },
}
SHARD = "4GB"
BLOCK, SCALE = 32, 120  # of MXFP4: values of a block; an exponent of 2**-7, so that weights are about 0.02


def write(shape: dict[str, Any], folder: Path, layers: int, device: str) -> None:
    """By transformers: its initialisation, and 1/sqrt(in) for matrices, so that hidden states stay of order one."""
    config = AutoConfig.for_model(**shape | {"num_hidden_layers": layers})
    with torch.device(device), torch.inference_mode():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            elif shape["model_type"] == "gemma4_text" and name.endswith(("router.scale", "k_norm.weight")):
                # Logits of order one: it divides those of the gate by the same, and those of attention by nothing.
                parameter.fill_(len(parameter) ** (0.5 if name.endswith("scale") else -0.5))
    model.save_pretrained(folder, max_shard_size=SHARD)


def quantise(folder: Path) -> None:
    """Random blocks and scales in place of the experts of gpt-oss, which the router and all else do not have."""
    config = json.loads((folder / "config.json").read_text())
    keep = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": keep}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    index: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
            E, depth, rows = tensors.pop(name).shape  # the released blocks are of rows
            tensors[f"{name}_blocks"] = torch.randint(256, (E, rows, depth // BLOCK, BLOCK // 2), dtype=torch.uint8)
            tensors[f"{name}_scales"] = torch.full((E, rows, depth // BLOCK), SCALE, dtype=torch.uint8)
        save_file(tensors, path, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, path.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, help="the first of them (default: all)")
    parser.add_argument("--positions", type=int, help="the longest sequence (default: that of the model)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--mxfp4", action="store_true")
    parser.add_argument("--bytes", action="store_true", help="256 ids, so that texts need no tokenizer")
    options = parser.parse_args()
    if options.mxfp4 and options.shape != "gpt_oss_20b":
        parser.error("--mxfp4: is of gpt_oss_20b")
    shape = SHAPES[options.shape]
    layers = options.layers or shape["num_hidden_layers"]
    if not 1 <= layers <= shape["num_hidden_layers"]:
        parser.error(f"--layers: must be between 1 and {shape['num_hidden_layers']}")
    if options.positions:
        shape |= {"max_position_embeddings": options.positions}
    if options.bytes:
        shape |= {"vocab_size": 256, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    write(shape, options.folder, layers, options.device)
    if options.mxfp4:
        quantise(options.folder)
    size = sum(path.stat().st_size for path in options.folder.glob("*.safetensors"))
    print(f"{options.folder}: {options.shape}, {layers} of {shape['num_hidden_layers']} layers, {size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
