"""The task: what is right, how words are used, and what the pre-fitted policy samples."""

import numpy as np
import pytest
import torch
from study.model import SHAPES, prepared
from study.precision import ENGINES
from study.rollout import sample, uniforms
from study.task import CLASSES, END, FIRST_WORD, NO_STEP, RESPONSE, SLOTS, VOCABULARY, Prompts, Task, response_mask


def chain(task, steps, first, classes_off=()):
    """A prompt and a response whose words are right but for those at `classes_off`."""
    prompt = torch.tensor([[*steps, *[NO_STEP] * (SLOTS - len(steps)), first]])
    word_class, response, last = task.word_class, [], first
    for t, step in enumerate(steps):
        wanted = (int(word_class[last]) + step + (t in classes_off)) % CLASSES
        last = int((word_class == wanted).nonzero()[3 + t, 0])
        response.append(last)
    return Prompts(prompt), torch.tensor([response + [END] * (RESPONSE - len(response))])


@pytest.mark.parametrize("length", range(1, SLOTS + 1))
def test_a_right_chain_is_rewarded_and_one_wrong_word_or_end_is_not(length):
    task = Task()
    steps = [3, 7, 0, 5, 1][:length]
    prompts, response = chain(task, steps, FIRST_WORD + 11)
    assert task.reward(prompts, response).tolist() == [1.0]
    for t in range(length):
        assert task.reward(*chain(task, steps, FIRST_WORD + 11, (t,))).tolist() == [0.0]
    late, early = response.clone(), response.clone()
    late[0, length] = FIRST_WORD
    early[0, length - 1] = END
    assert task.reward(prompts, late).tolist() == [0.0]
    assert task.reward(prompts, early).tolist() == [0.0]


def test_what_follows_the_end_does_not_count():
    prompts, response = chain(Task(), [2, 4], FIRST_WORD)
    response[0, 3:] = FIRST_WORD + 5
    assert Task().reward(prompts, response).tolist() == [1.0]
    assert response_mask(response).tolist() == [[True, True, True, False, False, False]]


def test_demonstrations_of_a_careful_speaker_are_always_right_and_of_a_careless_one_sometimes():
    generator = torch.Generator().manual_seed(0)
    rewards = {}
    for wrong in (0.0, 0.1):
        task = Task(wrong=wrong)
        prompts = task.prompts(4000, generator)
        responses, mask = task.demonstrations(prompts, generator)
        assert torch.equal(mask, response_mask(responses))
        rewards[wrong] = float(task.reward(prompts, responses).mean())
    # of n words a random one is right by chance one time in CLASSES
    expected = np.mean([(1 - 0.1 * (1 - 1 / CLASSES)) ** n for n in range(2, SLOTS + 1)])
    assert rewards[0.0] == 1.0
    assert abs(rewards[0.1] - expected) < 0.03


def test_words_are_used_as_zipf_says():
    """The slope of log use against log rank, measured on what is drawn, is the exponent; the vocabulary is large."""
    task = Task()
    assert VOCABULARY >= 4096
    assert torch.bincount(task.word_class[FIRST_WORD:]).float().std() < 1.0
    drawn = task.prompts(400_000, torch.Generator().manual_seed(1)).tokens[:, -1]
    counts = torch.bincount(drawn, minlength=VOCABULARY)[FIRST_WORD:].double()
    assert counts[:100].min() > 0
    slope = np.polyfit(np.log(np.arange(1, 101)), np.log(counts[:100].numpy()), 1)[0]
    assert abs(slope + task.exponent) < 0.03


@pytest.mark.parametrize("engine", ["bfloat16", "fp8", "int8"])
def test_the_start_is_right_now_and_then_and_samples_rare_tokens(start, engine):
    parameters, about = start
    assert 0.1 <= about["reward"] <= 0.4
    task, generator = Task(), torch.Generator().manual_seed(3)
    prompts = task.prompts(512, generator)
    rollout = sample(
        prepared(parameters, ENGINES[engine]), SHAPES["dense"], prompts, ENGINES[engine], uniforms(prompts, generator)
    )
    assert 0.1 <= float(task.reward(prompts, rollout.responses).mean()) <= 0.4
    assert float((rollout.behavior_log_prob[rollout.mask].exp() <= 0.01).float().mean()) >= 0.05
