"""Many questions about one image answered in one pass, exactly as greedy decoding would answer them.

The prompts and reference answers of an image share beginnings: the image's own tokens, "Question:", "is there a".
All of them together form a tree of tokens. A tree is laid out as one sequence in which every token sees its ancestors
and itself and has its depth for a position, so each path computes what a sequence of its own would, and what several
paths share is computed once. An answer is right if the most likely token is the reference's at every position of the
answer, its end included; greedy decoding then gives that very answer, and otherwise another.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Tree:
    """The tokens of all questions about one image.

    Attributes:
        ids: Token of every node, parents before children, shape [nodes].
        depth: Its position, shape [nodes].
        mask: Which nodes a node sees, shape [nodes, nodes] bool.
        asked: (node, token that must follow, question) for every answer position, shape [answer positions, 3].
        questions: How many there are.
    """

    ids: np.ndarray
    depth: np.ndarray
    mask: np.ndarray
    asked: np.ndarray
    questions: int


def grow(paths: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Tree:
    """Lays out the prompts and answers about one image as a tree.

    Args:
        paths: (prompt, answer) token ids of each question, both at least one token long.
    """
    node_of: dict[tuple[int, int], int] = {}
    ids: list[int] = []
    parents: list[int] = []
    asked = []
    for question, (prompt, answer) in enumerate(paths):
        node, first = -1, len(prompt) - 1
        # The answer's last token is only predicted, never read.
        for place, token in enumerate([*prompt, *answer][:-1]):
            known = node_of.setdefault((node, int(token)), len(ids))
            if known == len(ids):
                ids.append(int(token))
                parents.append(node)
            node = known
            if place >= first:
                asked.append((node, int(answer[place - first]), question))
    mask = np.eye(len(ids), dtype=bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            mask[node] |= mask[parent]
    return Tree(np.array(ids), mask.sum(1) - 1, mask, np.array(asked), len(paths))


@dataclass
class Sheet:
    """Several images with their questions, padded to one length: what the network is given at a time.

    Attributes:
        pixels: [images, 3, H, W] float32.
        ids: [images, nodes] int64.
        positions: [images, nodes] int64.
        mask: [images, 1, nodes, nodes] bool.
        places: (image, node) of every answer position, two index tensors.
        wanted: Token that must follow there, shape [answer positions].
        owners: Number of the question that it belongs to, shape [answer positions].
        numbers: Where each question's verdict goes among all the exam's, shape [questions].
    """

    pixels: Tensor
    ids: Tensor
    positions: Tensor
    mask: Tensor
    places: tuple[Tensor, Tensor]
    wanted: Tensor
    owners: Tensor
    numbers: np.ndarray

    @torch.inference_mode()
    def right(self, model: nn.Module) -> np.ndarray:
        """Whether greedy decoding gives the reference answer, per question, shape [questions] bool."""
        device = next(model.parameters()).device
        inputs = {"input_ids": self.ids, "pixel_values": self.pixels, "attention_mask": self.mask, "position_ids": self.positions}
        states = model.model(**{name: x.to(device) for name, x in inputs.items()}, use_cache=False).last_hidden_state
        missed = model.lm_head(states[self.places]).argmax(-1).cpu() != self.wanted
        verdict = np.ones(len(self.numbers), bool)
        verdict[self.owners[missed].numpy()] = False
        return verdict


class Exam:
    """Questions with their images, ready to be put to any network with the same tokenizer and processor.

    Attributes:
        questions: How many there are.
        sheets: In order of length, so that little is padded.
    """

    def __init__(
        self, images: Iterable[tuple[np.ndarray, Sequence[tuple[Sequence[int], Sequence[int]]]]], padding: int, images_at_a_time: int
    ):
        """
        Args:
            images: Pixel values [3, H, W] of each image, with (prompt, answer) token ids of its questions.
            padding: Token id for the places that are not used.
            images_at_a_time: In one pass of the network.
        """
        trees, pixels, starts, self.questions = [], [], [], 0
        for values, paths in images:
            trees.append(grow(paths))
            pixels.append(values)
            starts.append(self.questions)
            self.questions += len(paths)
        order = sorted(range(len(trees)), key=lambda i: len(trees[i].ids))
        self.sheets = []
        for start in range(0, len(order), images_at_a_time):
            some = order[start : start + images_at_a_time]
            self.sheets.append(_sheet([trees[i] for i in some], np.stack([pixels[i] for i in some]), [starts[i] for i in some], padding))

    def verdicts(self, model: nn.Module) -> np.ndarray:
        """Whether each question is answered right, in the order they were given, shape [questions] bool."""
        found = np.zeros(self.questions, bool)
        for sheet in self.sheets:
            found[sheet.numbers] = sheet.right(model)
        return found


def _sheet(trees: Sequence[Tree], pixels: np.ndarray, starts: Sequence[int], padding: int) -> Sheet:
    length = max(len(t.ids) for t in trees)
    ids = np.full((len(trees), length), padding)
    positions = np.zeros((len(trees), length), np.int64)
    # A place that is not used sees itself: attention to nothing is not a number.
    mask = np.repeat(np.eye(length, dtype=bool)[None], len(trees), 0)
    rows, nodes, wanted, owners, numbers = [], [], [], [], []
    for row, (tree, start) in enumerate(zip(trees, starts, strict=True)):
        n = len(tree.ids)
        ids[row, :n], positions[row, :n], mask[row, :n, :n] = tree.ids, tree.depth, tree.mask
        rows += [row] * len(tree.asked)
        nodes += tree.asked[:, 0].tolist()
        wanted += tree.asked[:, 1].tolist()
        owners += (len(numbers) + tree.asked[:, 2]).tolist()
        numbers += range(start, start + tree.questions)
    return Sheet(
        pixels=torch.from_numpy(pixels),
        ids=torch.from_numpy(ids),
        positions=torch.from_numpy(positions),
        mask=torch.from_numpy(mask)[:, None],
        places=(torch.tensor(rows), torch.tensor(nodes)),
        wanted=torch.tensor(wanted),
        owners=torch.tensor(owners),
        numbers=np.array(numbers),
    )
