"""Word chains: a task with a verifiable reward and a vocabulary like a language's, with few common and many rare words.

Every word has a hidden class in 0 … K−1. A prompt gives steps s₁ … sₙ and a first word. The response is n words and the
end token. It is right if the class of each word is that of the word before plus the step, modulo K. Any word of that class
is right, so a good policy keeps a long tail of choices. The class of a rare word was seen rarely.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

CLASSES = 8
VOCABULARY = 4096
SLOTS = 5
"""The largest number of steps in a prompt."""
NO_STEP, END = CLASSES, CLASSES + 1
FIRST_WORD = CLASSES + 2
PROMPT = SLOTS + 1
RESPONSE = SLOTS + 1
CONTEXT = PROMPT + RESPONSE


@dataclass(frozen=True, slots=True)
class Prompts:
    """Token ids (prompts, PROMPT): the steps, NO_STEP in unused slots, then the first word."""

    tokens: torch.Tensor

    @property
    def steps(self) -> torch.Tensor:
        """The steps, (prompts, SLOTS)."""
        return self.tokens[:, :SLOTS]

    def repeat(self, times: int) -> Prompts:
        """Each prompt `times` times, in adjacent rows."""
        return Prompts(self.tokens.repeat_interleave(times, 0))


@dataclass(frozen=True)
class Task:
    """The classes and frequencies of the words, from one seed."""

    seed: int = 0
    exponent: float = 1.2
    """The k-th most frequent word has a frequency ∝ k^−exponent."""
    shortest: int = 2
    wrong: float = 0.1
    """Share of words in demonstrations that are drawn from all words, not from the right class."""

    @cached_property
    def word_class(self) -> torch.Tensor:
        """The class of each token id, −1 for ids that are no word. All classes have the same number of words."""
        words = VOCABULARY - FIRST_WORD
        classes = np.random.default_rng(self.seed).permutation(np.arange(words) % CLASSES)
        return torch.from_numpy(np.concatenate([np.full(FIRST_WORD, -1), classes]))

    @cached_property
    def frequency(self) -> torch.Tensor:
        """The frequency of each token, summing to 1; words are in order of frequency."""
        rank = np.arange(1, VOCABULARY - FIRST_WORD + 1, dtype=np.float64)
        use = rank**-self.exponent
        return torch.from_numpy(np.concatenate([np.zeros(FIRST_WORD), use / use.sum()]))

    @cached_property
    def _cumulative(self) -> torch.Tensor:
        """(CLASSES + 1, VOCABULARY): cumulative frequency among the words of each class, and among all words."""
        rows = [self.frequency * (self.word_class == c) for c in range(CLASSES)]
        table = torch.stack([*rows, self.frequency]).cumsum(1)
        return table / table[:, -1:]

    def prompts(self, number: int, generator: torch.Generator) -> Prompts:
        """Prompts with uniform lengths and steps, and a first word drawn by frequency."""
        steps = torch.randint(CLASSES, (number, SLOTS), generator=generator)
        length = torch.randint(self.shortest, SLOTS + 1, (number, 1), generator=generator)
        steps = torch.where(torch.arange(SLOTS) < length, steps, NO_STEP)
        first = self._draw(torch.full((number,), CLASSES), generator)
        return Prompts(torch.cat([steps, first[:, None]], 1))

    def demonstrations(self, prompts: Prompts, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Responses with some wrong words, (prompts, RESPONSE), and the mask of their tokens."""
        steps, word = prompts.steps, prompts.tokens[:, -1]
        number = word.shape[0]
        columns = []
        for t in range(SLOTS):
            right = (self.word_class[word] + steps[:, t]) % CLASSES
            careless = torch.rand(number, generator=generator) < self.wrong
            word = self._draw(torch.where(careless, CLASSES, right), generator)
            columns.append(word)
        response = torch.stack([*columns, torch.full_like(word, END)], 1)
        length = (steps != NO_STEP).sum(1, keepdim=True)
        position = torch.arange(RESPONSE)
        return torch.where(position < length, response, END), position <= length

    def reward(self, prompts: Prompts, responses: torch.Tensor) -> torch.Tensor:
        """1 for a right chain that ends after the last step, else 0; float32, (prompts,)."""
        steps = prompts.steps
        before = self.word_class[torch.cat([prompts.tokens[:, -1:], responses[:, : SLOTS - 1]], 1)]
        right = self.word_class[responses[:, :SLOTS]] == (before + steps) % CLASSES
        length = (steps != NO_STEP).sum(1)
        in_chain = torch.arange(SLOTS) < length[:, None]
        ended = responses.gather(1, length[:, None])[:, 0] == END
        return ((right | ~in_chain).all(1) & ended).float()

    def _draw(self, rows: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Draw a word from each of the given rows of the cumulative table."""
        u = torch.rand(rows.shape[0], generator=generator, dtype=torch.float64)
        words = torch.empty_like(rows)
        for row, cumulative in enumerate(self._cumulative):
            words[rows == row] = torch.searchsorted(cumulative, u[rows == row], right=True)
        return words.clamp(max=VOCABULARY - 1)


def response_mask(responses: torch.Tensor) -> torch.Tensor:
    """The mask of a response: True up to and including the first end token."""
    ended = (responses == END).int()
    return ended.cumsum(1) - ended == 0
