r"""One prompt, four caches: what each of them keeps, what it takes, and what the model then remembers.

    python examples/smaller_cache.py              # SmolLM2, which `make install` has installed
    python examples/smaller_cache.py runs/demo    # or a checkpoint of your own

prints, for SmolLM2,

    who lives where, 100 tokens, and then once more from the beginning; the model goes on:
    full         115 tokens  100%  ' lives in Cairo. David lives in Lima. Elena lives in Tokyo. Felix'
    d2o           50 tokens   45%  ' lives in Cairo. Clara lives in Tokyo. Clara lives in Oslo. Clara lives'
    snapkv        65 tokens   57%  ' lives in Cairo. David lives in Quito.\n\nWhat is the weather'
    streaming     50 tokens   45%  ' lives in Lisbon. Leo lives in Lisbon. Leo lives in Dublin. The weather'

with the bytes of the full cache as 100 %.
"""

import sys

import attnzoo

CACHES = ("full", "d2o", "snapkv", "streaming")
HALF = {"keep_ratio": 0.5, "min_tokens": 8}
"""Options of all caches but the full one; min_tokens is 64 by default, which would keep most of so short a prompt."""
HOMES = {
    "Anna": "Lisbon",
    "Bruno": "Oslo",
    "Clara": "Cairo",
    "David": "Lima",
    "Elena": "Tokyo",
    "Felix": "Quito",
    "Greta": "Delhi",
    "Hugo": "Rome",
    "Irene": "Seoul",
    "Jonas": "Accra",
    "Karla": "Paris",
    "Leo": "Dublin",
}


def main(checkpoint: str = "smollm2") -> None:
    """Lets the model repeat a list, which it can do as far as its cache has kept it."""
    lm = attnzoo.load(checkpoint)
    facts = [f"{name} lives in {city}." for name, city in HOMES.items()]
    pause = "The weather was fine, and they all met for dinner in the old town, where they talked until late."
    prompt = " ".join([*facts, pause, *facts[:2], "Clara"])
    tokens = len(lm.encode(prompt))
    print(f"who lives where, {tokens} tokens, and then once more from the beginning; the model goes on:")
    for policy in CACHES:
        cache = policy if policy == "full" else {"policy": policy, **HALF}
        answer = lm.generate(prompt, max_new_tokens=16, cache=cache)
        used = answer.cache  # kv_bytes and kv_bytes_full say it in bytes
        share = used.kv_bytes / used.kv_bytes_full
        print(f"{policy:10} {used.kept_tokens:5} tokens {share:5.0%}  {answer.text!r}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
