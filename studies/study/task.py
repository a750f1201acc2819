"""Word chains: a task with a verifiable reward and a vocabulary used as languages use theirs, few words often, most rarely.

Every word has a hidden class in 0 … K−1. A prompt gives steps s₁ … sₙ and a first word; the response is n words and the
end token, right if the class of each word is that of the word before it plus its step, modulo K. Any word of that class
will do, so a good policy keeps a long tail of choices; a rare word is one whose class was seen rarely.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

CLASSES = 8
VOCABULARY = 4096
SLOTS = 5
"""Most steps a prompt may have."""
NO_STEP, END = CLASSES, CLASSES + 1
FIRST_WORD = CLASSES + 2
PROMPT = SLOTS + 1
RESPONSE = SLOTS + 1
CONTEXT = PROMPT + RESPONSE


@dataclass(frozen=True, slots=True)
class Prompts:
    """Token ids (prompts, PROMPT): the steps, NO_STEP in the slots left over, then the first word."""

    tokens: torch.Tensor

    @property
    def steps(self) -> torch.Tensor:
        """(prompts, SLOTS)."""
        return self.tokens[:, :SLOTS]

    def repeat(self, times: int) -> Prompts:
        """Every prompt `times` times, one after another."""
        return Prompts(self.tokens.repeat_interleave(times, 0))


@dataclass(frozen=True)
class Task:
    """Classes of the words and how often each is used; all from one seed."""

    seed: int = 0
    exponent: float = 1.2
    """A word of frequency rank k is used ∝ k^−exponent."""
    shortest: int = 2
    wrong: float = 0.1
    """Share of the demonstrations' words that are any word instead of one of the right class."""

    @cached_property
    def word_class(self) -> torch.Tensor:
        """Class of each token id; −1 of what is no word. Balanced, whatever the frequency."""
        words = VOCABULARY - FIRST_WORD
        classes = np.random.default_rng(self.seed).permutation(np.arange(words) % CLASSES)
        return torch.from_numpy(np.concatenate([np.full(FIRST_WORD, -1), classes]))

    @cached_property
    def frequency(self) -> torch.Tensor:
        """How often the language uses each token, summing to 1 over words; ids are in order of frequency."""
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
        """Prompts with uniform lengths and steps and a first word as the language uses it."""
        steps = torch.randint(CLASSES, (number, SLOTS), generator=generator)
        length = torch.randint(self.shortest, SLOTS + 1, (number, 1), generator=generator)
        steps = torch.where(torch.arange(SLOTS) < length, steps, NO_STEP)
        first = self._draw(torch.full((number,), CLASSES), generator)
        return Prompts(torch.cat([steps, first[:, None]], 1))

    def demonstrations(self, prompts: Prompts, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Responses (prompts, RESPONSE) as a careless speaker gives them, and the mask of their tokens."""
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
        """1 for a right chain that ends where the steps do, else 0; float32 (prompts,)."""
        steps = prompts.steps
        before = self.word_class[torch.cat([prompts.tokens[:, -1:], responses[:, : SLOTS - 1]], 1)]
        right = self.word_class[responses[:, :SLOTS]] == (before + steps) % CLASSES
        length = (steps != NO_STEP).sum(1)
        in_chain = torch.arange(SLOTS) < length[:, None]
        ended = responses.gather(1, length[:, None])[:, 0] == END
        return ((right | ~in_chain).all(1) & ended).float()

    def _draw(self, rows: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """A word for each row of the table of cumulative frequencies."""
        u = torch.rand(rows.shape[0], generator=generator, dtype=torch.float64)
        words = torch.empty_like(rows)
        for row, cumulative in enumerate(self._cumulative):
            words[rows == row] = torch.searchsorted(cumulative, u[rows == row], right=True)
        return words.clamp(max=VOCABULARY - 1)


def response_mask(responses: torch.Tensor) -> torch.Tensor:
    """True up to and including the first end token."""
    ended = (responses == END).int()
    return ended.cumsum(1) - ended == 0
