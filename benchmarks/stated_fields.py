"""Fields of configurations that checkpoints state and classes do not, or that must fit each other.

They are those that no rule of benchmarks/small_configs.py finds by the names of fields, for each configuration class.
A part without its type adds to the fields of the part.
"""

from __future__ import annotations

from typing import Any

SHARING = {  # of Gemma 3n and Gemma 4: a layer of each type keeps keys and values, and another one reads them
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
INKLING = {
    "unpadded_vocab_size": 120, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8,
    "sliding_window_size": 8, "rel_extent": 16,
}  # fmt: skip
CODEC = {"num_filters": 8, "depths": [1, 1, 1], "downsampling_ratios": [2, 4], "hidden_size": 32}
FLOW = {"flow_head_config": {"hidden_size": 32, "num_hidden_layers": 2, "condition_dim": 32}, "num_key_value_heads": 4}
TOWER = {  # of Perception Encoder, by timm
    "model_type": "timm_wrapper", "architecture": "vit_pe_core_large_patch14_336", "do_pooling": True,
    "num_classes": 32, "global_pool": "map",
    "model_args": {"embed_dim": 64, "img_size": [56, 56], "depth": 2, "num_heads": 4, "ref_feat_shape": [4, 4]},
}  # fmt: skip
STRIPES = {  # kernel, stride and padding of the convolutions of PP-OCR, as its checkpoints have them
    "reduce_channel": [1, 1, 0],
    "return_channel": [1, 1, 0],
} | {
    f"{name}_{ratio}ratio": [kernel(size), [1, 1], padding(size // 2)]
    for ratio, size in (("long", 7), ("mid", 5), ("short", 3))
    for name, kernel, padding in (
        ("vertical_long_to_small_conv", lambda size: [size, 1], lambda half: [half, 0]),
        ("horizontal_small_to_long_conv", lambda size: [1, size], lambda half: [0, half]),
        ("symmetric_conv_long", lambda size: [size, size], lambda half: [half, half]),
    )
}
STATED: dict[str, dict[str, Any]] = {
    "Xcodec2Config": {"quantization_dim": 64, "num_key_value_heads": 4},  # the widths of its two encoders together
    "NeuCodecConfig": {"quantization_dim": 64, "num_key_value_heads": 4},
    "OneFormerConfig": {"conv_dim": 32, "mask_dim": 32, "hidden_dim": 32},  # checkpoints have one width
    "Apertus1p5Config": {"image_token_offset": 20, "audio_token_offset": 60},
    "Apertus1p5VisionTokenizerConfig": {
        "codebook_size": 40, "resolution": 32, "base_channels": 32, "channel_multiplier": [1, 2], "num_res_blocks": 1,
    },
    "AlignConfig": {"projection_dim": 160},  # the width of its images, which are not projected
    "AlignVisionConfig": {
        "width_coefficient": 0.5, "depth_coefficient": 0.5, "hidden_dim": 640, "image_size": 64,
    },
    "BridgeTowerConfig": {"hidden_size": 64, "num_hidden_layers": 2},
    "BridgeTowerTextConfig": {"hidden_size": 64},
    "BridgeTowerVisionConfig": {"hidden_size": 64},
    "ChameleonConfig": {
        "vocabulary_map": {"<image>": 3} | {f"IMGIMG{letter}Z": 10 + each for each, letter in enumerate("ABCDEFGH")},
    },
    "ChameleonVQVAEConfig": {
        "resolution": 32, "num_embeddings": 8, "base_channels": 32, "latent_channels": 16, "channel_multiplier": [1, 2],
        "num_res_blocks": 1, "embed_dim": 16,
    },
    "CohereCompassTextConfig": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
        },
    },
    "DbrxAttentionConfig": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
    "DeepseekOcr2SamVisionConfig": {
        "image_size": 256, "window_size": 4, "downsample_channels": [32, 32], "hidden_size": 32,
    },
    "Ernie4_5_VLMoeTextConfig": {
        "moe_intermediate_size": [64, 32], "hidden_size": 32,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0, "mrope_section": [1, 1, 2]},
    },
    "EsmcConfig": {"num_key_value_heads": 4},
    "FastVlmConfig": {
        "vision_config": {
            "model_type": "timm_wrapper", "architecture": "fastvit_mci0", "do_pooling": True, "global_pool": "avg",
            "hidden_size": 1024, "model_args": {"inference_mode": True},
        },
    },
    "FunAsrNanoAdaptorConfig": {"intermediate_size": 8},
    "Gemma3nAudioConfig": {
        "vocab_offset": 110, "conf_num_hidden_layers": 1, "conf_num_attention_heads": 4, "vocab_size": 10,
    },
    "Gemma3nTextConfig": SHARING
    | {"intermediate_size": [64] * 4, "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0], "laurel_rank": 8},
    "Gemma3nVisionConfig": {
        "hidden_size": 2048, "vocab_size": 10, "vocab_offset": 100,
        "model_args": {"channel_multiplier": 0.1, "pretrained_cfg_overlay": {"input_size": [3, 256, 256]}},
    },
    "Gemma4TextConfig": SHARING | {"global_head_dim": 16},
    "Gemma4AssistantConfig": {
        "text_config": {
            "model_type": "gemma4_text", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 16, "vocab_size": 120,
            "vocab_size_per_layer_input": 0, "hidden_size_per_layer_input": 0,
        },
    },
    "MoonshineStreamingConfig": {"num_key_value_heads": 4},  # its class views queries by them
    "NemotronH_Omni_Reasoning_V3_Config": {
        "image_token_id": 3, "video_token_id": 4, "audio_token_id": 5, "vision_hidden_size": 32,
        "vision_config": {"video_temporal_patch_size": 2},
        "audio_config": {"projection_hidden_size": 32, "projection_bias": False},
    },
    "NeoMMEConfig": {"head_dim": 16},
    "AutoformerConfig": {"num_time_features": 2, "label_length": 4},
    "InformerConfig": {"num_time_features": 2, "context_length": 32},  # of less, no queries are drawn
    "TimeSeriesTransformerConfig": {"num_time_features": 2},
    "PerceiverConfig": {"num_self_attends_per_block": 2},
    "PerceptionLMConfig": {
        "vision_config": {
            "model_type": "timm_wrapper", "architecture": "vit_pe_core_large_patch14_336", "do_pooling": True,
            "model_args": {
                "embed_dim": 64, "img_size": [56, 56], "depth": 2, "global_pool": "", "init_values": 0.1,
                "use_post_transformer_norm": False, "ref_feat_shape": [4, 4],
            },
        },
    },
    "Qwen2_5OmniConfig": {"enable_audio_output": False},
    "Qwen3OmniMoeConfig": {"enable_audio_output": False},
    "ReformerConfig": {
        "axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 16], "attn_layers": ["local", "lsh"], "num_buckets": 4,
        "feed_forward_size": 64,
    },
    "ZambaConfig": {
        "num_hidden_layers": 5, "layers_block_type": ["linear_attention"] + ["linear_attention", "hybrid"] * 2,
    },
    "DeepseekOcr2TextConfig": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2, "n_shared_experts": 1},
    "DiffusionGemmaTextConfig": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
    "Dots3NoteAudioConfig": {"adapter_input_size": 32, "adapter_out_dim": 32, "downsample_hidden_size": 16},
    "Dots3NoteVisionConfig": {
        "adapter_in_dim": 32, "adapter_out_dim": 32, "mlp_layer_types": ["dense", "sparse"],
        "pyramid_num_routed": [-1, 4],
    },
    "DPTConfig": {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [16] * 4},
    "EfficientLoFTRConfig": {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 8},
    "Emu3Config": {
        "vocabulary_map": {"<|extra_200|>": 5, "<image>": 3}
        | {f"<|visual token {each:06d}|>": 10 + each for each in range(8)},
    },
    "Emu3VQVAEConfig": {"codebook_size": 8, "base_channels": 32, "channel_multiplier": [1, 2], "num_res_blocks": 1},
    "Granite4VisionConfig": {
        "downsample_rate": "1/2", "deepstack_layer_map": [[-2, 0], [-1, 1]], "spatial_target_layers": [0, 1, 0, 1],
        "image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]], "image_token_index": 3,
        "vision_config": {
            "model_type": "clip_vision_model", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "image_size": 32, "patch_size": 8,
        },
    },
    "IdeficsConfig": {"alpha_initializer": "ones"},  # of gates, which are 0 without training, so that no image is read
    "InstructBlipVideoConfig": {"num_query_tokens": 8},  # for each of four frames; a text has 128 places
    "JanusVQVAEConfig": {
        "base_channels": 32, "channel_multiplier": [1, 1], "num_embeddings": 64, "latent_channels": 32,
        "num_patches": 4, "num_res_blocks": 1, "image_token_embed_dim": 32, "projection_dim": 32,
    },
    "JanusVisionConfig": {"num_image_tokens": 16},
    "LwDetrConfig": {"projector_scale_factors": [1.0]},
    "LwDetrViTConfig": {"image_size": 64, "pretrain_image_size": 64, "patch_size": 4},
    "MuseSparkAudioConfig": {"num_hidden_layers": 4},
    "PaddleOCRTextConfig": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0, "mrope_section": [1, 1, 2]},
    },
    "DiaDecoderConfig": {
        "cross_hidden_size": 32, "cross_num_attention_heads": 4, "cross_num_key_value_heads": 4, "cross_head_dim": 8,
    },
    "EdgeTamConfig": {"prompt_encoder_config": {"patch_size": 16, "image_size": 256}},  # of a stride of 16 in all
    "EdgeTamVisionConfig": {
        "backbone_config": {
            "model_type": "timm_wrapper", "architecture": "repvit_m1", "num_classes": 2,
            "model_args": {"in_chans": 3, "features_only": True, "out_indices": [0, 1, 2, 3]},
        },
        "backbone_channel_list": [384, 192, 96, 48], "fpn_hidden_size": 32,
        "backbone_feature_sizes": [[64, 64], [32, 32], [16, 16]],
    },
    "GradiumPhononTTSConfig": FLOW,
    "Inkling2LoopTextConfig": INKLING
    | {"num_hidden_layers": 6, "n_layers_per_attn_res_block": 2}
    | {"loop_layer_index_start": 2, "loop_layer_index_end": 4},
    "Inkling2TextConfig": INKLING,
    "Inkling2VisionConfig": {"text_hidden_size": 32, "projection_hidden_dim": 64},
    "Sapiens2Config": {"head_config": {  # of segmentation; the default has none
        "upsample_out_channels": [16, 16], "upsample_kernel_sizes": [4, 4],
        "conv_out_channels": [16], "conv_kernel_sizes": [1],
    }},
    "PeVideoEncoderConfig": {"vision_config": TOWER, "num_key_value_heads": 4},
    "PocketTTSConfig": FLOW,
    "PPFormulaNetVisionConfig": {
        "post_conv_in_channels": 32, "post_conv_mid_channels": 64, "post_conv_out_channels": 64,
    },
    "PPOCRV5ServerDetConfig": {
        "intraclass_block_config": STRIPES, "scale_factor_list": [1, 2, 4, 8], "kernel_list": [3, 2, 2],
    },
    "PPOCRV6MediumDetConfig": {
        "intraclass_block_config": STRIPES, "scale_factor_list": [1, 2, 4, 8], "kernel_list": [3, 2, 2],
    },
    "Step3p7TextConfig": {"sliding_window": 8},
    "VibeVoiceAcousticTokenizerConfig": CODEC,
    "VibeVoiceAcousticTokenizerDecoderConfig": CODEC,
    "VibeVoiceAcousticTokenizerEncoderConfig": CODEC,
    "VibeVoiceDiffusionHeadConfig": {"latent_size": 32},
    "T5Gemma2EncoderConfig": {"text_config": {"dropout_rate": 0.0}},
    "TvpConfig": {"num_frames": 2, "max_img_size": 64, "visual_prompt_size": 8},
    "WavTokenizerConfig": {"codebook_dim": 32, "codebook_size": 40},
    "WavTokenizerEncoderConfig": {"codebook_dim": 32, "codebook_size": 40},
}  # fmt: skip
