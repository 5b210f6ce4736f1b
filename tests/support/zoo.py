"""Tiny models of many architectures, made from their configs with random weights, and a batch with a loss for each."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn

TEXT = {
    "vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = {**TEXT, "num_key_value_heads": 2, "head_dim": 8}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
SEQ2SEQ = {
    "vocab_size": 61, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 1, "forced_eos_token_id": None,
}  # fmt: skip
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
STATE_SPACE = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "pad_token_id": 0}
IMAGE = 61  # llava's token that stands for an image patch


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _ids(rows: int = 3) -> Tensor:
    return torch.randint(3, 61, (rows, 7), generator=torch.Generator().manual_seed(0))


def language() -> dict[str, Any]:
    return {"input_ids": _ids(), "labels": _ids()}


def sequence_class() -> dict[str, Any]:
    return {"input_ids": _ids(), "labels": torch.tensor([0, 1, 1])}


def pictures() -> dict[str, Any]:
    return {"pixel_values": _normal(2, 3, 32, 32), "labels": torch.tensor([0, 1])}


def speech() -> dict[str, Any]:
    return {"input_features": _normal(3, 8, 32), "labels": _ids()}


def waves() -> dict[str, Any]:
    return {"input_values": _normal(3, 400), "labels": _ids()}


def pairs() -> dict[str, Any]:
    return {"input_ids": _ids(2), "pixel_values": _normal(2, 3, 32, 32), "return_loss": True}


def image_and_text() -> dict[str, Any]:
    ids = torch.cat([torch.full((2, 4), IMAGE), _ids(2)], dim=1)
    return {"input_ids": ids, "pixel_values": _normal(2, 3, 32, 32), "labels": ids.where(ids != IMAGE, -100)}


@dataclass(frozen=True)
class Arch:
    """One architecture.

    Attributes:
        model, config: names of the classes in transformers.
        settings: what makes it tiny.
        targets: how many layers a config with the default targets is to find; 0: d_model is not known.
        batch: a batch with labels.
        fused: whether part of the weights is out of reach of hooks.
        inner: how many layers neither read nor write a residual stream, so that the defaults leave them out.
    """

    model: str
    config: str
    settings: dict[str, Any]
    targets: int
    batch: Callable[[], dict[str, Any]] = language
    fused: bool = False
    inner: int = 0
    extra: dict[str, Any] = field(default_factory=dict)

    def make(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            config = getattr(transformers, self.config)(**self.settings)
            return getattr(transformers, self.model)(config).eval()

    def inputs(self) -> dict[str, Any]:
        return {**self.batch(), **self.extra}


def without(settings: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in keys}


ARCHITECTURES = {
    # decoders
    "llama": Arch("LlamaForCausalLM", "LlamaConfig", GROUPED, 14),
    "qwen2": Arch("Qwen2ForCausalLM", "Qwen2Config", without(GROUPED, "head_dim"), 14),
    "qwen3": Arch("Qwen3ForCausalLM", "Qwen3Config", GROUPED, 14),
    "gemma3": Arch("Gemma3ForCausalLM", "Gemma3TextConfig", GROUPED, 14),
    "gpt2": Arch(
        "GPT2LMHeadModel", "GPT2Config",
        {**without(TEXT, "intermediate_size", "pad_token_id"), "loss_type": "ForCausalLMLoss"}, 8,
    ),
    "gpt_neox": Arch("GPTNeoXForCausalLM", "GPTNeoXConfig", TEXT, 8),
    "opt": Arch(
        "OPTForCausalLM", "OPTConfig",
        {**without(TEXT, "intermediate_size"), "ffn_dim": 64, "word_embed_proj_dim": 16}, 14,
    ),
    "falcon": Arch("FalconForCausalLM", "FalconConfig", without(TEXT, "intermediate_size"), 8),
    "bloom": Arch("BloomForCausalLM", "BloomConfig", without(TEXT, "intermediate_size", "max_position_embeddings"), 8),
    "phi": Arch("PhiForCausalLM", "PhiConfig", TEXT, 12),
    "phi3": Arch("Phi3ForCausalLM", "Phi3Config", {**TEXT, "num_key_value_heads": 2}, 8),
    # mixtures of experts
    "mixtral": Arch(
        "MixtralForCausalLM", "MixtralConfig",
        {**GROUPED, "num_experts_per_tok": 2, "num_local_experts": 4}, 8, fused=True,
    ),
    "qwen3_moe": Arch("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**GROUPED, **EXPERTS, "num_experts": 4}, 8, fused=True),
    "deepseek_v3": Arch(
        "DeepseekV3ForCausalLM", "DeepseekV3Config",
        {**TEXT, **EXPERTS, "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 2, "topk_group": 1,
         "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8,
         "v_head_dim": 8}, 12, fused=True, inner=4,
    ),
    # encoders
    "bert": Arch("BertForMaskedLM", "BertConfig", TEXT, 13),
    "roberta": Arch("RobertaForSequenceClassification", "RobertaConfig", TEXT, 14, sequence_class),
    "distilbert": Arch(
        "DistilBertForSequenceClassification", "DistilBertConfig",
        {"vocab_size": 61, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}, 14, sequence_class,
    ),
    "deberta_v2": Arch(
        "DebertaV2ForMaskedLM", "DebertaV2Config",
        {**TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}, 17,
    ),
    "albert": Arch("AlbertForMaskedLM", "AlbertConfig", {**TEXT, "embedding_size": 16}, 8),
    "modernbert": Arch("ModernBertForMaskedLM", "ModernBertConfig", {**TEXT, "cls_token_id": 1, "sep_token_id": 2}, 9),
    # encoder-decoders
    "t5": Arch(
        "T5ForConditionalGeneration", "T5Config",
        {"vocab_size": 61, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
         "decoder_start_token_id": 0}, 32,
    ),
    "bart": Arch("BartForConditionalGeneration", "BartConfig", {**SEQ2SEQ, "max_position_embeddings": 64}, 32),
    "whisper": Arch(
        "WhisperForConditionalGeneration", "WhisperConfig",
        {**without(SEQ2SEQ, "forced_eos_token_id"), "num_mel_bins": 8, "max_source_positions": 16,
         "max_target_positions": 16, "suppress_tokens": None, "begin_suppress_tokens": None}, 32, speech,
    ),
    # vision, audio, both with text
    "vit": Arch("ViTForImageClassification", "ViTConfig", {**VISION, "image_size": 32, "patch_size": 8}, 13, pictures),
    "swin": Arch(
        "SwinForImageClassification", "SwinConfig",
        {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4},
        14, pictures,
    ),
    "convnext": Arch(
        "ConvNextForImageClassification", "ConvNextConfig",
        {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2}, 0, pictures,
    ),
    "clip": Arch(
        "CLIPModel", "CLIPConfig",
        {"text_config": TEXT, "vision_config": {**VISION, "image_size": 32, "patch_size": 8}, "projection_dim": 16},
        26, pairs,
    ),
    "wav2vec2": Arch(
        "Wav2Vec2ForCTC", "Wav2Vec2Config",
        {**without(TEXT, "max_position_embeddings"), "conv_dim": (16, 16), "conv_stride": (5, 2),
         "conv_kernel": (10, 3), "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4,
         "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0, "layerdrop": 0.0}, 13, waves,
    ),
    "llava": Arch(
        "LlavaForConditionalGeneration", "LlavaConfig",
        {"text_config": {**GROUPED, "model_type": "llama", "vocab_size": 62}, "image_token_index": IMAGE,
         "vision_config": {**VISION, "model_type": "clip_vision_model", "hidden_size": 24, "image_size": 32,
                           "patch_size": 16}, "vision_feature_layer": -1}, 28, image_and_text,
    ),
    # state spaces and recurrent
    "mamba": Arch("MambaForCausalLM", "MambaConfig", STATE_SPACE, 4, inner=4),
    "mamba2": Arch(
        "Mamba2ForCausalLM", "Mamba2Config",
        {**STATE_SPACE, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 4}, 4,
    ),
    "falcon_mamba": Arch("FalconMambaForCausalLM", "FalconMambaConfig", STATE_SPACE, 4, inner=4),
    # Its recurrent state, kept in eval mode unless told not to, is written in place: no backward pass goes through it.
    "rwkv": Arch("RwkvForCausalLM", "RwkvConfig", {**without(STATE_SPACE, "state_size"), "context_length": 64}, 14,
                 extra={"use_cache": False}),
    "bamba": Arch(
        "BambaForCausalLM", "BambaConfig",
        {**GROUPED, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1,
         "mamba_chunk_size": 4, "attn_layer_indices": [1]}, 12,
    ),
}  # fmt: skip
