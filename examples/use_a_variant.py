"""An attention variant in a network of your own: it trains as a whole, and reads a sequence in pieces.

    python examples/use_a_variant.py

prints the loss of a small task (say which token came three places before), and that both forms are one function; the
last digits differ from processor to processor:

    step   0: loss 3.53
    step  50: loss 1.29
    step 100: loss 0.00
    read in pieces of 1, 7, 20 and 36 tokens: the same predictions, largest difference 5.7e-06
    after 64 tokens its state takes 34,312 bytes
"""

import torch
from torch import Tensor, nn

import attnzoo

VOCABULARY, DIM, TOKENS, BACK = 29, 64, 64, 3


class Network(nn.Module):
    """Embedding, one layer of attention beside a residual path, and a prediction for every token."""

    def __init__(self, variant: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, DIM)
        self.norm = nn.LayerNorm(DIM)
        self.attention = attnzoo.attention(variant, model_dim=DIM, num_heads=4)  # a module like any other
        self.head = nn.Linear(DIM, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        """All tokens at once: [batch, tokens] to logits of [batch, tokens, vocabulary]."""
        x = self.embedding(tokens)
        return self.head(x + self.attention(self.norm(x)))

    def in_pieces(self, tokens: Tensor, lengths: list[int]) -> tuple[Tensor, int]:
        """The same, piece by piece, as text comes in; also the bytes of what is remembered at the end."""
        state = self.attention.init_state(len(tokens), capacity=tokens.shape[1])
        logits = []
        for piece in tokens.split(lengths, dim=1):
            x = self.embedding(piece)
            y, state = self.attention.extend(self.norm(x), state)
            logits.append(self.head(x + y))
        return torch.cat(logits, dim=1), state.nbytes()


def main() -> None:
    """Trains the network on sequences of random tokens, then compares its two forms."""
    torch.manual_seed(0)
    network = Network("rcmha")  # `attnzoo list` shows the others
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for step in range(101):
        tokens = torch.randint(VOCABULARY, (16, TOKENS))
        logits = network(tokens)[:, BACK:]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, :-BACK].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step:3}: loss {loss.item():.2f}")

    tokens = torch.randint(VOCABULARY, (1, TOKENS))
    with torch.inference_mode():
        whole = network(tokens)
        pieces, state_bytes = network.in_pieces(tokens, [1, 7, 20, 36])
    torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=1e-4)
    difference = (pieces - whole).abs().max().item()
    print(f"read in pieces of 1, 7, 20 and 36 tokens: the same predictions, largest difference {difference:.1e}")
    print(f"after {TOKENS} tokens its state takes {state_bytes:,} bytes")


if __name__ == "__main__":
    main()
