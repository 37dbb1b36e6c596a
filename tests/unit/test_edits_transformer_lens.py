"""An edit of attention patterns beside the same edit as a hook of TransformerLens, on a small random Llama.

TransformerLens is no dependency: CONTRIBUTING.md says how to run this beside it.
"""

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from attnzoo.attention.edits import EditRun, Edits, Map, Scale, TokenLayout, Where
from tests.helpers.open_weights import saved

lens = pytest.importorskip("transformer_lens", reason="TransformerLens is not installed (CONTRIBUTING.md, 'Tests')")

LAYOUT = TokenLayout(9, {"image": (2, 6)})
TOKENS = torch.randint(0, 131, (2, 14), generator=torch.Generator().manual_seed(0))


def raised(pattern, hook):
    """Three times the weight on the image in heads 1 and 4, rows keep their sums."""
    steered = pattern.clone()
    steered[..., 2:6] *= 3.0
    pattern = pattern.clone()
    pattern[:, [1, 4]] = (steered / steered.sum(-1, keepdim=True))[:, [1, 4]]
    return pattern


@torch.no_grad()
def test_a_hook_on_patterns_is_our_edit(tmp_path):
    """Maps without the edit, and logits with it, as a whole and in chunks."""
    theirs, ours = saved("llama", tmp_path)
    theirs, ours = theirs.eval(), ours.eval()
    plain = theirs(TOKENS).logits
    words = Tokenizer(WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>"))  # asked for, and not used
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="</s>")
    bridge = lens.TransformerBridge.boot_transformers("llama", hf_model=theirs, tokenizer=tokenizer, device="cpu")
    _, cache = bridge.run_with_cache(TOKENS)
    runs = [EditRun(ours.plan_edits(Edits(Map(dtype="fp32")), LAYOUT, 5)) for _ in TOKENS]
    ours(TOKENS, edits=runs)
    for layer in range(ours.config.num_layers):
        for row, run in enumerate(runs):
            expected = cache[f"blocks.{layer}.attn.hook_pattern"][row]
            torch.testing.assert_close(run.reading[layer].map, expected, rtol=0, atol=1e-4)
    hooks = [(f"blocks.{layer}.attn.hook_pattern", raised) for layer in (0, 2)]
    expected = bridge.run_with_hooks(TOKENS, fwd_hooks=hooks)
    assert (expected - plain).abs().max() > 0.01
    edits = Edits(Scale(Where(layers=[0, 2], heads=[1, 4], keys="image"), 3.0))
    runs = [EditRun(ours.plan_edits(edits, LAYOUT, 5)) for _ in TOKENS]
    torch.testing.assert_close(ours(TOKENS, edits=runs), expected, rtol=1e-4, atol=1e-4)
    state, outs, runs = ours.init_state(2, 14), [], [EditRun(ours.plan_edits(edits, LAYOUT, 5)) for _ in TOKENS]
    for chunk in TOKENS.split([9, 1, 4], dim=1):
        out, state = ours.extend(chunk, state, edits=runs)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), expected, rtol=1e-4, atol=1e-4)
