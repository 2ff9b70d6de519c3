"""Small models of many families with random weights, and the number of residual branches of each module class.

The counts are independent of `find_sites`: `branches` maps the name of a module class to the number of branches that
each instance adds to a trunk, counted by hand in its `forward`. `attention` counts the attention branches among them.
`repeats` is the number of times each module runs. `fewer` and `fewer_attention` are the numbers of counted branches
that are no residual branches in the graph, and `why` is the reason. `why` also explains counts that are not obvious.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from compressor import models


@dataclass(frozen=True)
class Architecture:
    name: str
    build: Callable[[], tuple[torch.nn.Module, dict[str, torch.Tensor]]]
    branches: dict[str, int]
    attention: dict[str, int] = field(default_factory=dict)
    repeats: int = 1
    fewer: int = 0
    fewer_attention: int = 0
    why: str = ""

    def load(self) -> models.Model:
        torch.manual_seed(0)
        module, inputs = self.build()
        return models.load(module, example_inputs=inputs)


def expected_count(module: torch.nn.Module, per_class: dict[str, int]) -> int:
    """Return the sum of `per_class` over all modules of the tree, by class name."""
    return sum(per_class.get(type(part).__name__, 0) for part in module.modules())


def pixels(size: int) -> torch.Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def tokens(vocabulary: int = 50, length: int = 7) -> dict[str, torch.Tensor]:
    """Return token ids with padding in the second row, so that the mask is not constant."""
    ids = torch.randint(3, vocabulary, (2, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, length - 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def timm_model(name: str, size: int = 32, **options: Any) -> Callable[[], tuple[Any, dict[str, torch.Tensor]]]:
    def build() -> tuple[Any, dict[str, torch.Tensor]]:
        import timm

        return timm.create_model(name, pretrained=False, num_classes=5, **options), {"x": pixels(size)}

    return build


def timm_class(
    module: str, name: str, size: int = 32, **options: Any
) -> Callable[[], tuple[Any, dict[str, torch.Tensor]]]:
    """Return a function that builds a timm class directly, for models whose factory fixes the sizes."""

    def build() -> tuple[Any, dict[str, torch.Tensor]]:
        import importlib

        model = getattr(importlib.import_module(f"timm.models.{module}"), name)(num_classes=5, **options)
        return model, {"x": pixels(size)}

    return build


def vit_with(block: str, **options: Any) -> Callable[[], tuple[Any, dict[str, torch.Tensor]]]:
    def build() -> tuple[Any, dict[str, torch.Tensor]]:
        from timm.models import vision_transformer

        model = vision_transformer.VisionTransformer(
            **VIT, num_classes=5, block_fn=getattr(vision_transformer, block), **options
        )
        return model, {"x": pixels(32)}

    return build


def small_mobilevit() -> tuple[Any, dict[str, torch.Tensor]]:
    import dataclasses

    from timm.models import byobnet, mobilevit

    full = mobilevit.model_cfgs["mobilevit_xxs"]
    bottleneck, transformer = full.blocks[0], full.blocks[2]
    transformer = tuple(
        dataclasses.replace(
            part,
            **(
                {"c": 16}
                if part.type == "bottle"
                else {
                    "c": 16,
                    "block_kwargs": {"transformer_dim": 16, "transformer_depth": 1, "patch_size": 2, "num_heads": 2},
                }
            ),
        )
        for part in transformer
    )
    config = dataclasses.replace(full, blocks=(dataclasses.replace(bottleneck, c=16), transformer), num_features=16)
    return byobnet.ByobNet(config, num_classes=5), {"x": pixels(64)}


def small_mvit() -> tuple[Any, dict[str, torch.Tensor]]:
    from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg

    config = MultiScaleVitCfg(embed_dim=8, depths=(1, 2), num_heads=1)
    return MultiScaleVit(config, img_size=64, num_classes=5), {"x": pixels(64)}


def small_metaformer(*mixers: str) -> Callable[[], tuple[Any, dict[str, torch.Tensor]]]:
    def build() -> tuple[Any, dict[str, torch.Tensor]]:
        from timm.models import metaformer

        classes = [getattr(metaformer, mixer) for mixer in mixers]
        norms = [
            metaformer.LayerNormNoBias if mixer == "Attention" else metaformer.LayerNorm2dNoBias for mixer in mixers
        ]
        model = metaformer.MetaFormer(
            depths=(1, 1), dims=(8, 32), token_mixers=classes, norm_layers=norms, num_classes=5
        )
        return model, {"x": pixels(32)}

    return build


def small_resmlp() -> tuple[Any, dict[str, torch.Tensor]]:
    from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock

    model = MlpMixer(
        num_classes=5, img_size=32, embed_dim=16, num_blocks=2, block_layer=ResBlock, norm_layer=Affine, mlp_ratio=4.0
    )
    return model, {"x": pixels(32)}


VIT = {"img_size": 32, "patch_size": 16, "embed_dim": 16, "depth": 2, "num_heads": 2}
BLOCK = {"Block": 2}

TIMM = (
    Architecture("vit", timm_model("vit_tiny_patch16_224", **VIT), BLOCK, {"Attention": 1}),
    Architecture("deit_distilled", timm_model("deit_tiny_distilled_patch16_224", **VIT), BLOCK, {"Attention": 1}),
    Architecture("deit3", timm_model("deit3_small_patch16_224", **VIT), BLOCK, {"Attention": 1}),
    Architecture("vit_registers", timm_model("vit_small_patch14_reg4_dinov2", **VIT), BLOCK, {"Attention": 1}),
    Architecture("vit_swiglu", timm_model("vit_giant_patch14_dinov2", **VIT, mlp_ratio=2), BLOCK, {"Attention": 1}),
    Architecture("beit", timm_model("beit_base_patch16_224", **VIT), BLOCK, {"Attention": 1}),
    Architecture("beitv2", timm_model("beitv2_base_patch16_224", **VIT), BLOCK, {"Attention": 1}),
    Architecture("eva02", timm_model("eva02_tiny_patch14_224", **VIT), {"EvaBlock": 2}, {"EvaAttention": 1}),
    Architecture("samvit", timm_model("samvit_base_patch16", **VIT), {"Block": 2}, {"Attention": 1}),
    Architecture(
        "mixer", timm_class("mlp_mixer", "MlpMixer", img_size=32, embed_dim=16, num_blocks=2), {"MixerBlock": 2}
    ),
    Architecture("resmlp", small_resmlp, {"ResBlock": 2}),
    Architecture(
        "cait",
        timm_model("cait_xxs24_224", **VIT, depth_token_only=1),
        {"LayerScaleBlock": 2, "LayerScaleBlockClassAttn": 2},
        {"TalkingHeadAttn": 1, "ClassAttn": 1},
    ),
    Architecture(
        "xcit",
        timm_model("xcit_nano_12_p16_224", img_size=32, embed_dim=16, depth=2, num_heads=2, cls_attn_layers=1),
        {"XCABlock": 3, "ClassAttentionBlock": 2},
        {"XCA": 1, "ClassAttn": 1},
    ),
    Architecture(
        "swin",
        timm_model(
            "swin_tiny_patch4_window7_224", 64, img_size=64, embed_dim=8, depths=(2, 2), num_heads=(1, 2), window_size=4
        ),
        {"SwinTransformerBlock": 2},
        {"WindowAttention": 1},
    ),
    Architecture(
        "swinv2",
        timm_model(
            "swinv2_tiny_window8_256", 64, img_size=64, embed_dim=8, depths=(2, 2), num_heads=(1, 2), window_size=4
        ),
        {"SwinTransformerV2Block": 2},
        {"WindowAttention": 1},
    ),
    Architecture(
        "mvitv2",
        small_mvit,
        {"MultiScaleBlock": 2},
        {"MultiScaleAttention": 1},
        why="between stages the shortcut is projected, so attention is no branch, but q + f(q) inside it is one",
    ),
    Architecture(
        "hiera",
        timm_model("hiera_tiny_224", 64, img_size=64, embed_dim=8, stages=(1, 2, 1, 1), num_heads=1),
        {"HieraBlock": 2},
        {"MaskUnitAttention": 1},
        fewer=3,
        fewer_attention=3,
        why="three blocks between stages project and pool the shortcut, which their attention does not read",
    ),
    Architecture(
        "davit",
        timm_model("davit_tiny", 64, depths=(1, 1), embed_dims=(8, 16), num_heads=(1, 2)),
        {"ConvPosEnc": 1, "WindowAttention": 1, "ChannelAttention": 1, "Mlp": 1},
        {"WindowAttention": 1, "ChannelAttention": 1},
    ),
    Architecture(
        "maxvit",
        timm_model(
            "maxvit_tiny_tf_224", 64, img_size=64, embed_dim=(32,), depths=(2,), block_type=("M",), stem_width=8
        ),
        {"MbConvBlock": 1, "PartitionAttentionCl": 2},
        {"AttentionCl": 1},
        fewer=1,
        why="the first MbConv of a stage pools its shortcut",
    ),
    Architecture(
        "levit",
        timm_model("levit_128s", 64, img_size=64, embed_dim=(8, 16), depth=(2, 1), num_heads=(1, 2), key_dim=8),
        {"LevitBlock": 2, "LevitDownsample": 1},
        {"Attention": 1},
        why="between stages, attention pools and has no shortcut; the MLP after it has one",
    ),
    Architecture(
        "convnext", timm_model("convnext_atto", 32, depths=(1, 2, 1, 1), dims=(8, 8, 16, 16)), {"ConvNeXtBlock": 1}, {}
    ),
    Architecture(
        "poolformer",
        small_metaformer("Pooling", "Pooling"),
        {"MetaFormerBlock": 2},
        {},
        why="pooling has no weights, but the norm before it has, so the site is of the kind other",
    ),
    Architecture(
        "vit_parallel_scaling",
        vit_with("ParallelScalingBlock"),
        {"ParallelScalingBlock": 2},
        {"ParallelScalingBlock": 1},
    ),
    Architecture(
        "vit_parallel_things",
        vit_with("ParallelThingsBlock"),
        {"ParallelThingsBlock": 4},
        {"ParallelThingsBlock": 2},
        why="one operator stacks and sums its two attentions, of which each is a branch; the same holds for the MLPs",
    ),
    Architecture(
        "vit_parallel_layerscale",
        vit_with("ParallelScalingBlock", init_values=1e-5),
        {"ParallelScalingBlock": 1},
        {"ParallelScalingBlock": 1},
        why="LayerScale multiplies the sum of attention and MLP, so the two are one branch",
    ),
    Architecture("vit_post_norm", vit_with("ResPostBlock"), {"ResPostBlock": 2}, {"Attention": 1}),
    Architecture(
        "pvt_v2",
        timm_class(
            "pvt_v2",
            "PyramidVisionTransformerV2",
            32,
            depths=(1, 1),
            embed_dims=(8, 16),
            num_heads=(1, 2),
            sr_ratios=(2, 1),
            mlp_ratios=(2, 2),
        ),
        {"Block": 2},
        {"Attention": 1},
    ),
    Architecture(
        "twins_svt",
        timm_model(
            "twins_svt_small",
            64,
            img_size=64,
            depths=(2, 2),
            embed_dims=(8, 16),
            num_heads=(1, 2),
            mlp_ratios=(2, 2),
            sr_ratios=(2, 1),
            wss=(4, 4),
        ),
        {"Block": 2, "PosConv": 1},
        {"LocallyGroupedAttn": 1, "GlobalSubSampleAttn": 1},
    ),
    Architecture(
        "coat_lite",
        timm_model(
            "coat_lite_tiny", 32, img_size=32, embed_dims=(16, 16, 16, 16), serial_depths=(1, 1, 1, 1), num_heads=8
        ),
        {"ConvPosEnc": 1, "SerialBlock": 2},
        {"FactorAttnConvRelPosEnc": 1},
    ),
    Architecture(
        "crossvit",
        timm_model("crossvit_9_240", 240, embed_dim=(8, 16), depth=((1, 1, 0),), num_heads=(2, 2)),
        {"Block": 2},
        {"Attention": 1},
        why="cross-attention adds to the class token alone but reads all tokens: the slice is no input of the branch",
    ),
    Architecture(
        "efficientformer",
        timm_model("efficientformer_l1", 224, depths=(1, 1, 1, 2), embed_dims=(8, 8, 16, 16), num_vit=1),
        {"MetaBlock2d": 2, "MetaBlock1d": 2},
        {"Attention": 1},
    ),
    Architecture(
        "efficientformerv2",
        timm_model("efficientformerv2_s0", 224, depths=(1, 1, 1, 1), embed_dims=(8, 8, 16, 16)),
        {"Attention2d": 1, "ConvMlpWithNorm": 1},
        {"Attention2d": 1},
    ),
    Architecture(
        "mobilevit",
        small_mobilevit,
        {"BottleneckBlock": 1, "Block": 2},
        {"Attention": 1},
        fewer=1,
        why="the strided bottleneck has no shortcut",
    ),
    Architecture(
        "edgenext",
        timm_model("edgenext_xx_small", 64, depths=(2, 2, 1, 1), dims=(8, 8, 16, 16)),
        {"ConvBlock": 1, "SplitTransposeBlock": 1},
        {"SplitTransposeBlock": 1},
        why="one shortcut spans convolutions, channel attention and MLP; the sum of the attention is inside",
    ),
    Architecture(
        "convit",
        timm_model("convit_tiny", img_size=32, embed_dim=16, depth=2, num_heads=2, local_up_to_layer=1),
        {"Block": 2},
        {"GPSA": 1, "MHSA": 1},
    ),
    Architecture(
        "tnt",
        timm_model(
            "tnt_s_patch16_224", img_size=32, embed_dim=16, inner_dim=8, depth=2, num_heads_inner=2, num_heads_outer=2
        ),
        {"Attention": 1, "Mlp": 1},
        {"Attention": 1},
    ),
    Architecture(
        "visformer",
        timm_model("visformer_tiny", 224, embed_dim=16, depth=(1, 1, 1), num_heads=2),
        {"Attention": 1, "SpatialMlp": 1},
        {"Attention": 1},
    ),
    Architecture(
        "volo",
        timm_class(
            "volo",
            "VOLO",
            32,
            img_size=32,
            layers=(1, 1),
            embed_dims=(16, 16),
            num_heads=(2, 2),
            downsamples=(False, False),
            outlook_attention=(True, False),
            stem_hidden_dim=8,
        ),
        {"Outlooker": 2, "Transformer": 2, "ClassBlock": 1},
        {"OutlookAttention": 1, "Attention": 1},
        why="class attention adds to the class token alone but reads all tokens: the slice is no input of the branch",
    ),
    Architecture(
        "gcvit",
        timm_class(
            "gcvit",
            "GlobalContextVit",
            64,
            img_size=64,
            embed_dim=8,
            depths=(2, 2),
            num_heads=(1, 2),
            window_ratio=(8, 8),
        ),
        {"MbConvBlock": 1, "GlobalContextVitBlock": 2},
        {"WindowAttentionGlobal": 1},
    ),
    Architecture(
        "focalnet", timm_class("focalnet", "FocalNet", 32, embed_dim=8, depths=(1, 1)), {"FocalNetBlock": 2}, {}
    ),
    Architecture("caformer", small_metaformer("SepConv", "Attention"), {"MetaFormerBlock": 2}, {"Attention": 1}),
    Architecture(
        "nest",
        timm_class("nest", "Nest", 32, img_size=32, embed_dims=(8, 16), num_heads=(1, 2), depths=(1, 1), num_levels=2),
        {"TransformerLayer": 2},
        {"Attention": 1},
    ),
)


def transformers_model(
    name: str, inputs: Callable[[], dict[str, torch.Tensor]], **options: Any
) -> Callable[[], tuple[Any, dict[str, torch.Tensor]]]:
    """Return a function that builds a base model of transformers from its config class."""

    def build() -> tuple[Any, dict[str, torch.Tensor]]:
        import transformers

        model_class = getattr(transformers, name)
        return model_class(model_class.config_class(**options)), inputs()

    return build


def whisper_encoder() -> tuple[Any, dict[str, torch.Tensor]]:
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    config = WhisperConfig(
        d_model=16,
        encoder_layers=2,
        encoder_attention_heads=2,
        encoder_ffn_dim=32,
        num_mel_bins=8,
        max_source_positions=10,
    )
    noise = torch.rand(2, 8, 20, generator=torch.Generator().manual_seed(1))
    return WhisperEncoder(config), {"input_features": noise}


def pictures() -> dict[str, torch.Tensor]:
    return {"pixel_values": pixels(32)}


def segments() -> dict[str, torch.Tensor]:
    return {**tokens(), "token_type_ids": torch.zeros(2, 7, dtype=torch.long)}


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
PICTURE = {**SMALL, "image_size": 32, "patch_size": 16}
TEXT = {**SMALL, "vocab_size": 50, "max_position_embeddings": 32, "pad_token_id": 0}
DECODER = {**TEXT, "num_key_value_heads": 1, "head_dim": 8, "use_cache": False, "bos_token_id": 1, "eos_token_id": 2}

TRANSFORMERS = (
    Architecture("hf_vit", transformers_model("ViTModel", pictures, **PICTURE), {"ViTLayer": 2}, {"ViTAttention": 1}),
    Architecture(
        "hf_dinov2", transformers_model("Dinov2Model", pictures, **PICTURE), {"Dinov2Layer": 2}, {"Dinov2Attention": 1}
    ),
    Architecture(
        "hf_dinov2_registers",
        transformers_model("Dinov2WithRegistersModel", pictures, **PICTURE),
        {"Dinov2WithRegistersLayer": 2},
        {"Dinov2WithRegistersAttention": 1},
    ),
    Architecture(
        "hf_deit", transformers_model("DeiTModel", pictures, **PICTURE), {"DeiTLayer": 2}, {"DeiTAttention": 1}
    ),
    Architecture(
        "hf_swinv2",
        transformers_model(
            "Swinv2Model",
            pictures,
            image_size=32,
            patch_size=4,
            embed_dim=8,
            depths=[1, 1],
            num_heads=[1, 2],
            window_size=4,
        ),
        {"Swinv2Layer": 2},
        {"Swinv2Attention": 1},
    ),
    Architecture(
        "hf_clip_text",
        transformers_model("CLIPTextModel", tokens, **{**TEXT, "eos_token_id": 2, "bos_token_id": 1}),
        {"CLIPEncoderLayer": 2},
        {"CLIPAttention": 1},
    ),
    Architecture(
        "hf_clip_vision",
        transformers_model("CLIPVisionModel", pictures, **PICTURE),
        {"CLIPEncoderLayer": 2},
        {"CLIPAttention": 1},
    ),
    Architecture(
        "hf_siglip_vision",
        transformers_model("SiglipVisionModel", pictures, **PICTURE),
        {"SiglipEncoderLayer": 2, "SiglipMultiheadAttentionPoolingHead": 1},
        {"SiglipAttention": 1},
        why="the attention of the pooling head has no shortcut; the MLP after it has one",
    ),
    Architecture("hf_bert", transformers_model("BertModel", segments, **TEXT), {"BertLayer": 2}, {"BertAttention": 1}),
    Architecture(
        "hf_roberta",
        transformers_model("RobertaModel", tokens, **{**TEXT, "pad_token_id": 1}),
        {"RobertaLayer": 2},
        {"RobertaAttention": 1},
    ),
    Architecture(
        "hf_electra",
        transformers_model("ElectraModel", segments, **TEXT, embedding_size=16),
        {"ElectraLayer": 2},
        {"ElectraAttention": 1},
    ),
    Architecture(
        "hf_albert",
        transformers_model("AlbertModel", segments, **TEXT, embedding_size=8),
        {"AlbertLayer": 2},
        {"AlbertAttention": 1},
        repeats=2,
        why="two layers share their weights",
    ),
    Architecture(
        "hf_distilbert",
        transformers_model(
            "DistilBertModel",
            tokens,
            dim=16,
            n_layers=2,
            n_heads=2,
            hidden_dim=32,
            vocab_size=50,
            max_position_embeddings=32,
        ),
        {"TransformerBlock": 2},
        {"DistilBertSelfAttention": 1},
    ),
    Architecture(
        "hf_modernbert",
        transformers_model(
            "ModernBertModel", tokens, **TEXT, cls_token_id=1, sep_token_id=2, bos_token_id=1, eos_token_id=2
        ),
        {"ModernBertEncoderLayer": 2},
        {"ModernBertAttention": 1},
    ),
    Architecture(
        "hf_llama", transformers_model("LlamaModel", tokens, **DECODER), {"LlamaDecoderLayer": 2}, {"LlamaAttention": 1}
    ),
    Architecture(
        "hf_qwen3", transformers_model("Qwen3Model", tokens, **DECODER), {"Qwen3DecoderLayer": 2}, {"Qwen3Attention": 1}
    ),
    Architecture(
        "hf_gemma", transformers_model("GemmaModel", tokens, **DECODER), {"GemmaDecoderLayer": 2}, {"GemmaAttention": 1}
    ),
    Architecture(
        "hf_gemma3",
        transformers_model("Gemma3TextModel", tokens, **DECODER, sliding_window=4),
        {"Gemma3DecoderLayer": 2},
        {"Gemma3Attention": 1},
    ),
    Architecture(
        "hf_mistral",
        transformers_model("MistralModel", tokens, **DECODER),
        {"MistralDecoderLayer": 2},
        {"MistralAttention": 1},
    ),
    Architecture(
        "hf_olmo2", transformers_model("Olmo2Model", tokens, **DECODER), {"Olmo2DecoderLayer": 2}, {"Olmo2Attention": 1}
    ),
    Architecture(
        "hf_phi",
        transformers_model("PhiModel", tokens, **{**TEXT, "use_cache": False}),
        {"PhiDecoderLayer": 2},
        {"PhiAttention": 1},
    ),
    Architecture(
        "hf_gpt_neox",
        transformers_model(
            "GPTNeoXModel", tokens, **{**TEXT, "use_cache": False, "bos_token_id": 1, "eos_token_id": 2}
        ),
        {"GPTNeoXLayer": 2},
        {"GPTNeoXAttention": 1},
    ),
    Architecture(
        "hf_gpt2",
        transformers_model(
            "GPT2Model",
            tokens,
            n_embd=16,
            n_layer=2,
            n_head=2,
            vocab_size=50,
            n_positions=32,
            use_cache=False,
            bos_token_id=1,
            eos_token_id=2,
        ),
        {"GPT2Block": 2},
        {"GPT2Attention": 1},
    ),
    Architecture(
        "hf_opt",
        transformers_model(
            "OPTModel",
            tokens,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            ffn_dim=32,
            vocab_size=50,
            max_position_embeddings=32,
            word_embed_proj_dim=16,
            use_cache=False,
        ),
        {"OPTDecoderLayer": 2},
        {"OPTAttention": 1},
    ),
    Architecture(
        "hf_t5_encoder",
        transformers_model(
            "T5EncoderModel", tokens, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=50
        ),
        {"T5LayerSelfAttention": 1, "T5LayerFF": 1},
        {"T5Attention": 1},
    ),
    Architecture("hf_whisper_encoder", whisper_encoder, {"WhisperEncoderLayer": 2}, {"WhisperAttention": 1}),
)
