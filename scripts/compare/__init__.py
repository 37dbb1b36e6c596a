"""Compares attention variants (`attnzoo compare`): quality, speed and memory, in plain torch."""

from scripts.compare.comparison import Comparison, Run
from scripts.compare.config import CompareConfig, PaperConfig, RecallConfig, parse_settings
from scripts.compare.runs import Hooks, run_one

__all__ = ["CompareConfig", "Comparison", "Hooks", "PaperConfig", "RecallConfig", "Run", "parse_settings", "run_one"]
