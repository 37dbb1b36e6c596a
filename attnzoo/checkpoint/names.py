"""Names of a decoder's tensors in other formats."""

from collections.abc import Mapping

HUGGING_FACE: Mapping[str, str] = {
    "embedding": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
    "blocks": "model.layers",
    "attention_norm": "input_layernorm",
    "attention.projection.query": "self_attn.q_proj",
    "attention.projection.key": "self_attn.k_proj",
    "attention.projection.value": "self_attn.v_proj",
    "attention.projection.output": "self_attn.o_proj",
    "attention.projection.query_norm": "self_attn.q_norm",
    "attention.projection.key_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
"""Our module names, and those of Llama, Mistral, Qwen2 and Qwen3 in transformers. Names in a block lack its number."""

GGUF: Mapping[str, str] = {
    "embedding": "token_embd",
    "norm": "output_norm",
    "head": "output",
    "blocks": "blk",
    "attention_norm": "attn_norm",
    "attention.projection.query": "attn_q",
    "attention.projection.key": "attn_k",
    "attention.projection.value": "attn_v",
    "attention.projection.output": "attn_output",
    "mlp_norm": "ffn_norm",
    "mlp.gate": "ffn_gate",
    "mlp.up": "ffn_up",
    "mlp.down": "ffn_down",
}
"""Our module names, and those of GGUF's architecture "llama"."""


def rename(own: str, modules: Mapping[str, str]) -> str:
    """The name of a tensor of `DecoderLM` in another format. Raises KeyError for a tensor that the format lacks.

    >>> rename("blocks.3.mlp.up.weight", GGUF)
    'blk.3.ffn_up.weight'
    """
    module, kind = own.rsplit(".", 1)
    if not module.startswith("blocks."):
        return f"{modules[module]}.{kind}"
    _, number, inside = module.split(".", 2)
    return f"{modules['blocks']}.{number}.{modules[inside]}.{kind}"
