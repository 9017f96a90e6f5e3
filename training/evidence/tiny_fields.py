"""What the configs of tiny models are made of: sizes by their names, and what single architectures want beside."""

from typing import Any


VOCAB_SIZE = 96
# What a size is cut to, by the names that configs give it.
SIZES = {
    VOCAB_SIZE: ("vocab_size", "vocab_size_per_layer_input"),
    32: (
        *("hidden_size", "d_model", "n_embd", "embed_dim", "dim", "word_embed_proj_dim", "hidden_dim"),
        *("dim_model_base", "projection_dim", "out_hidden_size", "encoder_hidden_size", "text_hidden_size"),
        *("projector_hidden_size", "projection_hidden_size", "vision_hidden_size", "mm_hidden_size"),
        *("attention_hidden_size", "expert_ffn_hidden_size", "emb_dim", "d_embed"),
    ),
    48: (
        *("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner", "decoder_ffn_dim", "encoder_ffn_dim"),
        *("intermediate_size_mlp", "d_ff", "d_inner"),
    ),
    16: (
        *("moe_intermediate_size", "shared_expert_intermediate_size", "q_lora_rank", "kv_lora_rank", "image_size"),
        *("shared_intermediate_size", "qk_head_dim", "share_expert_dim", "num_position_embeddings"),
    ),
    64: ("mamba_d_ssm",),
    2: (
        *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers", "depth"),
        *("num_key_value_heads", "num_kv_heads", "num_experts_per_tok", "moe_topk", "moe_k", "temporal_patch_size"),
        *("num_experts_per_token", "linear_num_key_heads", "num_blocks", "num_decoder_layers"),
    ),
    4: (
        *("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"),
        *("encoder_attention_heads", "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
        *("patch_size", "rotary_dim", "linear_num_value_heads", "num_query_tokens", "image_seq_length"),
        *("num_image_tokens", "mm_tokens_per_image", "laurel_rank"),
    ),
    8: (
        *("head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "hidden_size_per_layer_input"),
        *("mamba_n_heads", "mamba_d_head", "mamba_d_state", "state_size", "linear_key_head_dim"),
        *("linear_value_head_dim", "d_kv", "d_head"),
    ),
    1: (
        *("n_group", "topk_group", "first_k_dense_replace", "n_shared_experts", "moe_num_shared_experts"),
        *("mamba_n_groups", "cross_attention_frequency"),
    ),
    256: ("max_position_embeddings", "n_positions", "max_seq_len"),
    # Fewer columns than a prompt has.
    6: ("sliding_window", "attention_chunk_size"),
}
# In towers for pictures some of them are others.
TOWERS = {
    32: ("output_dim", "vision_output_dim", "projector_input_dim", "projector_output_dim"),
    4: ("num_key_value_heads", "init_pos_emb_height", "init_pos_emb_width", "pos_emb_height", "pos_emb_width"),
    16: ("crop_size", "window_size"),
}
IDS = {
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "decoder_start_token_id": 1,
    "image_token_id": 95,
    "image_token_index": 95,
    "video_token_id": 93,
    "video_token_index": 93,
    "audio_token_id": 92,
    "vision_start_token_id": 91,
    "vision_end_token_id": 90,
    "image_start_token_id": 91,
    "image_end_token_id": 90,
    "video_start_token_id": 89,
    "video_end_token_id": 88,
    "tie_word_embeddings": False,  # or a token is often followed by itself
}
# What follows from the number of layers or the sizes of heads, and is better left to the config.
LEFT_OUT = (
    *("layer_types", "per_layer_config", "mlp_layer_types", "rope_parameters", "no_rope_layers", "model_type"),
    *("dtype", "max_window_layers"),
)
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
# Positions on three axes.
AXES = ROPE | {"mrope_section": [1, 1, 2]}
MROPE = {"text_config": {"rope_parameters": AXES}}
DENSE_AND_SPARSE = {"mlp_layer_types": ["dense", "sparse"]}
QFORMER = {"hidden_size": 64, "num_attention_heads": 4, "encoder_hidden_size": 64, "intermediate_size": 32}
# Rows of pictures are added to in the first layers of the text model, too.
DEEPSTACK = {"vision_config": {"deepstack_visual_indexes": [0, 1]}}
OMNI = MROPE | {"vision_start_token_id": 91, "vision_end_token_id": 90, "audio_start_token_id": 89}
SAM = {"image_size": 64, "window_size": 4, "global_attn_indexes": [1], "output_channels": 32, "mlp_dim": 48}
SAM |= {"num_pos_feats": 16, "downsample_channels": [16, 32]}
SCALED = ROPE | {"partial_rotary_factor": 0.5, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 256}
GEMMA3N = {"intermediate_size": [48, 48], "num_kv_shared_layers": 0, "activation_sparsity_pattern": None}
GRID = {"image_grid_pinpoints": [[16, 32], [32, 16]]}
INDEXER = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8}
INDEXER |= {"indexer_compress_ratio": 4, "ngram_vocab_size_base": 96, "output_gate_type": "sigmoid"}
# A tokenizer of pictures, as small as it goes.
VQ = {"embed_dim": 8, "base_channels": 32, "num_res_blocks": 1}
NAMED = {"<image>": 95, "<|extra_200|>": 59}
# What architectures want beside; `...` leaves a field out.
FIELDS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("qwen2_vl", "qwen2_5_vl", "glm4v", "glm46v", "glm_ocr", "glmga", "paddleocr_vl"),
        MROPE,
    ),
    **dict.fromkeys(("qwen3_vl", "qwen3_vl_moe"), MROPE | DEEPSTACK),
    **dict.fromkeys(
        ("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral"), {"rope_parameters": ROPE, "head_dim": 8, "moe_topk": 2}
    ),
    "qwen2_5_omni_thinker": OMNI,
    "qwen3_omni_moe_thinker": OMNI | DEEPSTACK,
    "apertus1p5": {
        "image_token_offset": 60,
        "audio_token_offset": 68,
        "audio_config": {"codebook_dim": 32, "codebook_size": 8},
        "vision_config": {"base_channels": 32, "codebook_size": 8},
    },
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "bamba": {"attn_layer_indices": [1]},
    "blt": {
        "encoder_hash_byte_group_vocab": 96,
        **{f"{part}_config": {"head_dim": 8, "num_key_value_heads": 4} for part in ("patcher", "decoder", "global")},
        "encoder_config": {"num_key_value_heads": 4},
    },
    "chameleon": {
        "vocabulary_map": NAMED | {f"IMGIMG{chr(65 + place)}Z": 60 + place for place in range(8)},
        "vq_config": VQ
        | {"num_embeddings": 8, "latent_channels": 32, "resolution": 16, "channel_multiplier": [1, 1, 2]},
    },
    "cohere_compass": {"text_config": {"rope_parameters": {"full_attention": AXES}}, **DEEPSTACK},
    "cohere_compass_text": {"rope_parameters": {"full_attention": AXES}},
    "cosmos3_edge": MROPE,
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_ocr2": {
        "text_config": {"num_experts_per_tok": 2, **DENSE_AND_SPARSE},
        "vision_config": {"sam_config": SAM},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_vl_hybrid": {"high_res_vision_config": SAM},
    "dory": {
        "n_input_layers": 1,
        "n_recurrent_layers": 1,
        "n_output_layers": 1,
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    },
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note": {
        "text_config": {"per_layer_config": ..., "num_key_value_heads": 4},
        "vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 32, "per_layer_config": {}, **DENSE_AND_SPARSE},
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "emu3": {
        "vocabulary_map": NAMED | {f"<|visual token {place:06}|>": 60 + place for place in range(8)},
        "vq_config": VQ
        | {"codebook_size": 8, "latent_channels": 8, "channel_multiplier": [1, 1, 1], "temporal_downsample_factor": 1}
        | {"attn_resolutions": [], "num_attention_heads": 1},
    },
    "ernie4_5_vl_moe": {
        "text_config": {"rope_parameters": AXES, "moe_intermediate_size": [16, 16], "moe_k": 2, **DENSE_AND_SPARSE}
    },
    "gemma3n": {"text_config": GEMMA3N},
    "gemma3n_text": GEMMA3N,
    "gemma4_unified_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 2}},
    "glm4v_moe": {"text_config": {"head_dim": 8, "rope_parameters": AXES | {"partial_rotary_factor": 1.0}}},
    "glm5_next": {"qk_rope_head_dim": 0, "text_config": {"qk_rope_head_dim": 0}},
    "gpt_neo": {"attention_layers": ["global", "global"], "attention_types": [[["global"], 2]]},
    "granite4_vision": {
        **GRID,
        "downsample_rate": "1/2",
        "deepstack_layer_map": [[-1, 0]],
        "spatial_target_layers": [1],
        "vision_config": {"hidden_size": 64, "image_size": 16, "patch_size": 4},
        "qformer_config": QFORMER,
    },
    "granite_docling": {"vision_config": {"scale_factor": 2, "deepstack_visual_indexes": [0]}},
    "hunyuan_vl": {
        "text_config": {"head_dim": 8, "rope_parameters": ROPE | {"mrope_section": [1, 1, 1, 1]}},
        "vision_config": {"img_max_token_num": 16, "max_image_size": 16, "temporal_patch_size": 1},
    },
    "hy_v4_vl": MROPE,
    "hrm_text": {"num_hidden_layers": 1, "num_layers_per_stack": None},
    **dict.fromkeys(("inkling2", "inkling2_loop"), {"text_config": {"unpadded_vocab_size": 96}}),
    **dict.fromkeys(("inkling2_text", "inkling2_loop_text"), {"unpadded_vocab_size": 96}),
    "janus": {"vq_config": VQ | {"num_embeddings": 8, "latent_channels": 32, "num_patches": 4}},
    "laguna": {"num_attention_heads_per_layer": [4, 4]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    **dict.fromkeys(("lfm2", "lfm2_moe"), {"layer_types": ["conv", "full_attention"]}),
    "lfm2_vl": {"text_config": {"layer_types": ["conv", "full_attention"]}},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "llama4": {"vision_config": {"intermediate_size": 128}},
    **dict.fromkeys(("llava_next", "llava_next_video", "llava_onevision"), GRID),
    "mamba2": {"num_heads": 8, "n_groups": 1},
    "mistral4": {"rope_parameters": SCALED},
    "mistral_large4": {
        "text_config": {"kv_source_layers": [0, 1], "indexer_types": ["full", "full"], "num_key_value_heads": 4}
    },
    "molmo2": {
        "image_patch_id": 95,
        "text_config": {"additional_vocab_size": 4},
        "adapter_config": {"vision_feature_layer": [-1, -2], "num_key_value_heads": 4},
    },
    "muse_glimmer": {"out_hidden_size": 128},
    "muse_spark": {"audio_config": {"num_hidden_layers": 4, "hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]}},
    "nemotron": {"num_key_value_heads": 2},
    "phi4_multimodal": {
        "vision_config": {"feature_layer": -2, "num_hidden_layers": 3, "image_token_id": 95},
        "audio_config": {"audio_token_id": 92},
    },
    "qwen4_exp": {"text_config": INDEXER},
    "qwen4_exp_text": INDEXER,
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local", "lsh"]},
    "step3p7": {"text_config": {"sliding_window": 8, "num_sliding_attention_heads": 4}},
    "vipllava": {"vision_feature_layers": [-1, -2]},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}
# Rows that a picture becomes, where the model doesn't tell.
NUM_ROWS = {"git": 0, "blip": 0, "fuyu": 4, "phi4_multimodal": 13, "granite4_vision": 14, "instructblipvideo": 16}
# How pictures are passed, where their names don't tell: the input that does, the shape of a patch, frames, masks.
KINDS = {"llava": "pixel_values"}
PATCHES = {"kimi_k25": (3, 4, 4), "paddleocr_vl": (3, 4, 4), "cosmos3_edge": (48,)}
FRAMES = {"instructblipvideo": (4,)}
ONES = {"granite_docling": {"pixel_attention_mask": (1,)}}
# What stands for a video in a prompt: 91 and 90 around what is seen, 93 for a row of a video, 95 for one of a picture.
BY_FRAME = [70, 91, *[93] * 4, 90, 71, 91, *[93] * 4, 90]
FRAME_PICTURES = [91, 70, *[95] * 4, 71, 70, *[95] * 4, 71, 90]
VIDEOS: dict[str, list[int]] = {
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen2_5_omni_thinker"), [91, *[93] * 8, 90]),
    **dict.fromkeys(("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "cosmos3_omni"), BY_FRAME),
    **dict.fromkeys(("glm4v", "glm4v_moe", "glm46v", "glm_ocr"), FRAME_PICTURES),
    "llava_next_video": [93] * 8,
    "llava_onevision": [93] * 9,
    "video_llava": [93] * 136,
}
NUM_FRAMES = {"video_llava": 8}
