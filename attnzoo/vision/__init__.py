"""Pictures whose content is known: emoji on textured backgrounds, questions about them, and models that look."""

from attnzoo.vision.captions import CaptionWords, caption
from attnzoo.vision.emoji import EMOJI, FONTS, bitmaps
from attnzoo.vision.questions import Baselines, SceneQuestion, evaluation_questions, training_questions
from attnzoo.vision.scenes import SPLITS, Scene, SceneOptions, SceneWorld, Split
from attnzoo.vision.styles import STYLES
from attnzoo.vision.trained_diffusion import TrainedDiffusion, load_diffusion

__all__ = [
    "EMOJI",
    "FONTS",
    "SPLITS",
    "STYLES",
    "Baselines",
    "CaptionWords",
    "Scene",
    "SceneOptions",
    "SceneQuestion",
    "SceneWorld",
    "Split",
    "TrainedDiffusion",
    "bitmaps",
    "caption",
    "evaluation_questions",
    "load_diffusion",
    "training_questions",
]
