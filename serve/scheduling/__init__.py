"""Continuous batching, planned with integers: it knows neither models nor tensors."""

from serve.scheduling.pace import PromptPace
from serve.scheduling.plan import Chunk, Demand, Exchange, Group, Prefixes, Resume, Reuse, StepPlan
from serve.scheduling.scheduler import PATIENCE, QueueFullError, Scheduler
from serve.scheduling.slots import Release, SlotTable

__all__ = [
    "PATIENCE",
    "Chunk",
    "Demand",
    "Exchange",
    "Group",
    "Prefixes",
    "PromptPace",
    "QueueFullError",
    "Release",
    "Resume",
    "Reuse",
    "Scheduler",
    "SlotTable",
    "StepPlan",
]
