"""How well objects are composed into pictures: cases whose right answer is known, readers, metrics, arms, a gate.

`cases.py` makes the cases, `reader.py` what reads emoji and styles, `crops.py` the squares it looks at, `metrics.py`
and `realism.py` the numbers, `validity.py` whether these can be trusted, `arms.py` the ways to compose that are
compared, `gate.py` whether the model draws what it is told. The experiment is `train/experiments/prime_composer.py`.
"""
