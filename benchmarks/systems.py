"""The systems that are compared, behind one surface. Each is imported in its own environment only.

A system is opened from a folder of `folders.py`; `rank` is what its users call, from text to scores.
"""

from collections.abc import Sequence
from typing import Any

import torch

LEARNING_RATE = 1e-5


class System:
    """One re-ranker.

    Args:
        folder: its weights, in its own format.
        dtype: of the weights where it ranks; where it trains, weights stay float32 and `bfloat16` means autocast.
        training: whether it is opened to train.
    """

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer | None = None

    def __init__(self, folder: str, dtype: str, training: bool) -> None:
        self.dtype = dtype
        self.load(folder, torch.float32 if training else getattr(torch, dtype))
        if training:
            self.model.train()
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE)

    def load(self, folder: str, dtype: torch.dtype) -> None:
        raise NotImplementedError

    def rank(self, query: str, passages: Sequence[str]) -> Any:
        """Return the system's own answer; [`scores`] reads it."""
        raise NotImplementedError

    def scores(self, answer: Any) -> list[float]:
        """Return the scores of an answer in the order of the passages."""
        raise NotImplementedError

    def loss(self, queries: Sequence[str], passages: Sequence[Sequence[str]], labels: torch.Tensor) -> torch.Tensor:
        """Return the RankNet loss of lists of one size; `labels` are [queries, passages]."""
        raise NotImplementedError

    def train_step(
        self, queries: Sequence[str], passages: Sequence[Sequence[str]], labels: Sequence[Sequence[float]]
    ) -> float:
        """Take one step, tokenising included, and return the loss before it."""
        assert self.optimizer is not None
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == "bfloat16"):
            loss = self.loss(queries, passages, torch.tensor(labels))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    @torch.no_grad()
    def plain_loss(
        self, queries: Sequence[str], passages: Sequence[Sequence[str]], labels: Sequence[Sequence[float]]
    ) -> float:
        """Return the loss without dropout, which is the same in every system that computes the same."""
        self.model.eval()
        loss = self.loss(queries, passages, torch.tensor(labels)).item()
        self.model.train()
        return loss


class SetEncHF(System):
    """This project."""

    def __init__(self, folder: str, dtype: str, training: bool) -> None:
        if dtype == "auto":
            from setenc_hf.rerank import choose_dtype

            dtype = str(choose_dtype("auto", torch.device("cpu"))).removeprefix("torch.")
        super().__init__(folder, dtype, training)

    def load(self, folder: str, dtype: torch.dtype) -> None:
        from setenc_hf import ListwiseCollator, SetEncoderForReranking, SetEncoderTokenizer
        from setenc_hf.losses import RankNetLoss

        self.model = SetEncoderForReranking.from_pretrained(folder, dtype=dtype)
        self.model.eval()
        self.collator = ListwiseCollator(SetEncoderTokenizer.from_pretrained(folder))
        self.ranknet = RankNetLoss()

    def rank(self, query: str, passages: Sequence[str]) -> Any:
        return self.model.rank(query, passages)  # type: ignore[operator]

    def scores(self, answer: Any) -> list[float]:
        return [row["score"] for row in sorted(answer, key=lambda row: row["index"])]

    def loss(self, queries: Sequence[str], passages: Sequence[Sequence[str]], labels: torch.Tensor) -> torch.Tensor:
        batch = self.collator(
            [{"query": query, "passages": texts, "labels": row} for query, texts, row in zip(queries, passages, labels)]
        )
        targets = batch.pop("labels")
        return self.ranknet(self.model(**batch).logits, targets)


class LightningIR(System):
    """lightning-ir's own Set-Encoder."""

    def load(self, folder: str, dtype: torch.dtype) -> None:
        from lightning_ir import CrossEncoderModule, RankNet

        self.module = CrossEncoderModule(model_name_or_path=folder, model_kwargs={"torch_dtype": dtype})
        self.module.eval()
        self.model = self.module.model
        if self.module.config.sample_missing_docs:
            raise ValueError(f"{folder}: with sample_missing_docs the scores are drawn at random; it must be off")
        self.ranknet = RankNet()

    def rank(self, query: str, passages: Sequence[str]) -> Any:
        return self.module.score(query, passages).scores.tolist()

    def scores(self, answer: Any) -> list[float]:
        return answer

    def loss(self, queries: Sequence[str], passages: Sequence[Sequence[str]], labels: torch.Tensor) -> torch.Tensor:
        from lightning_ir import TrainBatch

        batch = TrainBatch(queries, passages, targets=labels)
        output = self.module(batch)
        output.scores = output.scores.view(labels.shape)
        return self.ranknet.compute_loss(output, batch)


class SentenceTransformers(System):
    """sentence-transformers' pointwise CrossEncoder: each passage on its own, sorted by length into batches of 32."""

    def load(self, folder: str, dtype: torch.dtype) -> None:
        from sentence_transformers import CrossEncoder

        self.model = CrossEncoder(folder, num_labels=1, device="cpu", model_kwargs={"dtype": dtype})

    def rank(self, query: str, passages: Sequence[str]) -> Any:
        return self.model.rank(query, passages, show_progress_bar=False)  # type: ignore[operator]

    def scores(self, answer: Any) -> list[float]:
        return [float(row["score"]) for row in sorted(answer, key=lambda row: row["corpus_id"])]


SYSTEMS: dict[str, type[System]] = {
    "setenc_hf": SetEncHF,
    "lightning-ir": LightningIR,
    "sentence-transformers": SentenceTransformers,
}
