"""Variants side by side: what they learn (`python -m attnzoo compare`), what they take, what fits. Plain torch."""

from attnzoo.evaluate.comparison import Comparison, Run
from attnzoo.evaluate.config import CompareConfig, PaperConfig, RecallConfig, parse_settings
from attnzoo.evaluate.runs import Hooks, run_one

__all__ = ["CompareConfig", "Comparison", "Hooks", "PaperConfig", "RecallConfig", "Run", "parse_settings", "run_one"]
