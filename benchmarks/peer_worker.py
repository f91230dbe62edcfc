"""Train or re-rank with a peer, in the peer's own environment; started by `benchmarks.peers`.

python -m benchmarks.peer_worker train|rerank JOB.json
"""

import json
import random
import sys
import time
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SHARPNESS = 30.0  # softmax over labels 0 and 1 times this is one-hot to 1e-13
TextList = dict[str, Any]  # query, passages, labels


class LightningIR:
    """lightning-ir's Set-Encoder; as it ships, missing passages are drawn in training up to `depth`."""

    def __init__(self, job: dict[str, Any], training: bool) -> None:
        import lightning_ir

        stored = Path(job["model"]) / "config.json"
        is_trained = stored.exists() and json.loads(stored.read_text("utf-8")).get("model_type") == "set-encoder"
        config = None
        if not is_trained:
            from lightning_ir.models import SetEncoderConfig

            config = SetEncoderConfig(
                query_length=job["query_length"],
                doc_length=job["passage_length"],
                depth=job["depth"],
                add_extra_token=job["interaction"] == "int",
                sample_missing_docs=job["draws_missing"] is not False,
            )
        self.module = lightning_ir.CrossEncoderModule(model_name_or_path=job["model"], config=config)
        self.model = self.module.model
        if len(self.module.tokenizer) > self.model.get_input_embeddings().num_embeddings:
            # 0.0.6 adds [INT] to its cross-encoders' tokenizer but no row for it to a plain backbone
            self.model.resize_token_embeddings(len(self.module.tokenizer), 8)
        if training:
            set_attention_dropout(self.model, job["attention_dropout"])
            self.temperature = job["temperature"]
            losses = {
                "infonce": lightning_ir.InfoNCE,
                "ranknet": lightning_ir.RankNet,
                "kl_divergence": lightning_ir.KLDivergence,
                "margin_mse": lightning_ir.SupervisedMarginMSE,
            }
            self.objective = losses[job["loss"]]()
            self.scale = label_scale(job)

    def loss(self, lists: list[TextList]) -> Tensor:
        """Return the mean over lists of one size."""
        from lightning_ir import TrainBatch

        labels = torch.tensor([item["labels"] for item in lists]) * self.scale
        batch = TrainBatch([item["query"] for item in lists], [item["passages"] for item in lists], targets=labels)
        output = self.module(batch)
        output.scores = output.scores.view(labels.shape) / self.temperature
        return self.objective.compute_loss(output, batch)

    def scores(self, query: str, passages: list[str]) -> list[float]:
        if len(passages) > self.model.config.depth:
            raise ValueError(f"lightning-ir cannot score more than its depth of {self.model.config.depth} passages")
        return self.module.score(query, passages).scores.tolist()

    def save(self, folder: str) -> None:
        self.model.save_pretrained(folder)
        self.module.tokenizer.save_pretrained(folder)


class SentenceTransformers:
    """sentence-transformers' CrossEncoder with its own RankNet or MarginMSE, or its ListNet.

    ListNet's target is a distribution: of the relevant passage alone for InfoNCE, of the teacher's scores for the KL
    divergence, from which it differs by a constant. MarginMSE learns the margins of one passage to the others, here
    those of the teacher's best; ours and lightning-ir's are of every pair.
    """

    def __init__(self, job: dict[str, Any], training: bool) -> None:
        from sentence_transformers import CrossEncoder
        from sentence_transformers.cross_encoder.losses import ListNetLoss, MarginMSELoss, RankNetLoss

        length = job["query_length"] + job["passage_length"] + 3
        # in bfloat16 torch's fused attention is the slower one on CPUs: its backward pass took 31 % of a step
        options = {"attn_implementation": "eager"} if job.get("bf16") else {}
        self.model = CrossEncoder(job["model"], num_labels=1, max_length=length, device="cpu", model_kwargs=options)
        if training:
            set_attention_dropout(self.model, job["attention_dropout"])
            self.scale = SHARPNESS if job["loss"] == "infonce" else label_scale(job)
            loss = {"ranknet": RankNetLoss, "margin_mse": MarginMSELoss}.get(job["loss"], ListNetLoss)
            self.objective = loss(self.model, activation_fn=Divide(job["temperature"]))
            self.of_columns = loss is MarginMSELoss

    def loss(self, lists: list[TextList]) -> Tensor:
        """Return the loss of lists of one size, as the library averages it."""
        if self.of_columns:
            lists = [best_first(item) for item in lists]
        labels = [torch.tensor(item["labels"]) * self.scale for item in lists]
        passages = [item["passages"] for item in lists]
        columns = [list(column) for column in zip(*passages)] if self.of_columns else [passages]
        return self.objective([[item["query"] for item in lists], *columns], labels)

    def scores(self, query: str, passages: list[str]) -> list[float]:
        pairs = [(query, passage) for passage in passages]
        return self.model.predict(pairs, activation_fn=nn.Identity(), show_progress_bar=False).tolist()

    def save(self, folder: str) -> None:
        self.model.save_pretrained(folder)


PEERS: dict[str, Any] = {"lightning-ir": LightningIR, "sentence-transformers": SentenceTransformers}


class Divide(nn.Module):
    """Divides scores by a temperature before the loss."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, scores: Tensor) -> Tensor:
        return scores / self.by


def label_scale(job: dict[str, Any]) -> float:
    """Return what labels are multiplied by: our KL divergence divides the teacher's scores by the temperature too."""
    return 1 / job["temperature"] if job["loss"] == "kl_divergence" else 1.0


def best_first(item: TextList) -> TextList:
    """Return a list with its passages by their labels, the highest first."""
    order = sorted(range(len(item["labels"])), key=lambda place: -item["labels"][place])
    return {**item, **{name: [item[name][place] for place in order] for name in ("passages", "labels")}}


def set_attention_dropout(model: nn.Module, value: float | None) -> None:
    """Set the dropout on attention weights of a BERT-like model, as the recipe has it."""
    if value is None:
        return
    for name, module in model.named_modules():
        if name.endswith("attention.self.dropout"):
            module.p = value
        elif name.endswith("attention.self") and hasattr(module, "dropout_prob"):
            module.dropout_prob = value


def learning_rate_factor(step: int, steps: int, warmup: int, schedule: str) -> float:
    """Return what the learning rate is multiplied by in a step: a linear warm-up, then linear to 0 or constant."""
    if step < warmup and schedule != "constant":
        return step / max(warmup, 1)
    return max(steps - step, 0) / max(steps - warmup, 1) if schedule == "linear" else 1.0


def read_lists(path: str) -> Iterator[TextList]:
    with open(path, encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def train(job: dict[str, Any]) -> None:
    """Take the job's steps, save the model, and write `results.json` beside it."""
    random.seed(job["seed"])
    torch.manual_seed(job["seed"])
    peer = PEERS[job["peer"]](job, training=True)
    peer.model.train()
    optimizer = torch.optim.AdamW(
        peer.model.parameters(), lr=job["learning_rate"], weight_decay=job["weight_decay"], fused=True
    )
    warmup, steps = job["warmup_steps"], job["steps"]
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, steps, warmup, job["schedule"])
    )
    total, start = 0.0, time.perf_counter()
    for step, lists in groupby(read_lists(job["lists"]), key=lambda item: item["step"]):
        # lightning-ir cannot take lists of different lengths at once: each length on its own, weighted by its lists
        sizes: dict[int, list[TextList]] = {}
        count = 0
        for item in lists:
            sizes.setdefault(len(item["labels"]), []).append(item)
            count += 1
        for part in sizes.values():
            with torch.autocast("cpu", torch.bfloat16, enabled=job["bf16"]):
                loss = peer.loss(part) * (len(part) / count)
            if not torch.isfinite(loss):
                print(f"step {step}: a loss that is not finite is left out", file=sys.stderr)
                continue
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(peer.model.parameters(), job["max_grad_norm"] or float("inf"))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % 25 == 0:
            print(f"step {step + 1:,} of {steps:,}: mean loss {total / (step + 1):.4f}", file=sys.stderr)
    seconds = time.perf_counter() - start
    peer.model.eval()
    peer.save(job["output"])
    results = {"train_seconds": seconds, "train_loss": total / steps}
    (Path(job["output"]) / "results.json").write_text(json.dumps(results, indent=2) + "\n", "utf-8")


@torch.no_grad()
def rerank(job: dict[str, Any]) -> None:
    """Score every list and write its scores and seconds."""
    peer = PEERS[job["peer"]](job, training=False)
    peer.model.eval()
    with open(job["output"], "w", encoding="utf-8") as file:
        for item in read_lists(job["lists"]):
            start = time.perf_counter()
            scores = peer.scores(item["query"], item["passages"])
            file.write(json.dumps({"scores": scores, "seconds": time.perf_counter() - start}) + "\n")


if __name__ == "__main__":
    {"train": train, "rerank": rerank}[sys.argv[1]](json.loads(Path(sys.argv[2]).read_text("utf-8")))
