"""Small configurations of transformers, made by the names of their fields, for benchmarks/coverage.py."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from stated_fields import STATED

REDUCED = {
    32: "hidden_size d_model n_embd embed_dim dim embedding_size hidden_dim projection_dim encoder_hidden_size "
    "out_hidden_size decoder_hidden_size n_embed model_dim emb_dim word_embed_proj_dim conv_dim_out image_size "
    "backbone_hidden_size hidden_size_global upsample_groups d_latents audio_hidden_size "
    "projection_hidden_size projector_hidden_size mamba_d_ssm reassemble_hidden_size output_channels crop_size",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads attention_heads "
    "mm_tokens_per_image "
    "num_decoder_attention_heads num_local_experts num_experts n_routed_experts moe_num_experts mamba_n_heads "
    "zero_expert_num",
    2: "num_key_value_heads num_kv_heads n_head_kv num_hidden_layers n_layer n_layers num_layers encoder_layers "
    "decoder_layers num_decoder_layers num_encoder_layers depth num_experts_per_tok top_k_experts moe_k n_group "
    "num_expert_group num_experts_per_token moe_topk",
    8: "head_dim kv_channels d_kv attention_head_size patch_size qk_rope_head_dim qk_nope_head_dim v_head_dim "
    "rotary_dim channel_shrink_ratio block_size global_block_size attention_window num_global_tokens "
    "hidden_size_per_layer_input num_latents",
    7: "local_radius",
    16: "kv_lora_rank q_lora_rank mamba_d_head num_pos_feats",
    64: "intermediate_size encoder_ffn_dim decoder_ffn_dim ffn_dim d_ff n_inner mlp_dim moe_intermediate_size "
    "shared_expert_intermediate_size ffn_hidden_size expert_ffn_hidden_size",
    128: "max_position_embeddings n_positions position_embedding_size",
    120: "vocab_size entity_vocab_size vocab_size_per_layer_input text_vocab_size encoder_hash_byte_group_vocab",
    1: "topk_group",
}
SIZES = {name: size for size, names in REDUCED.items() for name in names.split()}
# Sizes that checkpoints state where the class has none.
UNSTATED = {name: SIZES[name] for name in ("num_experts_per_tok", "num_key_value_heads", "vocab_size", "head_dim")} | {
    "n_routed_experts": 4, "n_shared_experts": 1, "prediction_length": 8, "indexer_n_heads": 2, "indexer_kv_heads": 1,
    "indexer_head_dim": 8, "indexer_budget": 8, "indexer_compress_ratio": 4,
}  # fmt: skip
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
DEPTHS = ("depths", "num_layers", "layers", "block_sizes", "n_attn_blocks")
WIDTHS = ("hidden_sizes", "embed_dims", "encoder_hidden_sizes", "widths", "embed_dim_per_stage")
HEADS = ("num_attention_heads", "num_heads", "attention_heads", "num_attention_heads_per_stage")
KINDS = ("layer_types", "layers_block_type", "block_types")  # a kind for each layer
TIED = ("stage_out_channels", "stem_out_channels", "num_groups")  # fields that widths of stages must fit
STAGED_SIDE = 64  # pixels of an image for a model whose stages halve it
TOWERS = ("vision_config", "audio_config")
HALVES = 4  # rotary frequencies of a head that are divided among time, height and width
GROWING = [16, 32, 64, 128]  # widths of stages that pool where the width grows
# What a backbone hands out.
KEPT = ("out_features", "out_indices", "reshape_hidden_states", "apply_layernorm", "return_class_token")
TILE = 56  # pixels of a tile of Depth Pro: a quarter of a side of the images, 224, if a config has no size


def small_fields(config_class: Any, own: Any = None) -> dict[str, Any]:
    """Return the fields of a configuration that make it small; parts are reduced likewise.

    Args:
        config_class: a configuration class of transformers.
        own: the configuration of a part as the whole has it; by default that of the class.
    """
    default = _default(config_class) if own is None else own
    values = default.to_dict()
    fields = {name: value for name, value in map(_reduced, values.items()) if value is not None}
    _fit_layers(default, values, fields)
    _fit_images(values, fields)
    _fit_positions(default, values, fields)
    if "kv_lora_rank" in fields:  # latent attention has as many heads of keys and values as of queries
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    if any(name in values for name in TIED):
        fields = {name: value for name, value in fields.items() if name not in (*WIDTHS, "embedding_size")}
    fields |= {name: size for name, size in UNSTATED.items() if values.get(name, 0) is None}
    if "max_2d_position_embeddings" in values:  # six coordinates of a box share the width
        boxes = {"hidden_size": 48, "coordinate_size": 8, "shape_size": 8}
        fields |= {name: size for name, size in boxes.items() if name in values}
    if "expand" in values and "num_heads" in fields:  # Mamba-2, whose heads divide the expanded width
        fields["head_dim"] = values["expand"] * fields["hidden_size"] // fields["num_heads"]
        fields["n_groups"] = 2
    if "conv_L_cache" in values and values.get("layer_types", 0) is None:  # LFM2-MoE: checkpoints list them
        fields["layer_types"] = ["conv", "full_attention"]
    for name in ("image_token_index", "video_token_index"):
        if name in values and values[name] is None:  # BLIP-2 and its successors: checkpoints have one
            fields[name] = 3
    if "image_grid_pinpoints" in values:
        fields["image_grid_pinpoints"] = [[32, 64], [64, 32], [64, 64]]  # one or two tiles on each side
    if isinstance(values.get("vision_feature_layer"), list):
        fields["vision_feature_layer"] = [-2, -1]
    if values.get("deepstack_visual_indexes"):
        fields["deepstack_visual_indexes"] = [0, 1]
    if "attention_types" in values:  # GPT-Neo's kinds of layers, with the number of their repetitions
        fields["attention_types"] = [[["global", "local"], 1]]
    if {"subsampling_factor", "upsampling_factor", "subsample_layers"} & set(
        values
    ) and "num_key_value_heads" in fields:
        fields["num_key_value_heads"] = fields[
            "num_attention_heads"
        ]  # encoders of sound of Nemotron 3 and Granite share none
    heads = (values.get("qk_nope_head_dim"), values.get("qk_rope_head_dim"))
    if None not in heads and values.get("head_dim") == sum(heads):  # Mistral 4, whose rotary share is one of the whole
        fields["head_dim"] = fields["qk_nope_head_dim"] + fields["qk_rope_head_dim"]
    _fit_convolutions(values, fields)
    _fit_classes(default, values, fields)
    _fit_tokens(config_class, fields)
    for name in getattr(config_class, "sub_configs", None) or {}:
        part = getattr(default, name, None)
        spec = getattr(config_class, "sub_configs_defaults", {}).get(name)
        if part is None and name in TOWERS and spec is not None and spec.optional:  # as those of Gemma 4
            part = spec.default_config
        if getattr(part, "model_type", None) == "timm_backbone":
            fields[name] = part.to_dict() | {"use_pretrained_backbone": False}
        elif hasattr(type(part), "model_type"):
            fields[name] = {"model_type": part.model_type} | small_fields(type(part), part)
            if name == "decoder" and "EncoderDecoder" in config_class.__name__:  # joined from two models
                fields[name] |= {"is_decoder": True, "add_cross_attention": True}
    _fit_parts(values, fields)
    return fields | {name: _stated(value, fields.get(name)) for name, value in _stated_of(config_class)}


def _stated_of(config_class: Any) -> Iterable[tuple[str, Any]]:
    return STATED.get(config_class.__name__, {}).items()


def _stated(value: Any, reduced: Any) -> Any:
    """Return a stated field; one of a part without its type adds to the reduced fields of the part."""
    adds = isinstance(value, dict) and isinstance(reduced, dict) and "model_type" in reduced
    return reduced | value if adds and "model_type" not in value else value


def _default(config_class: Any) -> Any:
    """Return the configuration that a class has by default, with what checkpoints state if it has none without."""
    try:
        return config_class()
    except Exception:  # its own checks refuse its defaults
        return config_class(**STATED.get(config_class.__name__, {}))


def _fit_tokens(config_class: Any, fields: dict[str, Any]) -> None:
    """State the tokens that checkpoints state and the class of the configuration does not declare."""
    if config_class.__name__.startswith("ShieldGemma"):
        fields |= {"yes_token_index": 4, "no_token_index": 5}
    if config_class.__name__ == "Qwen3OmniMoeThinkerConfig":
        tokens = ("image_token_id", "vision_start_token_id", "audio_token_id", "video_token_id", "audio_start_token_id")
        fields |= {name: 3 + number for number, name in enumerate(tokens)} | {"user_token_id": 9}
    if config_class.__name__ == "Qwen2_5OmniThinkerConfig":
        fields["vision_start_token_id"] = 4
        fields["image_token_index"], fields["audio_token_index"], fields["video_token_index"] = 3, 5, 6
        fields["audio_start_token_id"], fields["audio_end_token_id"], fields["user_token_id"] = 7, 8, 9


def _fit_convolutions(values: Mapping[str, Any], fields: dict[str, Any]) -> None:
    """Keep widths that convolutions share, as their fields state them twice."""
    if "width_coefficient" in values and "hidden_dim" in values:  # EfficientNet: that of its smallest checkpoint
        fields |= {"width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280}
    if "embed_dim_per_stage" in fields:  # the Hiera of SAM 2, whose first stage has the width of the patches
        fields |= {"hidden_size": GROWING[0], "embed_dim_per_stage": GROWING, "image_size": [256, 256]}
        fields |= {"blocks_per_stage": [1, 1, 2, 1], "global_attention_blocks": [3]}
    if "backbone_channel_list" in values:  # its widths from the last stage to the first
        fields["backbone_channel_list"] = GROWING[::-1]
    if "scaled_images_ratios" in values:  # Depth Pro
        fields |= {"patch_size": TILE, "merge_padding_value": 1, "fusion_hidden_size": 32}
        fields["intermediate_hook_ids"] = [0] * len(values["intermediate_hook_ids"])
        for name in ("intermediate_feature_dims", "scaled_images_feature_dims"):
            fields[name] = [32] * len(values[name])
    if "fpn_hidden_size" in values:  # SAM 2 and its successors, whose masks have the width of its pyramid
        fields["fpn_hidden_size"] = 32
    if "iou_head_hidden_dim" in values:
        fields["iou_head_hidden_dim"] = 32
    if "resnet_configs" in values or "block_configs" in values:  # lists of blocks, with which their numbers must agree
        fields.pop("depths", None)
    if "layer_list_out_channels" in values:  # PP-OCRv6
        fields["layer_list_out_channels"] = GROWING
    if "projector_input_dim" in values:  # Llama 4: pixels are shuffled before a projection
        fields["intermediate_size"] = round(fields["hidden_size"] / values["pixel_shuffle_ratio"] ** 2)
        fields |= {"projector_input_dim": 32, "projector_output_dim": 32, "vision_output_dim": 32}
    if "merge_index" in values:  # SegGPT joins an image and its prompt
        fields |= {"image_size": [64, 32], "pretrain_image_size": 32, "patch_size": 8, "decoder_hidden_size": 16}
        fields |= {"merge_index": 0, "intermediate_hidden_state_indices": [1]}
    if values.get("context_length"):
        fields["context_length"] = min(values["context_length"], 512)  # TimesFM 2.5 has 16,384
    if "bbox_scale" in values:  # BROS divides its width among the sines of eight coordinates
        fields["hidden_size"] = 64
    if "patch_embeds_hidden_size" in values:  # CLAP
        fields["hidden_size"] = values["patch_embeds_hidden_size"] * 2 ** (len(values["depths"]) - 1)
    if "mit_hidden_size" in values:  # X-CLIP
        fields |= {"mit_hidden_size": 32, "mit_intermediate_size": 64, "mit_num_attention_heads": 4}
    if "post_process_channels" in values:  # CHMv2
        fields |= {"post_process_channels": GROWING, "fusion_hidden_size": 32, "head_hidden_size": 32}


def _fit_classes(default: Any, values: Mapping[str, Any], fields: dict[str, Any]) -> None:
    """State what checkpoints state for each class of objects."""
    if "class_thresholds" in values and values["class_thresholds"] is None:  # PP-DocLayoutV2
        fields["class_thresholds"] = [0.5] * default.num_labels
        fields["class_order"] = list(range(default.num_labels))


def _fit_parts(values: Mapping[str, Any], fields: dict[str, Any]) -> None:
    """Keep sizes the same, or the same multiple, where one part hands them on to another."""
    for name, part in fields.items():
        if name.endswith("_model_config") and "scaled_images_ratios" in values:
            part["image_size"] = fields["patch_size"]
    backbone = fields.get("backbone_config", {})
    if values.get("backbone_feature_sizes") and "image_size" in backbone:  # SAM 2, and SAM 3, which scales its patches
        side = backbone["image_size"]
        side = side[0] // 4 if isinstance(side, list) else 4 * side // backbone["patch_size"]
        fields["backbone_feature_sizes"] = [[side // 2**level] * 2 for level in range(3)]
    if "prompt_encoder_config" in fields and "backbone_feature_sizes" in fields.get("vision_config", {}):  # SAM 2
        side = fields["vision_config"]["backbone_feature_sizes"][-1][0]
        fields["prompt_encoder_config"] |= {"patch_size": 8, "image_size": 8 * side}
    if "num_queries" in values and (values.get("two_stage") or backbone.get("image_size")):
        fields["num_queries"] = 8  # of as few tokens of an image
        if "text_config" in values and "image_size" in backbone:  # Grounding DINO normalises over the last stage
            backbone["image_size"] = 2 * STAGED_SIDE
    backbone_values = values.get("backbone_config") or {}
    blocks = "block_configs" in backbone_values and isinstance(backbone_values.get("stem_channels"), list)
    detects = blocks and bool({"layer_list_out_channels", "intraclass_block_config"} & set(values))
    if "bridge_connector" in values or detects:  # UVDoc and PP-OCRv6 join all stages
        names = values["backbone_config"]["stage_names"][1:]
        backbone |= {"out_features": names, "out_indices": list(range(1, len(names) + 1))}
        if detects:  # each stage of its detectors halves the image, of the default not
            widths = zip([GROWING[0], *GROWING], GROWING, strict=False)
            backbone["block_configs"] = [[[3, *each, 1 + bool(stage), not stage]] for stage, each in enumerate(widths)]
            backbone["stem_channels"] = [3, GROWING[0], GROWING[0]]
    vision, text = (fields.get(name, {}) for name in ("vision_config", "text_config"))
    wide = [(values.get(name) or {}).get("hidden_size") for name in ("vision_config", "text_config")]
    if None in wide or "hidden_size" not in vision or "hidden_size" not in text:
        return
    if values["vision_config"].get("out_hidden_size") == wide[1]:
        vision["out_hidden_size"] = text["hidden_size"]
    if values.get("out_hidden_size", 1) % wide[0] == 0:
        fields["out_hidden_size"] = values["out_hidden_size"] // wide[0] * vision["hidden_size"]


def _reduced(item: tuple[str, Any]) -> tuple[str, Any]:
    """Return a field with its smaller value; None for one that stays."""
    name, value = item
    if isinstance(value, bool):
        return name, None
    if isinstance(value, int):
        if name in SIZES:
            return name, min(value, SIZES[name])
        beyond = name.endswith(("_token_id", "_token_index")) and value >= SIZES["vocab_size"]
        return name, 3 if beyond else None
    if not (isinstance(value, list | tuple) and value and all(isinstance(each, int) for each in value)):
        return name, None
    if name in DEPTHS:
        return name, [min(each, 2) for each in value]
    if name in WIDTHS:
        return name, [16 * min(2**stage, 4) for stage in range(len(value))]
    if name in HEADS:
        return name, [min(2**stage, 4) for stage in range(len(value))]
    return name, None


def _fit_layers(default: Any, values: Mapping[str, Any], fields: dict[str, Any]) -> None:
    """Keep as many layers as every kind of layer needs, and those that a backbone hands out."""
    name = next((name for name in LAYERS if isinstance(fields.get(name), int)), None)
    if name is None:
        return
    kinds = next((list(kinds) for each in KINDS if isinstance(kinds := getattr(default, each, None), list | tuple)), [])
    fields[name] = max([fields[name], *(kinds.index(kind) + 1 for kind in kinds)])
    fields |= {each: values[each] for each in KEPT if values.get(each) is not None}
    for each, listed in values.items():  # such as layers_block_type, where the class has a list of its own
        if isinstance(listed, list) and len(listed) == values[name] and all(isinstance(kind, str) for kind in listed):
            fields[each] = listed[: fields[name]]
    stages = values.get("out_indices")
    if isinstance(stages, Sequence) and max(stages) > fields[name]:
        fields.pop("out_features", None)
        fields[name] = max(fields[name], len(stages))
        fields["out_indices"] = list(range(fields[name] - len(stages) + 1, fields[name] + 1))


def _fit_images(values: Mapping[str, Any], fields: dict[str, Any]) -> None:
    """Give a model whose stages halve an image one that is large enough, and heads that divide its width."""
    stages = next((values[name] for name in (*DEPTHS, *WIDTHS) if isinstance(values.get(name), list | tuple)), None)
    if stages is None:
        return
    if isinstance(values.get("window_size"), int):
        fields["window_size"] = 2  # divides the sides of every stage
    if isinstance(fields.get("image_size"), int):
        fields["image_size"] = min(values["image_size"], STAGED_SIDE)
        fields.pop("patch_size", None)
    fields |= {each: values[each] for each in KEPT if values.get(each) is not None}


def _fit_positions(default: Any, values: Mapping[str, Any], fields: dict[str, Any]) -> None:
    """Divide the rotary frequencies of a head among time, height and width as the configuration does."""
    rope = values.get("rope_parameters") or {}
    divided = "mrope_section" in getattr(type(default), "ignore_keys_at_rope_validation", ())
    if not divided and not isinstance(rope.get("mrope_section"), list):
        return
    share = rope.get("partial_rotary_factor") or getattr(default, "partial_rotary_factor", None) or 1.0
    width = round(2 * HALVES / share)
    if "head_dim" in fields:
        fields["head_dim"] = width
    elif isinstance(fields.get("num_attention_heads"), int):
        fields["hidden_size"] = width * fields["num_attention_heads"]
    fields["rope_parameters"] = rope | {"mrope_section": [HALVES - 2, 1, 1]}
