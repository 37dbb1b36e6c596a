"""A second thing to learn from pictures: what is in each patch of the tower. It is there in training alone.

Answers say little of where things are, and a tower that learns from them alone needs many more pictures until it sees
anything.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.models import MultimodalLM, PictureEncoder


class WithPatchHead(nn.Module):
    """What is trained, and a linear head on the vectors of the tower's patches.

    kinds: of objects; the head has one number more, for patches without an object.
    """

    def __init__(self, trained: MultimodalLM | PictureEncoder, kinds: int) -> None:
        super().__init__()
        self.trained = trained
        self.head = nn.Linear(self.encoder.config.vision.model_dim, kinds + 1)

    @property
    def encoder(self) -> PictureEncoder:
        """Tower and projector."""
        return self.trained.pictures if isinstance(self.trained, MultimodalLM) else self.trained

    def seen(self, images_BCHW: Tensor, kinds_BP: Tensor) -> tuple[Tensor, Tensor]:
        """(vectors_BMD of the pictures, the mean over patches of the cross entropy in nats). kinds_BP: as
        `SceneWorld.patch_kinds` says."""
        patches_BPD = self.encoder.vision(images_BCHW)
        logits_BPK = self.head(patches_BPD).float()
        return self.encoder.project(patches_BPD), F.cross_entropy(logits_BPK.flatten(0, 1), kinds_BP.flatten())

    def matrix_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Those of what is trained, without the head."""
        return [(f"trained.{name}", weight) for name, weight in self.trained.matrix_parameters()]
