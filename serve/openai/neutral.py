"""Unsupported fields that clients of OpenAI and vLLM send, with their neutral values.

A neutral value changes nothing and is accepted; any other value is refused with the field's name. So a client that
always sends `length_penalty: 1.0` is served, and a client that sends 1.2 learns that there is no such penalty.
"""

from collections.abc import Mapping
from typing import Any

from serve.openai.errors import unsupported

Values = tuple[Any, ...]

ANY_BOOL: Values = (None, True, False)
OFF: Values = (None, False)

SHARED: Mapping[str, Values] = {
    # vLLM's for sampling
    "allowed_token_ids": (None,),
    "bad_words": (None, []),
    "include_stop_str_in_output": OFF,
    "length_penalty": (None, 1),
    "logprob_token_ids": (None, []),
    "prompt_logprobs": (None,),
    "repetition_detection": (None,),
    "thinking_token_budget": (None, -1),
    "truncate_prompt_tokens": (None,),
    "truncation_side": (None, "left", "right"),  # prompts are never truncated
    "use_beam_search": OFF,
    "watermarking": OFF,
    # Control tokens are never part of an answer's text, with spaces or without.
    "skip_special_tokens": (None, True),
    "spaces_between_special_tokens": ANY_BOOL,
    # vLLM's for everything else
    "ec_transfer_params": (None, {}),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "kv_transfer_params": (None, {}),
    "mm_payload": (None, "tensors", "none"),
    "request_id": (None,),
    "response_format": (None, {"type": "text"}),
    "return_mm_kwargs": ANY_BOOL,
    "return_token_ids": OFF,
    "return_token_offsets": OFF,
    "return_tokens_as_token_ids": OFF,
    "routed_experts_prompt_start": (None, 0),
    "stream_interval": (None, 1),
    "structured_outputs": (None,),
    "vllm_xargs": (None, {}),
}
COMPLETION: Mapping[str, Values] = {
    "add_special_tokens": (None, True),
    "best_of": (None, 1),
    "prompt_embeds": (None,),
    "suffix": (None, ""),
}
TOKENS: Mapping[str, Values] = {
    "add_generation_prompt": (None, True),
    "chat_template": (None,),
    "chat_template_kwargs": (None, {}),
    "continue_final_message": OFF,
    "mm_processor_kwargs": (None, {}),
    "tools": (None, []),
}
CHAT: Mapping[str, Values] = {
    "add_generation_prompt": (None, True),
    "add_special_tokens": OFF,
    "audio": (None,),
    "chat_template": (None,),
    "chat_template_kwargs": (None, {}),
    "continue_final_message": OFF,
    "documents": (None, []),
    "echo": OFF,
    "function_call": (None, "none", "auto"),
    "functions": (None, []),
    "include_reasoning": ANY_BOOL,
    "media_io_kwargs": (None, {}),
    "mm_processor_kwargs": (None, {}),
    "modalities": (None, ["text"]),
    "moderation": (None,),
    "parallel_tool_calls": ANY_BOOL,
    "prediction": (None,),
    "prompt_cache_options": (None,),
    "prompt_cache_retention": (None, "in_memory", "24h"),
    "reasoning_effort": (None, "none"),
    "return_prompt_text": OFF,
    "service_tier": (None, "auto", "default"),
    "store": OFF,
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "verbosity": (None, "medium"),
    "web_search_options": (None,),
}


def take_neutral(values: dict[str, Any], neutral: Mapping[str, Values]) -> None:
    """Removes the fields of `neutral` from `values`. Raises ApiError for a field whose value is not neutral."""
    for name in [name for name in values if name in neutral]:
        value = values.pop(name)
        if not any(_same(value, allowed) for allowed in neutral[name]):
            raise unsupported(name)


def _same(value: Any, allowed: Any) -> bool:
    """Whether the values are equal; True and 1 are not."""
    return bool(value == allowed) and isinstance(value, bool) == isinstance(allowed, bool)
