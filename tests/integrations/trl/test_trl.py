"""The TRL integration against the installed TRL: a 2-layer Qwen2 with random weights and a tokenizer made on the spot."""

from __future__ import annotations

import inspect
import os
import warnings
from typing import TYPE_CHECKING, Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"

torch = pytest.importorskip("torch")
trl = pytest.importorskip("trl", reason="TRL is not installed: nox -s integration-trl")

from datasets import Dataset  # noqa: E402
from drpo_torch import engines  # noqa: E402
from drpo_torch.integrations import BehaviorPolicyWarning  # noqa: E402
from drpo_torch.integrations.trl import PolicyLossMixin, PolicyLossTrainer  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers, trainers  # noqa: E402
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, TrainerCallback  # noqa: E402

from drpo_core import DRPO, PPOClip, token_loss_and_gradient  # noqa: E402
from drpo_core.objectives import OBJECTIVES as FAMILIES  # noqa: E402

if TYPE_CHECKING:
    from pathlib import Path

# TRL and what it imports warn of their own deprecations; ours are asserted
pytestmark = pytest.mark.filterwarnings("ignore")

OBJECTIVES = [
    family.make({"delta": 0.001, "eps": (0.02, 0.03), "max_ratio": 1.01}.get(family.threshold, *family.typical[:1]))
    if family.threshold
    else family.make()
    for family in FAMILIES
]
PROMPTS = [f"count {n} " for n in range(8)]
STEPS, WIDTH = 4, 8


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE(unk_token="<unk>"))  # noqa: S106 -- a token of the vocabulary
    backend.pre_tokenizer = pre_tokenizers.ByteLevel()
    special = ["<unk>", "<pad>", "<eos>"]
    backend.train_from_iterator(PROMPTS, trainers.BpeTrainer(vocab_size=96, special_tokens=special))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",  # noqa: S106
        pad_token="<pad>",  # noqa: S106
        eos_token="<eos>",  # noqa: S106
        padding_side="left",
    )


@pytest.fixture(scope="module")
def weights(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of a model, because the KL penalty has TRL load the reference model from one."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    path = str(tmp_path_factory.mktemp("qwen2"))
    Qwen2ForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture
def make(tokenizer: PreTrainedTokenizerFast, weights: str, tmp_path: Path) -> Any:
    def make(trainer: type = PolicyLossTrainer, *, settings: dict[str, Any] | None = None, **options: Any) -> Any:
        args = trl.GRPOConfig(
            output_dir=str(tmp_path),
            max_steps=STEPS,
            lr_scheduler_type="constant",
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=WIDTH,
            bf16=False,
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **{"num_iterations": 2, "gradient_accumulation_steps": 2, "learning_rate": 0.05, **(settings or {})},
        )
        built = trainer(
            Qwen2ForCausalLM.from_pretrained(weights),
            [reward],
            args=args,
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
            processing_class=tokenizer,
            **options,
        )
        built.add_callback(Losses(built))
        return built

    return make


class Losses(TrainerCallback):
    """Nothing but a place for the loss of every micro-batch, exactly."""

    def __init__(self, trainer: Any) -> None:
        self.values: list[Any] = []
        compute = trainer._compute_loss

        def recorded(model: Any, inputs: Any) -> Any:
            loss = compute(model, inputs)
            self.values.append(loss.detach().clone())
            return loss

        trainer._compute_loss = recorded
        trainer.losses = self.values


def reward(completion_ids: list[list[int]], **_: object) -> list[float]:
    return [sum(token % 3 == 0 for token in ids) / WIDTH for ids in completion_ids]


def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """Sample with the model and record log μ, but of a policy that is somewhat off, as an engine's is."""
    ids = trainer.processing_class(prompts).input_ids
    completions, log_probs = [], []
    with torch.no_grad():
        for row in ids:
            tokens, recorded = torch.tensor([row]), []
            for _ in range(WIDTH):
                every = (1.1 * trainer.model(tokens).logits[0, -1]).log_softmax(-1)
                token = torch.multinomial(every.exp(), 1)
                tokens = torch.cat([tokens, token[None]], dim=1)
                recorded.append(float(every[token]))
            completions.append(tokens[0, len(row) :].tolist())
            log_probs.append(recorded)
    return {"prompt_ids": ids, "completion_ids": completions, "logprobs": log_probs}


def parameters(trainer: Any) -> Any:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def figures(trainer: Any) -> list[dict[str, float]]:
    return [row for row in trainer.state.log_history if "entropy" in row]


def compare(make: Any, settings: dict[str, Any]) -> tuple[float, float, list[dict[str, float]], list[dict[str, float]]]:
    """Largest differences of the micro-batches' losses and of the final parameters, native to ours, and both logs."""
    native = make(trl.GRPOTrainer, settings={"epsilon": 0.2, "epsilon_high": 0.28, "delta": 3.0, **settings})
    native.train()
    ours = make(settings=settings, objective=PPOClip(eps_low=0.2, eps_high=0.28, dual_clip=3.0))
    ours.train()
    assert len(ours.losses) == len(native.losses) == 2 * STEPS
    loss = max(float((a - b).abs()) for a, b in zip(ours.losses, native.losses, strict=True))
    moved = float((parameters(ours) - parameters(native)).abs().max())
    return loss, moved, figures(ours), figures(native)


@pytest.mark.filterwarnings("ignore::drpo_core.SlowEngineWarning")
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "bnpo", "dr_grpo"])
def test_ppo_clip_is_native_to_the_last_bit(make: Any, loss_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As array operations, which are torch's own: an exponential of the compiled loop may be one rounding from them.

    All completions are equally long, so that the denominators are powers of two, by which division is exact. With others
    TRL rounds (A / N) r where we round (A r) / N: see the next test, which is of the compiled loop.
    """
    monkeypatch.setitem(engines.run_pass.__globals__, "loop_for", lambda *_: None)
    settings = {"loss_type": loss_type, "generation_kwargs": {"min_new_tokens": WIDTH}}
    loss, moved, mine, theirs = compare(make, settings)
    # TRL adds up each sequence before the batch, here all tokens are added up at once
    assert loss <= (2.0**-24 if loss_type == "grpo" else 0.0)
    assert moved == 0.0
    assert len(mine) == len(theirs) == STEPS
    for name in ("entropy", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"):
        assert [row[name] for row in mine] == pytest.approx([row[name] for row in theirs], rel=1e-6), name
    # ratios have left 1 and are clipped, or this would show little
    assert max(row["trust_region/ratio_max"] for row in mine) > 1.28
    assert max(row["clip_ratio/region_mean"] for row in mine) > 0.0


@pytest.mark.usefixtures("compiled_only")
@pytest.mark.parametrize(
    "settings",
    [
        *({"loss_type": loss_type} for loss_type in ("dapo", "grpo", "bnpo", "dr_grpo")),
        {"beta": 0.1},
        {"beta": 0.1, "use_bias_correction_kl": False},
        {"top_entropy_quantile": 0.5},
        {"off_policy_mask_threshold": 0.001},
    ],
    ids=str,
)
def test_ppo_clip_is_native_to_rounding(make: Any, settings: dict[str, Any]) -> None:
    """Completions of any length, and what TRL adds to its loss; SGD, as Adam blows up the rounding of tiny gradients."""
    loss, moved, mine, theirs = compare(make, {"optim": "sgd", "learning_rate": 2.0, "max_grad_norm": 0.0, **settings})
    assert loss < 1e-6
    assert moved < 1e-6
    if "beta" in settings:
        assert [row["kl"] for row in mine] == pytest.approx([row["kl"] for row in theirs], rel=1e-4, abs=1e-8)
    assert max(row["trust_region/ratio_max"] for row in mine) > 1.01


@pytest.mark.usefixtures("compiled_only")
@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_trains_with_every_objective(make: Any, objective: Any) -> None:
    trainer = make(objective=objective, rollout_func=rollout)
    before = parameters(trainer)
    with warnings.catch_warnings():
        warnings.simplefilter("error", BehaviorPolicyWarning)
        trainer.train()
    after = parameters(trainer)
    assert bool(torch.isfinite(after).all())
    assert float((after - before).abs().max()) > 0.0
    logged = figures(trainer)
    assert len(logged) == STEPS
    for row in logged:
        assert row["trust_region/invalid_fraction"] == 0.0
        assert row["trust_region/binary_tv_max"] > 0.0


def test_objectives_differ_off_policy(make: Any) -> None:
    """With μ from the sampler, no two objectives end at the same parameters."""
    ends = []
    for objective in OBJECTIVES:
        trainer = make(objective=objective, rollout_func=rollout)
        trainer.train()
        ends.append(parameters(trainer))
    for i, one in enumerate(ends):
        for other in ends[:i]:
            assert float((one - other).abs().max()) > 0.0


def inputs_of(trainer: Any, **changes: Any) -> dict[str, Any]:
    torch.manual_seed(1)
    ids = torch.randint(3, 20, (4, WIDTH))
    inputs = {
        "prompt_ids": ids[:, :3],
        "prompt_mask": torch.ones_like(ids[:, :3]),
        "completion_ids": ids,
        "completion_mask": torch.ones_like(ids),
        "advantages": torch.tensor([1.0, -1.0, 0.5, -0.5]),
        "num_items_in_batch": torch.tensor(4 * WIDTH),
        **changes,
    }
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return inputs


def test_anchors_in_order_and_warns(make: Any) -> None:
    trainer = make(objective=DRPO(delta=0.5), settings={"steps_per_generation": 1, "gradient_accumulation_steps": 1})
    sampled, old = torch.full((4, WIDTH), -1.0), torch.full((4, WIDTH), -2.0)

    def ratio(**anchors: Any) -> float:
        trainer._metrics["train"].clear()
        trainer._compute_loss(trainer.model, inputs_of(trainer, **anchors))
        return trainer._metrics["train"]["trust_region/ratio_mean"][0]

    by_sampled = ratio(sampling_per_token_logps=sampled, old_per_token_logps=old)
    with pytest.warns(BehaviorPolicyWarning, match="old_per_token_logps, which the trainer recomputes"):
        by_old = ratio(old_per_token_logps=old)
    assert by_old == pytest.approx(by_sampled * torch.e, rel=1e-5)
    with pytest.warns(BehaviorPolicyWarning, match="every ratio is 1"):
        assert ratio() == 1.0
    nan = torch.full_like(sampled, torch.nan)
    assert ratio(sampling_per_token_logps=nan, old_per_token_logps=old) == pytest.approx(by_old)
    assert ratio(sampling_per_token_logps=nan) == 1.0


class Own:
    """An objective of a user: half of −A r."""

    def loss(self, tokens: Any) -> Any:
        """−A r / 2."""
        return -0.5 * tokens.advantages * tokens.ratio

    def weight(self, tokens: Any) -> Any:
        """1 / 2."""
        return 0.5 * tokens.xp.ones_like(tokens.ratio)


AGGREGATIONS = {
    "dapo": lambda values, mask: values.sum() / mask.sum(),
    "grpo": lambda values, mask: (values.sum(-1) / mask.sum(-1).clip(1)).mean(),
    "bnpo": lambda values, mask: values.sum() / mask.sum(),
    "dr_grpo": lambda values, mask: values.sum() / (len(mask) * WIDTH),
}


@pytest.mark.usefixtures("compiled_only")
@pytest.mark.parametrize("loss_type", AGGREGATIONS)
@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_loss_is_the_librarys_and_the_aggregation_trls(
    make: Any, loss_type: str, accumulated: int, *, training: bool
) -> None:
    """Of ragged completions, one of them empty, for an objective of a user."""
    settings = {"loss_type": loss_type, "gradient_accumulation_steps": 2, "steps_per_generation": 2}
    trainer = make(objective=Own(), settings=settings)
    mask = torch.arange(WIDTH) < torch.tensor([[8], [5], [0], [3]])
    inputs = inputs_of(trainer, completion_mask=mask.long(), sampling_per_token_logps=torch.full((4, WIDTH), -3.0))
    inputs["num_items_in_batch"] = mask.sum()
    trainer.current_gradient_accumulation_steps = accumulated
    trainer.model.train(training)
    ids, both = (torch.cat([inputs["prompt_" + kind], inputs["completion_" + kind]], dim=1) for kind in ("ids", "mask"))
    with torch.no_grad():
        log_prob, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, both, WIDTH, compute_entropy=True)
        loss = float(trainer._compute_loss(trainer.model, inputs))
    advantages = inputs["advantages"][:, None].expand_as(log_prob)
    arrays = (log_prob.numpy(), inputs["sampling_per_token_logps"].numpy(), advantages.numpy())
    per_token = token_loss_and_gradient(Own(), *arrays, mask=mask.numpy()).loss
    expected = AGGREGATIONS[loss_type](per_token, mask.numpy())
    # "dapo" is given the count of a generation batch of two windows' worth of steps
    factor = (2 / accumulated if loss_type == "dapo" else 1 / accumulated) if training else 1.0
    assert loss == pytest.approx(expected * factor, rel=1e-6)


def test_masked_positions_may_hold_anything(make: Any) -> None:
    trainer = make(objective=DRPO(delta=0.5), settings={"beta": 0.1})
    mask = torch.ones(4, WIDTH, dtype=torch.long)
    mask[:, 5:] = 0
    sampled = torch.full((4, WIDTH), -3.0)
    losses = []
    for filler in (0.0, torch.inf, -torch.inf, 1e30):
        reference = torch.where(mask.bool(), -2.0, filler)
        inputs = inputs_of(
            trainer,
            completion_mask=torch.ones_like(mask),
            tool_mask=mask,
            sampling_per_token_logps=torch.where(mask.bool(), sampled, filler),
            ref_per_token_logps=reference,
        )
        trainer.model.zero_grad()
        loss = trainer._compute_loss(trainer.model, inputs)
        loss.backward()
        losses.append(float(loss))
        assert all(bool(torch.isfinite(p.grad).all()) for p in trainer.model.parameters() if p.grad is not None)
    assert losses == [losses[0]] * len(losses)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "cispo"}, "loss_type"),
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level"),
        ({"entropy_coef": 0.1}, "entropy_coef"),
    ],
)
def test_refuses_what_it_would_ignore(make: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(settings=settings, objective=DRPO(delta=0.15))


def test_evaluates(make: Any, tokenizer: Any) -> None:
    del tokenizer
    data = Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS[:2]])
    settings = {"per_device_eval_batch_size": 4}
    trainer = make(objective=DRPO(delta=0.15), rollout_func=rollout, settings=settings, eval_dataset=data)
    assert "eval_trust_region/ratio_mean" in trainer.evaluate()


def test_only_the_loss_is_replaced() -> None:
    """What the next release of TRL can break: names that the mixin uses, beside the method that it replaces."""
    own = {
        name for name in vars(PolicyLossMixin) if callable(getattr(PolicyLossMixin, name)) and hasattr(trl.GRPOTrainer, name)
    }
    assert own - {"__init__", "__doc__", "__class__"} == {"_compute_loss"}
    assert list(inspect.signature(trl.GRPOTrainer._compute_loss).parameters) == ["self", "model", "inputs"]
    score = list(inspect.signature(trl.GRPOTrainer._get_per_token_logps_and_entropies).parameters)
    assert score[1:8] == [
        "model",
        "input_ids",
        "attention_mask",
        "logits_to_keep",
        "batch_size",
        "compute_entropy",
        "compute_aux_loss",
    ]


def test_mixin_composes() -> None:
    class Trainer(PolicyLossMixin, trl.GRPOTrainer):
        pass

    assert Trainer._compute_loss is PolicyLossMixin._compute_loss
    assert issubclass(PolicyLossTrainer, trl.GRPOTrainer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "objective" in inspect.signature(Trainer).parameters
