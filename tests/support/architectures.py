"""Tiny random models of the architectures that transformers has for causal language modelling, and of some that are none."""

from __future__ import annotations

from typing import Any

VOCABULARY = 101
IDS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
HEADS = IDS | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GROUPS = HEADS | {"num_key_value_heads": 2}
WINDOW = {"sliding_window": 4}
HEAD = {"head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
DEEPSEEK = HEADS | {
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
GPT = IDS | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
STATES = IDS | {"hidden_size": 32, "num_hidden_layers": 2}

# Right, and sampled with a KV cache.
CACHED: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("Llama", GROUPS),
    "Qwen2": ("Qwen2", GROUPS),
    "Qwen3": ("Qwen3", GROUPS | HEAD),
    "Mistral": ("Mistral", GROUPS | {"sliding_window": None}),
    "Mistral, window": ("Mistral", GROUPS | WINDOW),
    "GPT-2": ("GPT2", GPT),
    "GPT-NeoX": ("GPTNeoX", HEADS),
    "OLMo": ("Olmo", GROUPS),
    "OLMo 2": ("Olmo2", GROUPS),
    "OLMo 3": ("Olmo3", GROUPS | WINDOW),
    "OLMoE": ("Olmoe", GROUPS | {"num_experts": 4, "num_experts_per_tok": 2}),
    "SmolLM3": ("SmolLM3", GROUPS),
    "Phi": ("Phi", GROUPS),
    "Phi-3": ("Phi3", GROUPS),
    "Phi-MoE": ("Phimoe", GROUPS | LOCAL_EXPERTS),
    "Gemma": ("Gemma", GROUPS | HEAD),
    "Gemma 2": ("Gemma2", GROUPS | HEAD | WINDOW),
    "Gemma 3": ("Gemma3Text", GROUPS | HEAD | WINDOW),
    "Falcon": ("Falcon", STATES | {"num_attention_heads": 4}),
    "Falcon, ALiBi": ("Falcon", STATES | {"num_attention_heads": 4, "alibi": True}),
    "BLOOM": ("Bloom", IDS | {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "OPT": ("OPT", HEADS | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "StableLM": ("StableLm", GROUPS),
    "GPT-J": ("GPTJ", GPT | {"rotary_dim": 4}),
    "CodeGen": ("CodeGen", GPT | {"rotary_dim": 4}),
    "Cohere": ("Cohere", GROUPS),
    "Cohere 2": ("Cohere2", GROUPS | WINDOW),
    "Granite": ("Granite", GROUPS),
    "Granite MoE": ("GraniteMoe", GROUPS | LOCAL_EXPERTS),
    "Granite MoE hybrid": (
        "GraniteMoeHybrid",
        GROUPS
        | LOCAL_EXPERTS
        | MAMBA
        | {"layer_types": ["mamba", "attention"], "mamba_expand": 2, "shared_intermediate_size": 32},
    ),
    "Mixtral": ("Mixtral", GROUPS | LOCAL_EXPERTS),
    "Qwen2 MoE": ("Qwen2Moe", GROUPS | EXPERTS | {"shared_expert_intermediate_size": 16}),
    "Qwen3 MoE": ("Qwen3Moe", GROUPS | EXPERTS | HEAD),
    "Qwen3-Next": (
        "Qwen3Next",
        GROUPS
        | EXPERTS
        | HEAD
        | {
            "shared_expert_intermediate_size": 16,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "GPT-OSS": ("GptOss", GROUPS | HEAD | WINDOW | LOCAL_EXPERTS),
    "DeepSeek-V2": ("DeepseekV2", DEEPSEEK),
    "DeepSeek-V3": ("DeepseekV3", DEEPSEEK),
    "Llama 4": (
        "Llama4Text",
        GROUPS | HEAD | {"num_local_experts": 2, "intermediate_size_mlp": 48, "attention_chunk_size": 8},
    ),
    "GLM": ("Glm", GROUPS | HEAD),
    "GLM 4": ("Glm4", GROUPS | HEAD),
    "Nemotron": ("Nemotron", GROUPS),
    "Nemotron-H": (
        "NemotronH",
        GROUPS
        | HEAD
        | {
            "hybrid_override_pattern": "M*",
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 1,
            "chunk_size": 8,
        },
    ),
    "StarCoder2": ("Starcoder2", GROUPS | WINDOW),
    "GPTBigCode": ("GPTBigCode", GPT),
    "XGLM": (
        "XGLM",
        IDS | {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48, "max_position_embeddings": 64},
    ),
    "BioGPT": ("BioGpt", HEADS),
    "CTRL": ("CTRL", GPT | {"dff": 48}),
    "MPT": ("Mpt", {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}),
    "GPT-Neo": (
        "GPTNeo",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 4,
            "max_position_embeddings": 64,
        },
    ),
    "Persimmon": ("Persimmon", HEADS),
    "LFM2": ("Lfm2", GROUPS | {"layer_types": ["conv", "full_attention"]}),
    "Falcon-H1": ("FalconH1", GROUPS | MAMBA | {"mamba_d_ssm": 64}),
    "Bamba": ("Bamba", GROUPS | MAMBA | {"attn_layer_indices": [1]}),
    "Mamba 2": (
        "Mamba2",
        STATES | {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    ),
    "Helium": ("Helium", GROUPS | HEAD),
    "EXAONE 4": ("Exaone4", GROUPS | WINDOW),
    "BERT, decoder": ("Bert", HEADS | {"is_decoder": True}),
}
# Right, and sampled by a full forward a token: their caches take no padding on the left, or are of another kind.
UNCACHED: dict[str, tuple[str, dict[str, Any]]] = {
    "Mamba": ("Mamba", STATES | {"state_size": 8}),
    "Falcon-Mamba": ("FalconMamba", STATES | {"state_size": 8}),
    "RWKV": (
        "Rwkv",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "attention_hidden_size": 32,
            "context_length": 64,
        },
    ),
    "xLSTM": ("xLSTM", STATES | {"num_heads": 4, "chunk_size": 16}),
    "OpenAI GPT": (
        "OpenAIGPT",
        {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    ),
    "RoBERTa, decoder": ("Roberta", HEADS | {"is_decoder": True}),
    "RecurrentGemma": (
        "RecurrentGemma",
        HEADS | {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 4},
    ),
    "MiniMax": (
        "MiniMax",
        GROUPS
        | HEAD
        | {"num_local_experts": 2, "layer_types": ["linear_attention", "full_attention"], "block_size": 8},
    ),
}
# Not causal.
BIDIRECTIONAL: dict[str, tuple[str, dict[str, Any]]] = {
    "BERT": ("Bert", HEADS),
    "RoBERTa": ("Roberta", HEADS),
    "ELECTRA": ("Electra", HEADS | {"embedding_size": 32}),
    "XLM": (
        "XLM",
        {"vocab_size": VOCABULARY, "emb_dim": 32, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64},
    ),
    "XLNet": ("XLNet", {"vocab_size": VOCABULARY, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}),
}
ENCODER_DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "BART": (
        "Bart",
        IDS
        | {
            "d_model": 32,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
        },
    ),
    "T5": ("T5", {"vocab_size": VOCABULARY, "d_model": 32, "num_layers": 1, "num_heads": 4, "d_kv": 8, "d_ff": 48}),
}


def made(kind: str, settings: dict[str, Any], seed: int = 0, scale: float = 1.0) -> Any:
    """A random model; scale: by which its matrices are larger, so that its layers matter more."""
    import torch
    import transformers

    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(scale)
    return model
