"""Prompts, options and results of `LanguageModel.generate` and its relatives."""

from attnzoo.generation.attention_wish import AttentionWish, Spans
from attnzoo.generation.cost import GenerationCost, StepCost, generation_cost
from attnzoo.generation.embeddings import encode_conversation
from attnzoo.generation.inputs import Conversation, Prompt, as_batch, as_conversations, check_batch_size, is_token
from attnzoo.generation.options import ELSEWHERE, GenerationOptions, read_options, read_policy
from attnzoo.generation.results import (
    Continuation,
    FinishReason,
    Generation,
    GenerationStream,
    TextLogprobs,
    Writer,
)
from attnzoo.generation.task import GenerationTask, TokenPrompt, run_batched, run_task

__all__ = [
    "ELSEWHERE",
    "AttentionWish",
    "Continuation",
    "Conversation",
    "FinishReason",
    "Generation",
    "GenerationCost",
    "GenerationOptions",
    "GenerationStream",
    "GenerationTask",
    "Prompt",
    "Spans",
    "StepCost",
    "TextLogprobs",
    "TokenPrompt",
    "Writer",
    "as_batch",
    "as_conversations",
    "check_batch_size",
    "encode_conversation",
    "generation_cost",
    "is_token",
    "read_options",
    "read_policy",
    "run_batched",
    "run_task",
]
