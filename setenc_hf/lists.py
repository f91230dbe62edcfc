"""From stored samples to what a training step or an evaluation takes: lists of token ids, drawn anew every epoch."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from .errors import InputError
from .samples import IGNORE_LABEL, ListwiseSamples, is_within
from .sampling import STRATEGIES, generator
from .tokenization import SetEncoderTokenizer
from .tokens import SampleTokens


class TrainingLists(Dataset):
    """The lists of one or more folders of samples, each cut to `sample_size` passages by a sampling strategy.

    Items are asked for by (epoch, number): the passages that an item holds depend on (seed, epoch, query) alone.

    Args:
        samples: opened folders; their lists follow one another.
        tokenizer: whose tokens to give; they are made once and kept beside the samples.
        strategy: a name of [`~setenc_hf.sampling.STRATEGIES`].
        sample_size: passages of a list; shorter lists are taken whole.
        depth: draw from the top `depth` of the run only (passages added from the judgements count as within).
        seed: of all draws.
        store_tokens: keep the tokens beside the samples; else they are made from the text at every call.

    Lists that cannot teach anything under the strategy (without a relevant or a non-relevant passage for
    `single_relevant`, of a single passage for any), down to `depth`, are left out; `left_out` says how many and why.
    """

    def __init__(
        self,
        samples: Sequence[ListwiseSamples],
        tokenizer: SetEncoderTokenizer,
        strategy: str,
        sample_size: int,
        depth: int | None = None,
        seed: int = 42,
        store_tokens: bool = True,
    ) -> None:
        if strategy not in STRATEGIES:
            raise InputError(f"`sampling` is one of {', '.join(STRATEGIES)}, got {strategy!r}")
        if sample_size < 2:
            raise InputError(
                f"`sample_size` must be at least 2 (a list of one has no order to learn), got {sample_size}"
            )
        self.samples = list(samples)
        self.tokens = [SampleTokens.of(part, tokenizer.backend, store=store_tokens) for part in self.samples]
        self.draw = STRATEGIES[strategy]
        self.sample_size, self.depth, self.seed = sample_size, depth, seed
        self.epoch = 0
        self.left_out: dict[str, int] = {}
        kept = []
        for part, stored in enumerate(self.samples):
            lengths = stored.list_lengths(depth)
            usable = lengths > 1
            within = "" if depth is None else f" down to rank {depth}"
            self._count(f"lists of fewer than 2 passages{within}", ~usable)
            if strategy == "single_relevant":
                relevant = stored.relevant_counts(depth)
                self._count(f"lists without a relevant passage{within}", usable & (relevant == 0))
                self._count(f"lists without a non-relevant passage{within}", usable & (relevant == lengths))
                usable &= (relevant > 0) & (relevant < lengths)
            kept.append(np.stack([np.full(usable.sum(), part), np.flatnonzero(usable)], axis=1))
        self.places = np.concatenate(kept)  # [lists, 2]: folder, row
        if not len(self.places):
            raise InputError(f"{self.samples[0].folder}: no list can be trained on ({self.left_out})")

    def _count(self, reason: str, is_out: np.ndarray) -> None:
        if is_out.any():
            self.left_out[reason] = self.left_out.get(reason, 0) + int(is_out.sum())

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch from which the next pass draws; called by the data loader."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, item: int | tuple[int, int]) -> dict[str, Any]:
        """Return `query_ids`, `passage_ids` (token ids) and `labels` of a list; an int means the current epoch."""
        epoch, number = item if isinstance(item, tuple) else (self.epoch, item)
        part, row = self.places[number].tolist()
        sample = self.samples[part].rows[row]
        labels, ranks = np.asarray(sample["labels"], np.float32), np.asarray(sample["ranks"])
        within = np.flatnonzero(is_within(ranks, self.depth))
        draw = generator(self.seed, epoch, sample["query_id"])
        places = within[self.draw(draw, ranks[within], labels[within], self.sample_size)]
        tokens = self.tokens[part]
        return {
            "query_ids": tokens.queries[row],
            "passage_ids": [tokens.passages[sample["passages"][place]] for place in places],
            "labels": labels[places],
        }


class EpochSampler(Sampler[tuple[int, int]]):
    """Yields (epoch, number) for every list once, in an order that depends on (seed, epoch) alone."""

    def __init__(self, lists: TrainingLists) -> None:
        self.lists = lists

    def __len__(self) -> int:
        return len(self.lists)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = self.lists.epoch
        order = np.random.default_rng([self.lists.seed, epoch]).permutation(len(self.lists))
        return ((epoch, number) for number in order.tolist())


class EvaluationLists(Dataset):
    """The retrieved lists of a folder of samples, whole and in the run's order, with the judgements to measure by.

    Args:
        samples: an opened folder with labels of relevance.
        tokenizer: whose tokens to give.
        depth: passages re-ranked of each list; those added from the judgements never are.
        store_tokens: as for [`TrainingLists`].

    A list of which no retrieved passage is there (none down to `depth` has a text) is left out, with its query's
    judgements; `left_out` says how many.
    """

    def __init__(
        self, samples: ListwiseSamples, tokenizer: SetEncoderTokenizer, depth: int = 100, store_tokens: bool = True
    ) -> None:
        self.samples = samples
        self.tokens = SampleTokens.of(samples, tokenizer.backend, store=store_tokens)
        self.depth = depth
        best = samples.best_ranks()
        is_out = (best < 1) | (best > depth)
        self.rows = np.flatnonzero(~is_out)
        if not len(self.rows):
            raise InputError(f"{samples.folder}: no list has a retrieved passage down to rank {depth}")
        self.left_out = {"lists without a retrieved passage": int(is_out.sum())} if is_out.any() else {}
        query_ids = samples.query_ids()
        missing = {query_ids[row] for row in np.flatnonzero(is_out)}
        self.qrels = [qrel for qrel in samples.qrels() if qrel.query_id not in missing]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Return `query_id`, `doc_ids`, `query_ids`, `passage_ids` and `labels` of a list."""
        row = int(self.rows[number])
        sample = self.samples.samples[row]
        ranks = np.asarray(sample["ranks"])
        places = np.flatnonzero((ranks > 0) & (ranks <= self.depth))
        rows = [sample["passages"][place] for place in places]
        return {
            "query_id": sample["query_id"],
            "doc_ids": self.samples.doc_ids(rows),
            "query_ids": self.tokens.queries[row],
            "passage_ids": [self.tokens.passages[row] for row in rows],
            "labels": np.asarray(sample["labels"], np.float32)[places],
        }


class ListwiseCollator:
    """Packs lists for the model; samples hold token ids (`query_ids`, `passage_ids`) or text (`query`, `passages`).

    The batch holds what [`~setenc_hf.packing.pack`] gives and `labels` [queries, longest list], float32, with
    `IGNORE_LABEL` behind shorter lists.
    """

    def __init__(self, tokenizer: SetEncoderTokenizer) -> None:
        self.tokenizer = tokenizer

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        if "passage_ids" in samples[0]:
            queries = [sample["query_ids"] for sample in samples]
            packed = self.tokenizer.pack(queries, [sample["passage_ids"] for sample in samples])
        else:
            packed = self.tokenizer([sample["query"] for sample in samples], [s["passages"] for s in samples])
        batch = dict(packed)
        if "labels" in samples[0]:
            for sample, size in zip(samples, batch["num_passages"].tolist()):
                if len(sample["labels"]) != size:
                    raise ValueError(f"a list of {size} passages has {len(sample['labels'])} labels; they must align")
            batch["labels"] = torch.nn.utils.rnn.pad_sequence(
                [torch.as_tensor(sample["labels"], dtype=torch.float32) for sample in samples],
                batch_first=True,
                padding_value=IGNORE_LABEL,
            )
        return batch
