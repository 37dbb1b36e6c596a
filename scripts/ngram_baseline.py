"""Measures the bits per byte of byte n-gram models on a training run's validation text.

    python scripts/ngram_baseline.py                                   # the default corpus
    python scripts/ngram_baseline.py --config runs/demo/config.yaml    # the corpus and split of a run
    python scripts/ngram_baseline.py --orders 3 5 --json ngram.json data.source=my.txt

Order n predicts a byte from the n-1 bytes before it.
"""

import argparse
import sys
import time
from collections.abc import Sequence

from attnzoo.errors import complain
from attnzoo.files import output_file
from attnzoo.report import Report
from attnzoo.types import build_config
from train.config_reader import load_config
from train.data import DataConfig
from train.data.corpora import split_documents
from train.ngram import join, ngram_bits_per_byte


def texts(config: str, overrides: Sequence[str] = ()) -> tuple[bytes, bytes]:
    """(training text, validation text) of a training config, as bytes."""
    loaded = load_config(config, list(overrides))
    data = build_config(DataConfig, {"seed": loaded.seed, **loaded.data}, "data")
    split = list(split_documents(data))
    return join(d for is_train, d in split if is_train), join(d for is_train, d in split if not is_train)


def main() -> int:
    """Measures and reports; exit status 2 for wrong usage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="base.yaml", help="training config (default: %(default)s)")
    parser.add_argument("--orders", type=int, nargs="+", default=[3, 4, 5, 6], help="(default: 3 4 5 6)")
    parser.add_argument("--json", help="write the report to this file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example data.source=my.txt")
    chosen = parser.parse_args()
    report = Report.start(command=["python", "scripts/ngram_baseline.py", *sys.argv[1:]])
    try:
        out = None if chosen.json is None else output_file(chosen.json, "--json")
        train, validation = texts(chosen.config, chosen.overrides)
        start = time.perf_counter()
        bits = ngram_bits_per_byte(train, validation, chosen.orders)
    except ValueError as error:
        return complain("ngram_baseline", str(error))
    report.rows += [
        {"order": order, "bits_per_byte": value, "train_bytes": len(train), "validation_bytes": len(validation)}
        for order, value in bits.items()
    ]
    report.print_table()
    print(f"{time.perf_counter() - start:.1f} s")
    if out is not None:
        report.write(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
