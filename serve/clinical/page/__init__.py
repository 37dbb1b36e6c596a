"""The page at /patients (`serve.pages`), for people who ask `/v1/predict`."""

from pathlib import Path

DIRECTORY = Path(__file__).parent
