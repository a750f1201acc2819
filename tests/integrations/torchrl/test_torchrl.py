"""torchrl's GRPOLoss and TransformersWrapper on a real, tiny model: with our objectives and with torchrl's own clip."""

import copy
import inspect
from functools import cache

import pytest

pytest.importorskip("torchrl", reason="runs in the environment of `nox -s integration-torchrl`")

import torch
from drpo_torch import policy_loss
from drpo_torch.integrations import BehaviorPolicyWarning
from drpo_torch.integrations.torchrl import STATISTICS, PolicyLossModule
from tensordict import TensorDict, lazy_stack
from tokenizers import Tokenizer, models
from torchrl.data import LazyStackStorage, ReplayBuffer
from torchrl.modules.llm import TransformersWrapper
from torchrl.objectives.llm import GRPOLoss, LLMLossOutput
from torchrl.record import CSVLogger
from torchrl.trainers import MixedPrecisionOptimizationStepper
from torchrl.trainers.algorithms.grpo import GRPOTrainer
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from drpo_core import DRPO, SPO, PolicyGradient, PPOClip, sequence_mean_token_mean, summarize, token_mean
from drpo_core.objectives import OBJECTIVES as FAMILIES

VOCABULARY = 32
PROMPTS, RESPONSES = (3, 5, 1, 4), (6, 4, 6, 2)
LONGEST = max(p + r for p, r in zip(PROMPTS, RESPONSES, strict=True))
CLIP = (0.2, 0.28)
BITING = {"delta": 0.05, "eps": (0.2, 0.28), "max_ratio": 1.1, "DPPO-TV": 0.02, "DPPO-KL": 0.002}
OBJECTIVES = [
    family.make(BITING.get(family.name, BITING.get(family.threshold, *family.typical[:1])))
    if family.threshold
    else family.make()
    for family in FAMILIES
]


def language_model(dtype=torch.float32):
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = Qwen2Config(vocab_size=VOCABULARY, num_hidden_layers=2, max_position_embeddings=64, initializer_range=0.3, **size)
    return Qwen2ForCausalLM(config).eval().to(dtype)


def actor(model, **options):
    special = {"pad_token": "t0", "eos_token": "t1"}
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCABULARY)}, "t0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **special)
    return TransformersWrapper(model, tokenizer=tokenizer, input_mode="tokens", **{"generate": False} | options)


@torch.no_grad()
def rollouts(dtype=torch.float32, *, ragged_advantages=False):
    """Sampled from the initial model, ragged, as torchrl's collectors stack them; no log-probs for the prompt, as by vLLM."""
    model = language_model(dtype)
    generator = torch.Generator().manual_seed(1)
    sequences = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        tokens = torch.randint(2, VOCABULARY, (prompt,), generator=generator)
        log_probs = torch.full((prompt,), float("nan"), dtype=dtype)
        for _ in range(response):
            of_next = model(tokens[None]).logits[0, -1].log_softmax(-1)
            token = torch.multinomial(of_next.exp(), 1, generator=generator)
            tokens, log_probs = torch.cat([tokens, token]), torch.cat([log_probs, of_next[token]])
        advantages = torch.randn(LONGEST, 1, generator=generator, dtype=dtype)
        batch = {
            ("tokens", "full"): tokens,
            ("tokens", "prompt"): tokens[:prompt],
            ("masks", "all_attention_mask"): torch.ones_like(tokens, dtype=torch.bool),
            ("log_probs", "full"): log_probs,
            ("next", "ref_log_probs", "full"): log_probs.nan_to_num(-1.0) + 0.1,
            ("next", "reward"): torch.ones(1, dtype=dtype),
            "advantage": advantages[-len(tokens) :] if ragged_advantages else advantages,
        }
        sequences.append(TensorDict(batch, []))
    return lazy_stack(sequences)


def train(make_loss, steps=4, learning_rate=0.02):
    """Optimiser steps on one batch: the module's output at each, and the parameters after them."""
    model = language_model()
    module = make_loss(actor(model))
    optimizer = torch.optim.SGD(model.parameters(), learning_rate)
    outputs = []
    for _ in range(steps):
        output = module(rollouts())
        outputs.append(output.detach())
        sum(value for name, value in output.items() if name.startswith("loss_")).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return outputs, torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.usefixtures("compiled_only")
@pytest.mark.parametrize(
    "options",
    [
        {"entropy_bonus": False},
        {"entropy_bonus": False, "aggregation": "prompt_mean"},
        {"entropy_bonus": True, "entropy_coeff": 0.05},
        {"entropy_bonus": False, "kl_to_ref_coeff": 0.1, "kl_to_inference_coeff": 0.1},
        {"entropy_bonus": False, "kl_mask_threshold": 0.02},
    ],
    ids=["token_mean", "prompt_mean", "entropy bonus", "KL penalties", "KL mask"],
)
def test_parity_with_torchrl(options):
    expected, parameters = train(lambda policy: GRPOLoss(policy, clip_epsilon=CLIP, **options))
    objective = PPOClip(eps_low=CLIP[0], eps_high=CLIP[1])
    outputs, found = train(lambda policy: PolicyLossModule(policy, objective=objective, **options))
    for output, of_torchrl in zip(outputs, expected, strict=True):
        assert output.keys() == of_torchrl.keys() | set(STATISTICS)
        for name in of_torchrl.keys() - {"clip_fraction"}:
            torch.testing.assert_close(output.get(name), of_torchrl.get(name), rtol=1e-6, atol=1e-6)
    assert outputs[-1].clip_fraction > 0.0
    assert not torch.equal(found, train(lambda policy: PolicyLossModule(policy, objective=SPO(eps=0.2), **options))[1])
    torch.testing.assert_close(found, parameters, rtol=0.0, atol=1e-6)


@cache
def trained(objective):
    return train(lambda policy: PolicyLossModule(policy, objective=objective, entropy_bonus=False))


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_every_objective_trains_and_is_logged(objective):
    outputs, parameters = trained(objective)
    assert torch.isfinite(parameters).all()
    first, last = outputs[0], outputs[-1]
    assert float(first.ratio_mean) == pytest.approx(1.0, abs=1e-5)
    assert float(last.ratio_max) > 1.05
    assert all(torch.isfinite(last.get(name)) for name in STATISTICS)
    for other in OBJECTIVES:
        if other != objective:
            assert not torch.equal(parameters, trained(other)[1])


@pytest.mark.usefixtures("compiled_only")
@pytest.mark.parametrize(("aggregation", "reduction"), [("token_mean", token_mean), ("prompt_mean", sequence_mean_token_mean)])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_the_loss_is_the_librarys(objective, aggregation, reduction):
    """On log-probs without torchrl's packing; transformers computes norms in float32 even of a float64 model."""
    model, data = language_model(torch.float64), rollouts(torch.float64, ragged_advantages=True)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    module = PolicyLossModule(actor(model), objective=objective, aggregation=aggregation, entropy_bonus=False)
    output = module(data)
    gradients = torch.autograd.grad(output.loss_objective.sum(), list(model.parameters()))
    rows = [model(tokens[None]).logits[0, :-1].log_softmax(-1) for tokens in data.get(("tokens", "full"), as_list=True)]
    width = max(RESPONSES)

    def responses(parts):
        pairs = zip(parts, RESPONSES, strict=True)
        return torch.stack([torch.nn.functional.pad(part[-r:], (0, width - r)) for part, r in pairs])

    tokens = data.get(("tokens", "full"), as_list=True)
    log_prob = responses([row.gather(-1, x[1:, None]).squeeze(-1) for row, x in zip(rows, tokens, strict=True)])
    loss, statistics = policy_loss(
        objective,
        log_prob=log_prob,
        behavior_log_prob=responses(data.get(("log_probs", "full"), as_list=True)),
        advantages=responses([x.squeeze(-1) for x in data.get("advantage", as_list=True)]),
        mask=responses([torch.ones(len(x), dtype=torch.bool) for x in tokens]),
        reduction=reduction,
    )
    torch.testing.assert_close(output.loss_objective.squeeze(), loss, rtol=5e-6, atol=1e-7)
    for found, expected in zip(gradients, torch.autograd.grad(loss, list(model.parameters())), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=5e-6)
    for name, figure in summarize(statistics).items():
        assert float(output.get(name)) == pytest.approx(0.0 if figure != figure else figure, rel=1e-5, abs=1e-7)
    assert float(output.clip_fraction) == float(output.outside_fraction)


def test_the_mean_that_recipes_use_has_the_gradient_of_torchrls():
    """`output.mean(reduce=True)` averages over entries, so statistics must not be among them."""
    gradients = []
    for make_loss in (
        lambda policy: GRPOLoss(policy, clip_epsilon=CLIP),
        lambda policy: PolicyLossModule(policy, objective=PPOClip(eps_low=CLIP[0], eps_high=CLIP[1])),
    ):
        model = language_model()
        make_loss(actor(model))(rollouts()).mean(reduce=True).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("ragged", [False, True])
def test_advantages_belong_to_the_tokens_that_have_them(ragged):
    """Which torchrl 0.14.1 misplaces where they are ragged: it pads them on the right, and tokens on the left."""

    def losses(make_loss):
        module = make_loss(actor(language_model()), aggregation="none", entropy_bonus=False)
        return [module(rollouts(ragged_advantages=r)).loss_objective for r in (False, ragged)]

    torch.testing.assert_close(*losses(lambda *args, **kwargs: PolicyLossModule(*args, objective=PolicyGradient(), **kwargs)))
    full, of_torchrl = losses(GRPOLoss)
    assert torch.equal(full, of_torchrl) is not ragged


def test_masked_tokens_may_hold_anything():
    data = rollouts(ragged_advantages=True)
    outputs = [PolicyLossModule(actor(language_model()), objective=DRPO(delta=0.05))(data)]
    for row, prompt in zip(data.unbind(0), PROMPTS, strict=True):
        row["advantage"][:prompt] = float("nan")
    outputs.append(PolicyLossModule(actor(language_model()), objective=DRPO(delta=0.05))(data))
    assert torch.equal(outputs[0].loss_objective, outputs[1].loss_objective)
    assert all(torch.equal(outputs[0].get(name), outputs[1].get(name)) for name in STATISTICS)


def test_per_token_losses_and_no_graph_left_behind():
    module = PolicyLossModule(actor(language_model()), objective=DRPO(delta=0.05), aggregation="none", entropy_bonus=False)
    output = module(rollouts())
    assert output.loss_objective.shape == (4, LONGEST, 1)
    assert copy.deepcopy(module).objective == module.objective
    assert set(STATISTICS) <= set(module.out_keys)


def test_statistics_reach_torchrls_logger(tmp_path):
    """GRPOTrainer with its optimisation stepper and replay buffer: what it averages and logs."""
    model = language_model()
    module = PolicyLossModule(actor(model), objective=DRPO(delta=0.05))

    class Rollouts:
        """A collector of one batch."""

        requested_frames_per_batch = 4
        init_random_frames = 0

        def __iter__(self):
            yield rollouts()

        def shutdown(self, *_, **__):
            """Nothing runs."""

    trainer = GRPOTrainer(
        collector=Rollouts(),
        total_frames=4,
        frame_skip=1,
        optim_steps_per_batch=1,
        loss_module=module,
        optimization_stepper=MixedPrecisionOptimizationStepper(torch.optim.SGD(model.parameters(), 0.1)),
        replay_buffer=ReplayBuffer(storage=LazyStackStorage(4), batch_size=4),
        logger=CSVLogger("run", tmp_path),
        log_interval=1,
        progress_bar=False,
    )
    trainer.train()
    logged = {file.stem for file in (tmp_path / "run" / "scalars").iterdir()}
    assert {"loss_objective", "clip_fraction", *STATISTICS} <= logged


def test_the_ordinary_batch_does_not_warn(recwarn):
    PolicyLossModule(actor(language_model()), objective=DRPO(delta=0.05))(rollouts())
    assert not [warning for warning in recwarn if warning.category is BehaviorPolicyWarning]


def test_tokens_that_nobody_sampled_warn():
    with pytest.warns(BehaviorPolicyWarning, match="masking_strategy='generic' counts the prompt's tokens"):
        PolicyLossModule(actor(language_model()), objective=DRPO(delta=0.05), masking_strategy="generic")


def test_missing_log_probs_warn():
    data = rollouts()
    data[1]["log_probs", "full"][-1] = float("nan")
    with pytest.warns(BehaviorPolicyWarning, match="no log-prob for some of the tokens"):
        PolicyLossModule(actor(language_model()), objective=DRPO(delta=0.05))(data)


def test_the_reference_policy_is_not_the_behaviour_policy():
    module = PolicyLossModule(actor(language_model()), objective=DRPO(delta=0.05))
    module.set_keys(sample_log_prob=("next", "ref_log_probs", "full"))
    with pytest.warns(BehaviorPolicyWarning, match="names the reference policy's log-probs"):
        module(rollouts())


@pytest.mark.parametrize(
    "arguments",
    [
        {"clip_epsilon": 0.2},
        {"clip_value": True},
        {"gamma": 0.9},
        {"reduction": "sum"},
        {"aggregation": "sequence_mean"},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_what_would_have_no_effect_is_refused(arguments):
    (name,) = arguments
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        PolicyLossModule(actor(language_model()), objective=DRPO(delta=0.05), **arguments)


def test_what_transformers_wrapper_records_is_no_anchor():
    """A torchrl that passes on whole, right log-probs makes docs/integrations/torchrl.md outdated here."""
    options = {"max_new_tokens": 4, "do_sample": True, "suppress_tokens": [0, 1]}
    sampler = actor(language_model(), generate=True, return_log_probs=True, pad_output=True, generate_kwargs=options)
    prompts = torch.randint(2, VOCABULARY, (3, 5))
    batch = {("tokens", "prompt"): prompts, ("masks", "all_attention_mask"): torch.ones_like(prompts, dtype=torch.bool)}
    sampled = sampler(TensorDict(batch, [3]))
    assert sampled["log_probs"].full is None
    assert (sampled["log_probs"].response[:, 0] == 0.0).all()


def test_torchrl_still_has_what_is_overridden():
    """What this integration relies on: three methods with these arguments, and the output's own entries."""
    assert list(inspect.signature(GRPOLoss._log_weight).parameters) == ["self", "tensordict", "adv_shape"]
    assert list(inspect.signature(GRPOLoss._compute_policy_objective).parameters) == ["self", "log_weight", "advantage"]
    assert list(inspect.signature(GRPOLoss._aggregate_loss_value).parameters) == ["self", "value", "mask", "tensordict"]
    assert not set(STATISTICS) & set(LLMLossOutput.__dataclass_fields__)
