"""What else is learned from pictures, in training alone: what is in each patch, and where each thing is that is named.

A language model that is frozen already knows its words: there the vectors of pictures learn to be like the embeddings
of the names of what they show, which its heads that look for repeated words then find.

Answers say little of where things are. From answers alone a tower needs many pictures until it sees anything, and a
decoder does not learn to look for what it is asked about: yes and no are one bit.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.models import DecoderLM, MultimodalLM, PictureEncoder
from train.data.base import Batch

SHARPNESS, NOTHING = 20.0, 0.3
"""By which cosines are multiplied before the softmax over names, and the cosine that "nothing is shown" stands for."""


class WithSceneHeads(nn.Module):
    """What is trained, with linear heads: one tells the kind of object from a patch's vector in the tower; one tells,
    from the vector of a word that names a kind, behind the first half of the decoder's layers, which patches show it.
    A third loss has no weights of its own: of all names' embeddings the nearest to a picture's vector is to be that of
    what it shows.

    names: tokens of the name of each kind of object. patch_loss, word_loss, name_loss: weights of the losses; without
    weight there is no head. Words are learned where the decoder is trained, too.
    """

    def __init__(
        self,
        trained: MultimodalLM | PictureEncoder,
        *,
        names: Sequence[Sequence[int]],
        patch_loss: float,
        word_loss: float,
        name_loss: float,
    ) -> None:
        super().__init__()
        self.trained, self.patch_loss, self.word_loss, self.name_loss = trained, patch_loss, word_loss, name_loss
        self.names, kinds = names, len(names)
        tower, nothing = self.encoder.config.vision, 1
        self.patch_head = nn.Linear(tower.model_dim, kinds + nothing) if patch_loss else None
        self.word_head = nn.Linear(self.encoder.config.width, tower.patches) if word_loss else None

    @property
    def encoder(self) -> PictureEncoder:
        """Tower and projector."""
        return self.trained.pictures if isinstance(self.trained, MultimodalLM) else self.trained

    def answered(self, whole: MultimodalLM, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """(logits_AV and targets_A as `MultimodalLM.target_logits` gives them, the weighted sum of the other losses, a
        mean over pictures). whole: the model that answers. batch: one of a `SceneStream`."""
        images_BCHW, tokens_BT, targets_BT, _, kinds_BP, named_BT = batch
        patches_BPD = self.encoder.vision(images_BCHW)
        vectors_BMD = self.encoder.project(patches_BPD)
        other = torch.zeros((), device=patches_BPD.device)
        if self.patch_head is not None:
            logits_BPK = self.patch_head(patches_BPD).float()
            other = other + self.patch_loss * F.cross_entropy(logits_BPK.flatten(0, 1), kinds_BP.flatten())
        if self.name_loss:
            other = other + self.name_loss * self._named(vectors_BMD, kinds_BP, whole.decoder)
        with _behind_half(whole.decoder) as seen:
            logits_AV, targets_A = whole.target_logits(tokens_BT, targets_BT, vectors_BMD)
        if self.word_head is not None:
            other = other + self.word_loss * self._found(seen[0], named_BT, kinds_BP)
        return logits_AV, targets_A, other

    def _found(self, x_BTD: Tensor, named_BT: Tensor, kinds_BP: Tensor) -> Tensor:
        """The binary cross entropy of a word's patches in nats, summed over patches, a mean over a picture's words and
        then over pictures, however they are cut into batches."""
        assert self.word_head is not None
        rows_W, at_W = torch.nonzero(named_BT >= 0, as_tuple=True)
        logits_WP = self.word_head(F.rms_norm(x_BTD[rows_W, at_W], x_BTD.shape[-1:])).float()
        shown_WP = kinds_BP[rows_W] == named_BT[rows_W, at_W][:, None]
        losses_W = F.binary_cross_entropy_with_logits(logits_WP, shown_WP.float(), reduction="none").sum(-1)
        words_B = (named_BT >= 0).sum(1)
        return (losses_W / words_B[rows_W]).sum() / len(named_BT)

    def _named(self, vectors_BMD: Tensor, kinds_BP: Tensor, decoder: DecoderLM) -> Tensor:
        """The cross entropy in nats of what each vector shows: the kind that most of its patches show, if any does.

        Vectors are compared by their direction alone with what tells a name's embedding (the mean of its tokens') from
        those of the others, so that a vector's size, and what else it says, is free."""
        device = vectors_BMD.device
        embedded = [decoder.embed(torch.tensor([name], device=device))[0].mean(0) for name in self.names]
        names_KD = torch.stack(embedded).float()
        names_KD = F.normalize(names_KD - names_KD.mean(0), dim=-1)
        cosines_BMK = F.normalize(vectors_BMD.float(), dim=-1) @ names_KD.T
        logits_BMK = SHARPNESS * F.pad(cosines_BMK, (0, 1), value=NOTHING)
        shown_BM = self._shown(kinds_BP, logits_BMK.shape[-1])
        return F.cross_entropy(logits_BMK.flatten(0, 1), shown_BM.flatten())

    def _shown(self, kinds_BP: Tensor, classes: int) -> Tensor:
        """What a projector's vectors show of what patches show."""
        side, grid = self.encoder.config.vision.side, self.encoder.config.projector.grid
        maps_BKGG = F.one_hot(kinds_BP, classes).float().mT.unflatten(2, (side, side))
        shares_BKM = F.adaptive_avg_pool2d(maps_BKGG, grid or side).flatten(2)
        shares_BKM[:, -1] /= 2  # a third of a vector's patches is enough to be shown
        return shares_BKM.argmax(1)

    def matrix_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Those of what is trained, without the heads."""
        return [(f"trained.{name}", weight) for name, weight in self.trained.matrix_parameters()]


@contextmanager
def _behind_half(decoder: DecoderLM) -> Iterator[list[Tensor]]:
    """x_BTD behind the first half of the layers (one more where they are odd), once for each run of the decoder."""
    seen: list[Tensor] = []
    block = decoder.layers()[(len(decoder.layers()) - 1) // 2]
    handle = block.register_forward_hook(lambda module, inputs, output: seen.append(output))
    try:
        yield seen
    finally:
        handle.remove()
