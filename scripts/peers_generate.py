"""Runs another engine in its own Python environment; scripts/bench_generate exchanges lines of JSON with it.

    python scripts/peers_generate.py llama.cpp MODEL_DIR --gguf FILE --prompt 512 --new 128 --batch 8
    python scripts/peers_generate.py ctranslate2 MODEL_DIR --prompt 512 --new 128 --batch 8

The environment needs xllamacpp and gguf, or ctranslate2, transformers and torch; this script imports nothing of
attnzoo. MODEL_DIR is an exported model in bfloat16. The script first prints {"ready": version}. Then it reads lines
{"prompts": [[ids]], "new": n} and answers each with {"seconds": s}.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

Generate = Callable[[list[list[int]], int], object]


def write_bfloat16(source: Path, target: Path) -> None:
    """Writes a GGUF file with the same metadata and with its quantised tensors dequantised to bfloat16."""
    import gguf

    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, architecture)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        kinds = field.types
        writer.add_key_value(name, field.contents(), kinds[0], sub_type=kinds[-1] if len(kinds) > 1 else None)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    half = gguf.GGMLQuantizationType.BF16
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        if len(tensor.shape) == 1:
            writer.add_tensor(tensor.name, values)
        else:
            writer.add_tensor(tensor.name, gguf.quantize(values, half), raw_dtype=half)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_cpp(options: argparse.Namespace) -> Generate:
    """llama.cpp's server in this process, with a slot for every sequence."""
    import xllamacpp

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model.gguf"
        write_bfloat16(options.gguf, path)
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_parallel = options.batch
        params.n_ctx = options.batch * (options.prompt + options.new + 8)
        params.n_batch = params.n_ubatch = 512
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options.threads
        params.cache_prompt = False
        params.verbosity = 0
        server = xllamacpp.Server(params)
    pool = ThreadPoolExecutor(options.batch)

    def one(prompt: list[int], new: int) -> int:
        request = {"prompt": prompt, "max_tokens": new, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        answer = server.handle_completions(request)
        made: int = answer["usage"]["completion_tokens"]
        assert made == new, answer
        return made

    return lambda prompts, new: list(pool.map(one, prompts, [new] * len(prompts)))


def ctranslate2(options: argparse.Namespace) -> Generate:
    """CTranslate2's generator on the converted model."""
    import ctranslate2 as library
    from ctranslate2.converters import TransformersConverter
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as directory:
        path = str(Path(directory) / "model")
        TransformersConverter(str(options.model)).convert(path, quantization=options.dtype)
        generator = library.Generator(path, device="cpu", compute_type=options.dtype, intra_threads=options.threads)

    tokenizer = AutoTokenizer.from_pretrained(options.model)

    def generate(prompts: list[list[int]], new: int) -> None:
        made = generator.generate_batch(
            [tokenizer.convert_ids_to_tokens(prompt) for prompt in prompts],
            max_length=new,
            min_length=new,
            beam_size=1,
            include_prompt_in_result=False,
        )
        assert all(len(result.sequences_ids[0]) == new for result in made)

    return generate


ENGINES = {"llama.cpp": (llama_cpp, "xllamacpp"), "ctranslate2": (ctranslate2, "ctranslate2")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("model", type=Path)
    parser.add_argument("--gguf", type=Path, help="the same model as a GGUF file (llama.cpp)")
    parser.add_argument("--dtype", default="bfloat16", help="compute type (ctranslate2)")
    parser.add_argument("--threads", type=int, default=2)
    for name in ("prompt", "new", "batch"):
        parser.add_argument(f"--{name}", type=int, required=True)
    options = parser.parse_args()
    build, package = ENGINES[options.engine]
    generate = build(options)
    print(json.dumps({"ready": version(package)}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        begin = time.perf_counter()
        generate(request["prompts"], request["new"])
        print(json.dumps({"seconds": time.perf_counter() - begin}), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
