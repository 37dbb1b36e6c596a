"""Models of type LLaVA as transformers writes them: logits agree, padded and with several pictures, and cached."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from attnzoo.checkpoint import load_llava, load_model
from attnzoo.models import MultimodalLM
from attnzoo.ops.common.masks import padding_starts

IMAGE, PLACES = 96, 9


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory):
    """(transformers' model, the directory that it wrote)."""
    transformers = pytest.importorskip("transformers")
    vision = {
        "hidden_size": 20,
        "intermediate_size": 44,
        "num_hidden_layers": 3,
        "num_attention_heads": 5,
        "image_size": 21,
        "patch_size": 7,
    }
    text = {
        "vocab_size": 97,
        "hidden_size": 24,
        "intermediate_size": 52,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    }
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision).to_dict(),
        text_config=transformers.LlamaConfig(**text).to_dict(),
        image_token_index=IMAGE,
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    for parameter in model.parameters():  # large weights, so that every part matters
        parameter.data += 0.2 * torch.randn_like(parameter)
    directory = tmp_path_factory.mktemp("llava")
    model.save_pretrained(directory)
    return model, directory


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(left-padded tokens of three rows with one, two and no pictures, which of them exist, the pictures)."""
    random = torch.Generator().manual_seed(1)
    rows = [
        [1, 5, *[IMAGE] * PLACES, 7, 8, 9],
        [1, *[IMAGE] * PLACES, 3, 4, *[IMAGE] * PLACES, 11],
        [1, 2, 3, 4],
    ]
    longest = max(map(len, rows))
    tokens = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    real = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]).bool()
    return tokens, real, torch.randn(3, 3, 21, 21, generator=random)


@torch.no_grad()
def test_logits_agree_with_left_padding_and_several_pictures(saved) -> None:
    theirs, directory = saved
    ours = load_llava(directory)
    tokens, real, images = batch()
    positions = (real.long().cumsum(1) - 1).clamp_min(0)
    wanted = theirs(input_ids=tokens, pixel_values=images, attention_mask=real.long(), position_ids=positions).logits
    starts = padding_starts(real.sum(1), tokens.shape[1], "left")
    found = ours(tokens, images, starts)
    torch.testing.assert_close(found[real], wanted[real], rtol=0, atol=1e-4)
    assert wanted[real].std() > 0.3
    other = ours(tokens, images.flip(0), starts)  # the pictures matter, and only where they are
    assert (other[:2] - found[:2])[real[:2]].abs().max() > 0.1
    torch.testing.assert_close(other[2], found[2], rtol=0, atol=1e-5)
    # Other versions write other names; 8-bit pictures are standardised as CLIP's processor does it.
    pixels = torch.randint(0, 256, (1, 3, 21, 21), dtype=torch.uint8)
    mean, std = torch.tensor(ours.pictures.config.vision.mean), torch.tensor(ours.pictures.config.vision.std)
    scaled = (pixels / 255 - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(ours.pictures(pixels), ours.pictures(scaled), rtol=0, atol=1e-5)


@torch.no_grad()
def test_cached_decoding_is_the_whole_forward(saved) -> None:
    """Prompts of unequal length with pictures, padded at their ends, then token by token."""
    ours = load_llava(saved[1])
    tokens, real, images = batch()
    lengths = real.sum(1)
    prompts = torch.zeros_like(tokens)
    for row, length in enumerate(lengths):
        prompts[row, :length] = tokens[row][real[row]]
    state = ours.init_state(3, 40)
    first, state = ours.extend(prompts, state, lengths, images=images)
    rest = torch.tensor([[13, 14, 15], [16, 17, 18], [19, 20, 21]])
    parts = []
    for token in rest.T:
        out, state = ours.extend(token[:, None], state)
        parts.append(out)
    pictures = [images[:1], images[1:3], None]
    for row, length in enumerate(lengths):
        whole = ours(torch.cat([prompts[row, :length], rest[row]])[None], pictures[row])[0]
        torch.testing.assert_close(first[row, :length], whole[:length], rtol=0, atol=1e-5)
        torch.testing.assert_close(torch.cat(parts, 1)[row], whole[length:], rtol=0, atol=1e-5)


def changed(directory: Path, target: Path, *, tensors=None, **config) -> Path:
    """A copy of the directory with other keys of config.json ("a.b": in a section) and other tensors."""
    content = json.loads((directory / "config.json").read_text())
    for key, value in config.items():
        *sections, last = key.split("__")
        place = content
        for section in sections:
            place = place[section]
        place[last] = value
    target.mkdir()
    (target / "config.json").write_text(json.dumps(content))
    weights = load_file(directory / "model.safetensors")
    save_file(tensors(weights) if tensors else weights, target / "model.safetensors")
    return target


@torch.no_grad()
def test_names_of_other_versions_are_read_and_what_has_no_counterpart_is_refused(saved, tmp_path: Path) -> None:
    _theirs, directory = saved
    tokens, _, images = batch()
    row = tokens[1:2]
    ours = load_llava(directory)

    def older(weights):
        return {name.replace("vision_tower.", "vision_tower.vision_model."): value for name, value in weights.items()}

    def newer(weights):
        renamed = {name.replace("language_model.model.", "language_model."): v for name, v in weights.items()}
        return {
            name.replace("language_model.lm_head", "lm_head") if "lm_head" in name else f"model.{name}": value
            for name, value in renamed.items()
        }

    for number, names in enumerate((older, newer)):
        other = load_llava(changed(directory, tmp_path / f"names{number}", tensors=names), dtype=torch.float32)
        assert isinstance(other, MultimodalLM)
        assert torch.equal(other(row, images[1:]), ours(row, images[1:]))
    for number, (config, message) in enumerate((
        ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy='full' is not supported"),
        ({"vision_feature_layer": -9}, "vision_feature_layer=-9 must be one of the tower's 3 layers"),
        ({"vision_feature_layer": [-2, -1]}, r"vision_feature_layer=\[-2, -1\] must be one of"),
        ({"vision_config__model_type": "siglip_vision_model"}, "vision_config.model_type='siglip_vision_model'"),
        ({"text_config__model_type": "gemma"}, "model_type='gemma' is not supported"),
        ({"vision_config__patch_size": 8}, "image_size=21 is not a multiple of patch_size=8"),
        ({"vision_config__hidden_size": 25}, "do not fit the configuration"),
        ({"image_token_index": None}, "image_token_index=None must be the id"),
        ({"model_type": "llama"}, "model_type='llama' is not 'llava'"),
    )):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            load_llava(changed(directory, tmp_path / f"wrong{number}", **config))

    def broken(weights):
        weights["multi_modal_projector.linear_1.weight"][2, 3] = float("nan")
        return weights

    with pytest.raises(ValueError, match=r"linear_1.weight .*(nan|NaN)"):
        load_llava(changed(directory, tmp_path / "nan", tensors=broken))
    with pytest.raises(ValueError, match="does not exist; give a directory written by transformers"):
        load_llava(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"model_type='llava' reads pictures; load it with .*load_llava"):
        load_model(directory)
    with pytest.raises(ValueError, match=r"18 placeholders \(token 96\) and images has 1 pictures; a picture takes 9"):
        ours(row, images[:1])
    with pytest.raises(ValueError, match=r"0 placeholders .* and images has 1 pictures"):
        ours(tokens[2:], images[:1])
    with pytest.raises(ValueError, match=r"images have shape \(1, 3, 20, 21\); give 3 channels of 21 x 21"):
        ours.pictures(images[:1, :, 1:])
    with pytest.raises(ValueError, match=r"images are of torch.int64; give 8-bit pictures"):
        ours.pictures(images[:1].long())
