"""A decoder that reads pictures: any variant in the tower and the decoder, the projector's sizes, caches."""

import pytest
import torch

from attnzoo.kvcache import CACHES, build_cache
from attnzoo.models import DecoderConfig, MultimodalLM, PictureConfig, PictureEncoder, VisionConfig, ViT

VISION = {"image_size": 20, "patch_size": 5, "model_dim": 12, "num_layers": 2}
V = 47


def model(attention="mha", tower="mha", **projector) -> MultimodalLM:
    torch.manual_seed(0)
    heads = {"position": "none"} if tower == "mha" else {}
    vision = {**VISION, "attention": {"kind": tower, "num_heads": 2, **heads}}
    decoder = {"vocab_size": V, "model_dim": 24, "num_layers": 2, "max_positions": 64, "attention": attention}
    made = MultimodalLM.build(vision, projector, DecoderConfig.from_dict(decoder)).double().eval()
    for parameter in made.decoder.parameters():  # large weights, so that every token matters
        parameter.data += 0.3 * torch.randn_like(parameter)
    return made


def pictures(count: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 20, 20), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("tower", ["mha", "tscan"])
@torch.no_grad()
def test_patches_see_each_other_and_know_their_places(tower: str) -> None:
    vit = model(tower=tower).pictures.vision
    image = pictures(1)
    changed = image.clone()
    changed[..., -5:, -5:] = 255 - changed[..., -5:, -5:]  # the last patch
    before, after = vit(image), vit(changed)
    assert before.shape == (1, 16, 12)
    assert ((before - after).abs().amax(-1) > 1e-9).all()
    # A patch is what a convolution of that stride sees.
    weight = vit.patch.weight.unflatten(1, (3, 5, 5))
    numbers = (image.double() / 255 - 0.5) / 0.25
    seen = torch.nn.functional.conv2d(numbers, weight, vit.patch.bias, stride=5)[0].flatten(1).T
    own = vit.patch(vit._cut(numbers))[0]
    torch.testing.assert_close(own, seen, rtol=0, atol=1e-12)
    swapped = torch.cat([image[..., 5:10, :], image[..., :5, :], image[..., 10:, :]], dim=2)
    moved = torch.cat([before[:, 4:8], before[:, :4], before[:, 8:]], dim=1)
    assert (vit(swapped) - moved).abs().max() > 1e-4


@torch.no_grad()
def test_a_projector_sets_the_size_of_its_vectors() -> None:
    unit = 0.02
    for hidden in (None, 64):
        found = {}
        for output in ("plain", "small", "normalised"):
            torch.manual_seed(1)
            values = {"vision": VISION, "projector": {"hidden": hidden, "output": output}, "width": 96, "unit": unit}
            encoder = PictureEncoder(PictureConfig.from_dict(values))
            found[output] = encoder(pictures(3)).square().mean(-1).sqrt()
        torch.testing.assert_close(found["normalised"], torch.full((3, 16), unit), rtol=1e-2, atol=0)
        assert 0.75 * unit < found["plain"].mean() < 1.35 * unit
        torch.testing.assert_close(10 * found["small"], found["plain"], rtol=1e-4, atol=0)
    values = {"vision": VISION, "projector": {"grid": 2}, "width": 24, "unit": unit}
    pooled = PictureEncoder(PictureConfig.from_dict(values)).double()
    assert pooled.config.tokens == 4
    patches = pooled.vision(pictures(2)).view(2, 2, 2, 2, 2, 12).mean((2, 4))
    torch.testing.assert_close(pooled(pictures(2)), pooled.output(patches.flatten(1, 2)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("attention", ["mha", "rcmha", ["rmha", "linear"]], ids=str)
@torch.no_grad()
def test_pictures_stream_as_they_are_read_at_once(attention) -> None:
    """In chunks that cut the text at any place but within a picture; targets alone get logits."""
    lm, images = model(attention, grid=2), pictures(3)
    image = [lm.image_token] * 4
    rows = torch.tensor([[1, 2, *image, 3, 4, 5, 6, 7, 8, 9], [1, *image, 5, *image, 6, 7, 8]])
    whole, state, parts = lm(rows, images), lm.init_state(2, 13), []
    for part, seen in ((rows[:, :11], images), (rows[:, 11:12], None), (rows[:, 12:], None)):
        logits, state = lm.extend(part, state, images=seen)
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-10)
    targets = torch.full_like(rows, -100)
    targets[0, 9:11], targets[1, 10] = torch.tensor([5, 6]), 7
    logits, wanted = lm.target_logits(rows, targets, images)
    assert wanted.tolist() == [5, 6, 7]
    torch.testing.assert_close(logits, torch.stack([whole[0, 9], whole[0, 10], whole[1, 10]]), rtol=0, atol=1e-10)
    torch.testing.assert_close(lm(rows, lm.pictures(images)), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("policy", [name for name in CACHES if name not in ("full", "none")])
@torch.no_grad()
def test_caches_compress_pictures_as_tokens(policy: str) -> None:
    """A picture's vectors are kept, dropped and merged as if they were embeddings of tokens."""
    lm, images = model(grid=2), pictures(2)
    rows = torch.tensor([[1, 2, *[V] * 4, 3, 4, 5, 6]] * 2)
    options = {"keep_ratio": 0.5} if "keep_ratio" in CACHES.get(policy).Config.__dataclass_fields__ else {}
    outputs = []
    for x, seen in ((rows, images), (lm.embed(rows, images), None)):
        state = lm.init_state(2, 16, cache=build_cache(policy, options))
        read = lm.extend(x, state, images=seen) if seen is not None else lm.decoder.extend(x, state)
        outputs.append(lm.extend(torch.tensor([[7], [8]]), lm.decoder.compress(read[1]))[0])
    assert torch.equal(*outputs)


def test_gradients_reach_every_weight() -> None:
    lm = model(hidden=9).train()
    rows = torch.tensor([[1, 2, *[V] * 16, 3, 4]])
    logits, _ = lm.target_logits(rows, torch.full_like(rows, 3), pictures(1))
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in lm.pictures.parameters())
    taken = {id(weight) for _, weight in lm.matrix_parameters()}
    assert {id(lm.pictures.hidden.weight), id(lm.pictures.vision.patch.weight)} <= taken
    assert id(lm.decoder.embedding.weight) not in taken


def test_what_makes_no_tower_is_refused() -> None:
    for values, message in (
        ({"image_size": 21}, "vision.image_size=21 is not a multiple of patch_size=5"),
        ({"mean": [0.5]}, r"vision.mean=\(0.5,\) needs 3 numbers, one a channel"),
        ({"std": [0.5, 0.0, 1.0]}, r"vision.std=.* must be above 0"),
        ({"num_layers": 0}, "vision.num_layers=0 must be at least 1"),
        ({"attention": {"kind": "mhaa"}}, "unknown attention 'mhaa'; did you mean 'mha'"),
        ({"atention": "mha"}, "unknown key model.vision.atention; did you mean 'attention'"),
    ):
        with pytest.raises(ValueError, match=message):
            VisionConfig.from_dict({**VISION, **values})
    with pytest.raises(ValueError, match=r"model.vision.attention: 'linear' hides later tokens"):
        ViT(VisionConfig.from_dict({**VISION, "attention": {"kind": "linear", "num_heads": 2}}))
    with pytest.raises(ValueError, match=r"projector.grid=5 is more than the 4 patches along a side"):
        model(grid=5)
    with pytest.raises(ValueError, match="pictures of width 24 do not fit a decoder of model_dim=12"):
        MultimodalLM(model().pictures, MultimodalLM.build(VISION, {}, DecoderConfig(
            vocab_size=5, model_dim=12, num_layers=1)).decoder)  # fmt: skip
