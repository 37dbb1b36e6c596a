"""The page at /vision (`serve.pages`), for people who ask `/v1/images/generations` and `/v1/images/compose`. It has the
colours and elements of that at /patients."""

from pathlib import Path

DIRECTORY = Path(__file__).parent
