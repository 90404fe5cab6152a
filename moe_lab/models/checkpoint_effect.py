"""Keys of a config.json that change no logits."""

from __future__ import annotations

NO_EFFECT = {
    *("architectures", "auto_map", "dtype", "model_type", "torch_dtype", "transformers_version", "unsloth_version"),
    *("_name_or_path", "_attn_implementation", "attn_implementation", "_attn_implementation_autoset"),
    *("bos_token_id", "pad_token_id", "decoder_start_token_id", "id2label", "label2id", "problem_type"),
    "eod_token_id",  # of hunyuan_v1_moe: where a document ends
    *("chunk_size_feed_forward", "output_attentions", "output_hidden_states", "pretraining_tp", "return_dict"),
    *("use_cache", "attention_dropout", "initializer_range", "output_router_logits", "router_aux_loss_coef"),
    *("router_jitter_noise", "router_z_loss_coef", "aux_loss_alpha", "seq_aux", "ep_size"),
    "initial_context_length",  # of gpt_oss: original_max_position_embeddings under another name
    # Of every model in files of transformers 4, for `generate` and for other kinds of models.
    *("add_cross_attention", "bad_words_ids", "begin_suppress_tokens", "cross_attention_hidden_size"),
    *("diversity_penalty", "do_sample", "early_stopping", "encoder_no_repeat_ngram_size"),
    *("exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id", "forced_eos_token_id"),
    *("is_decoder", "is_encoder_decoder", "length_penalty", "max_length", "min_length", "no_repeat_ngram_size"),
    *("num_beam_groups", "num_beams", "num_return_sequences", "output_scores", "prefix", "pruned_heads"),
    *("remove_invalid_values", "repetition_penalty", "return_dict_in_generate", "sep_token_id", "suppress_tokens"),
    *("task_specific_params", "temperature", "tf_legacy_loss", "tie_encoder_decoder", "tokenizer_class", "top_k"),
    *("top_p", "torchscript", "typical_p", "use_bfloat16"),
}
"""Keys of a config.json that change no logits: names, data types, ids for padding, and what only training reads."""

WITHOUT = {
    "attention_bias": False,
    "attn_logit_softcapping": 0,
    "clip_qkv": 0,
    "final_logit_softcapping": 0,
    "logit_scale": 1,
    "mlp_bias": False,
    "n_group": 1,
    "n_shared_experts": 0,
    "qkv_bias": False,
    "rope_interleaved": False,
    "rope_type": "default",
    "rotary_pct": 1,
    "routed_scaling_factor": 1,
    "scoring_func": "softmax",
    "shared_expert_intermediate_size": 0,
    "topk_group": 1,
    "use_qk_norm": False,
}
"""Keys of other architectures, each with the value that switches off what it is about."""
