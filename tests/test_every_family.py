"""Families of transformers, tiny and from their configuration: thoughts and replies are exact, or there is a sentence."""


import transformers as tf
from test_thoughts import SMALL

HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
MLA |= {"head_dim": 8, "qk_head_dim": 16, "num_key_value_heads": 4, "n_group": 2, "topk_group": 1}
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
SPECIAL = {
    "bamba": MAMBA | {"layers_block_type": ["mamba", "attention"], "attn_layer_indices": [1]},
    "bailing_hybrid": HYBRID,
    "blenderbot-small": {"decoder_layers": 2, "decoder_attention_heads": 4, "d_model": 32},
    "deepseek_v2": MLA,
    "deepseek_v3": MLA,
    "deepseek_v32": MLA | {"index_topk": 4, "index_n_heads": 2, "index_head_dim": 16},
    "glm4_moe_lite": MLA,
    "glm_moe_dsa": MLA | {"index_topk": 4, "index_n_heads": 2, "index_head_dim": 16},
    "minicpm3": MLA,
    "youtu": MLA,
    "axk1": MLA,
    "gemma4_text": {"vocab_size_per_layer_input": 60},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 6},
    "granitemoehybrid": MAMBA | {"layer_types": ["mamba", "attention"], "layers_block_type": ["mamba", "attention"]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "moe_topk": [2, 2]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 4},
    "kimi_linear": HYBRID,
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "expand": 2},
    "ministral": {"head_dim": 8},
    "qwen3_5_text": HYBRID | DELTA,
    "qwen3_5_moe_text": HYBRID | DELTA,
    "qwen3_next": HYBRID | DELTA,
    "qwen4_exp_text": HYBRID | DELTA,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": 32, "attention_window_size": 6},
    "rwkv": {"attention_hidden_size": 32},
    "xlstm": {"num_heads": 4, "num_blocks": 2},
    "zaya": {"num_experts_per_tok": 1, "moe_router_topk": 1},
}


def config_of(family):
    """The family's configuration with every size made small."""
    default = type(tf.AutoConfig.for_model(family).get_text_config(decoder=True))
    changed = dict(SMALL)
    for name, value in default().to_dict().items():
        if isinstance(value, bool) or not isinstance(value, int) or name in SMALL or name.endswith("token_id"):
            continue
        if "expert" in name and "num" in name and "tok" not in name and value > 4:
            changed[name] = 4
        elif "experts_per_tok" in name:
            changed[name] = 2
        elif "window" in name:
            changed[name] = 6
        elif value >= 64 and any(word in name for word in ("size", "dim", "rank")):
            changed[name] = 16 if "rank" in name or "inter" in name else 8
        elif name in ("n_layer", "n_layers") or "num_layers" in name:
            changed[name] = 2
    return default(**changed | SPECIAL.get(family, {}))
