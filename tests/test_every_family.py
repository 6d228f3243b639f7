"""Families of transformers, tiny and from their configuration: thoughts and replies are exact or refused."""

import naive
import pytest
import torch
import transformers as tf
from test_thoughts import END, SMALL, THINK, close, think

from qs_lib.model import QuietStarForCausalLM
from qs_lib.thoughts.attention import backbone
from qs_lib.thoughts.rescore import rescore_thoughts

EXACT = """
afmoe apertus arcee aria_text axk1 beam biogpt bitnet blenderbot-small bloom codegen cohere cohere2 cohere2_moe cwm
deepseek_v3
deepseek_v32 diffllama ernie4_5 exaone4 exaone_moe falcon falcon_h1 falcon_mamba flex_olmo flint gemma gemma2
gemma3_text gemma4_text glm glm4 glm4_moe_lite glm_moe_dsa gpt2 gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese
gpt_oss gptj granite granite_swa granitemoe granitemoehybrid helium hunyuan_v1_dense hy_v4 internlm3
jais2 jamba jetmoe lfm2 lfm2_moe lfm3 llama mamba mamba2 mimo_v2_flash minicpm3 minimax minimax_m2 minimax_m3_vl_text
ministral mistral mixtral moshi mpt nanochat nemotron nemotron_h olmo olmo2 olmo3 olmo_hybrid olmoe openai-gpt
opt persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_5_text qwen3_moe qwen3_next rwkv smollm3
stablelm starcoder2 trocr vaultgemma xglm youtu zaya
""".split()
REFUSED = {"bert": "not causal", "big_bird": "not causal", "cpmant": "not causal", "doge": "not causal"}
REFUSED |= {"roberta": "not causal", "roformer": "not causal", "llama4_text": "separate head"}
REFUSED |= dict.fromkeys(("inkling_text", "modernbert-decoder", "recurrent_gemma"), "computes its logits")
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
MLA |= {"head_dim": 8, "qk_head_dim": 16, "num_key_value_heads": 4, "n_group": 2, "topk_group": 1}
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
SPECIAL = {
    "blenderbot-small": {"forced_eos_token_id": None, "decoder_layers": 2, "decoder_attention_heads": 4, "d_model": 32},
    "deepseek_v3": MLA,
    "deepseek_v32": MLA | {"index_topk": 4, "index_n_heads": 16, "index_head_dim": 16},
    "glm4_moe_lite": MLA,
    "glm_moe_dsa": MLA | {"index_topk": 4, "index_n_heads": 16, "index_head_dim": 16},
    "minicpm3": MLA,
    "youtu": MLA,
    "axk1": MLA,
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
    "gemma4_text": {"vocab_size_per_layer_input": 60},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 6},
    "granitemoehybrid": MAMBA | {"layer_types": ["mamba", "attention"], "layers_block_type": ["mamba", "attention"]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "expand": 2},
    "ministral": {"head_dim": 8},
    "qwen3_5_text": HYBRID | DELTA,
    "qwen3_next": HYBRID | DELTA,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": 32, "attention_window_size": 6},
    "rwkv": {"attention_hidden_size": 32},
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


def build(family):
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config_of(family)).eval()
    model.config.think_token_id, model.config.end_think_token_id = THINK, END
    return model


def check_thoughts(model, ids, mask):
    """Compare sampling and re-scoring with plain forwards on text and thought alone."""
    positions = torch.tensor([[9, 5], [2, -1]])
    thoughts = think(model, ids, mask, positions, num_thoughts=2, thought_length=5, temperature=2.0)
    with torch.no_grad():
        expected = naive.rescore(model, ids, thoughts, mask, n_true=2)
        found = rescore_thoughts(model, ids, thoughts, mask, n_true=2, true_logits=True)
    close(thoughts.logprobs, expected["thought_logprobs"], 2e-4, relative=0)
    close(thoughts.hidden, expected["thought_hidden"][..., 0, :], 1e-3, relative=1e-3)
    for name, value in expected.items():
        close(getattr(found, name), value, 1e-3 if "hidden" in name else 2e-4, name, relative=1e-3)


def check_reply(model, ids, mask):
    """Compare cached generation with thoughts, and without, with reading the whole text anew for every token."""
    wrapped = QuietStarForCausalLM.from_base(model, num_thoughts=2, thought_length=5, thought_temperature=0.0, n_true=9)
    torch.nn.init.constant_(wrapped.mixing_head.gate.bias, 0.5)
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": -1, "use_cache": True}
    out = wrapped.generate(ids, attention_mask=mask, **settings, return_dict_in_generate=True)
    drawn = out.past_key_values.thoughts[0]
    for row in range(2):
        text, written = ids[row][mask[row].bool()].tolist(), []
        thoughts = [t[:n] for t, n in zip(drawn.tokens[row, 0].tolist(), drawn.lengths[row, 0].tolist(), strict=True)]
        for _ in range(4):
            rows = [text + written] + [text + thought + written for thought in thoughts]
            with torch.no_grad():
                states = torch.stack([backbone(model)(torch.tensor([r])).last_hidden_state[0, -1] for r in rows])
                written.append(wrapped.mix(states[0], states[1:]).argmax().item())
        assert out.sequences[row, -4:].tolist() == written
    without = wrapped.generate(ids, attention_mask=mask, think=False, **settings)
    assert torch.equal(without, model.generate(ids, attention_mask=mask, **settings))


@pytest.mark.filterwarnings("ignore:.*cannot share text")
@pytest.mark.parametrize("family", EXACT + list(REFUSED))
def test_thoughts_and_replies_are_exact_or_refused(family):
    model, generator = build(family), torch.Generator().manual_seed(1)
    ids = torch.randint(5, 60, (2, 10), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    if family not in REFUSED:
        check_thoughts(model, ids, mask)
        check_reply(model, ids, mask)
        return
    for act in (check_thoughts, check_reply):
        with pytest.raises((NotImplementedError, ValueError), match=REFUSED[family]):
            act(model, ids, mask)
