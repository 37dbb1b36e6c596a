"""A client of a server of attnzoo, by OpenAI's own package: a stream, several texts at once, a smaller cache.

    attnzoo serve --checkpoint runs/demo                          # in another terminal
    python examples/openai_client.py http://127.0.0.1:8000

prints, with texts that depend on the model,

    model: 'demo'
    stream: '...'
    one of three at once: '...'
    one of three at once: '...'
    one of three at once: '...'
    cache full: kept 216 tokens, 1,371,648 bytes
    cache d2o: kept 105 tokens, 694,720 bytes
"""

import sys
from concurrent.futures import ThreadPoolExecutor

from openai import APIConnectionError, OpenAI

PROMPTS = ("def read(", "class Reader:", "import os")


def main(url: str = "http://127.0.0.1:8000") -> None:
    """Asks the server at `url`; what it takes beyond OpenAI's fields goes through extra_body."""
    client = OpenAI(base_url=f"{url}/v1", api_key="none")  # the key where the server was started with api_key_env
    model = client.models.list().data[0].id
    print(f"model: {model!r}")

    stream = client.completions.create(model=model, prompt=PROMPTS[0], max_tokens=24, temperature=0, stream=True)
    print(f"stream: {''.join(chunk.choices[0].text for chunk in stream if chunk.choices)!r}")

    def complete(prompt: str) -> str:
        choice = client.completions.create(model=model, prompt=prompt, max_tokens=16, temperature=0).choices[0]
        return repr(choice.text)

    with ThreadPoolExecutor() as pool:  # the server computes them in one batch
        for text in pool.map(complete, PROMPTS):
            print(f"one of three at once: {text}")

    for cache in ({"policy": "full"}, {"policy": "d2o", "keep_ratio": 0.5}):
        answer = client.completions.create(
            model=model, prompt=", ".join(PROMPTS) * 8, max_tokens=8, temperature=0, extra_body={"cache": cache}
        )
        used = answer.usage.model_dump()["attnzoo"]
        print(f"cache {used['policy']}: kept {used['kept_tokens']} tokens, {used['kv_bytes']:,} bytes")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except APIConnectionError as error:
        sys.exit(f"no server answers ({error}); start one with: attnzoo serve --checkpoint runs/demo")
