"""Pictures whose content is known: emoji on textured backgrounds, questions about them, and models that look."""

from attnzoo.vision.emoji import EMOJI, FONTS, bitmaps
from attnzoo.vision.questions import Baselines, SceneQuestion, evaluation_questions, training_questions
from attnzoo.vision.scenes import SPLITS, Scene, SceneOptions, SceneWorld, Split

__all__ = [
    "EMOJI",
    "FONTS",
    "SPLITS",
    "Baselines",
    "Scene",
    "SceneOptions",
    "SceneQuestion",
    "SceneWorld",
    "Split",
    "bitmaps",
    "evaluation_questions",
    "training_questions",
]
