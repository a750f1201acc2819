"""The modes of TRL against `_compute_loss` of the installed TRL, with log-probs in the place of a model's."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
trl = pytest.importorskip("trl", reason="TRL is not installed: nox -s integration-trl")

from trl import GRPOConfig, GRPOTrainer  # noqa: E402
from trl.experimental.gmpo import GMPOConfig, GMPOTrainer  # noqa: E402

from drpo_core import modes, policy_loss_and_gradient  # noqa: E402
from drpo_core.modes._trl import DEFAULTS, LOSSES  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

EPSILON = {"epsilon": 0.1, "epsilon_high": 0.15}
CASES = [
    *((name, EPSILON) for name in ("grpo", "bnpo", "dapo", "dr_grpo", "luspo", "gmpo")),
    ("cispo", {"epsilon_high": 1.1}),
    ("sapo", {}),
    ("vespo", {}),
    ("grpo", {"delta": 1.3}),
]
VARIANTS = [
    {},
    {"beta": 0.2},
    {"beta": 0.2, "use_bias_correction_kl": False, "importance_sampling_level": "sequence"},
    {"importance_sampling_level": "sequence", "off_policy_mask_threshold": 0.02},
    {"use_vllm": True, "beta": 0.2, "vllm_importance_sampling_clip_max": 1.1},
    {"use_vllm": True, "vllm_importance_sampling_correction": False, "off_policy_mask_threshold": 0.02},
]


@pytest.fixture(autouse=True)
def float64():
    """SAPO and VESPO choose between Python numbers by the advantage, in torch's default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def batch(rows=12, width=9):
    generator = torch.Generator().manual_seed(0)

    def noise(scale):
        return scale * torch.randn(rows, width, generator=generator, dtype=torch.float64)

    sampling = -torch.exp(noise(1.0))
    old = torch.clamp(sampling + noise(0.03), max=-1e-3)
    current = torch.clamp(old + noise(0.1), max=-1e-3)
    reference = torch.clamp(current + noise(0.3), max=-1e-3)
    lengths = torch.randint(1, width + 1, (rows, 1), generator=generator)
    return sampling, old, current, reference, noise(1.0)[:, 0], torch.arange(width) < lengths


def sampler_ratio(old, sampling, mask, values):
    """What TRL puts into the inputs of its loss, in its default mode."""
    ratio = torch.exp(((old - sampling) * mask).sum(dim=-1, keepdim=True))
    high = values["vllm_importance_sampling_clip_max"]
    return ratio.masked_fill(ratio > (math.inf if high is None else high), 0.0)


def theirs(loss_type, values):
    """Loss and gradient of TRL's method, on a stand-in for the trainer."""
    sampling, old, current, reference, advantages, mask = batch()
    x = current.requires_grad_()
    vllm = values["use_vllm"]
    trainer = SimpleNamespace(
        **{name: values[name] for name in values if name not in ("epsilon", "epsilon_high")},
        args=SimpleNamespace(**values, steps_per_generation=1),
        epsilon_low=values["epsilon"],
        epsilon_high=values["epsilon"] if values["epsilon_high"] is None else values["epsilon_high"],
        loss_type=loss_type,
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(
            num_processes=1, gather=lambda array: array, reduce=lambda array, **_options: array, sync_gradients=True
        ),
        _get_per_token_logps_and_entropies=lambda *_args, **_options: (x, torch.zeros_like(x), None),
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        use_adaptive_entropy=False,
        current_gradient_accumulation_steps=1,
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
    )
    trainer._metrics = {"train": defaultdict(list)}
    ids = torch.zeros_like(mask, dtype=torch.int64)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": ids[:, :1],
        "completion_ids": ids,
        "completion_mask": mask.to(torch.float64),
        "advantages": advantages,
        "old_per_token_logps": old if vllm else sampling,
        "ref_per_token_logps": reference,
        "num_items_in_batch": mask.sum().to(torch.float64),
    }
    if vllm:
        inputs["sampling_per_token_logps"] = sampling
        if values["vllm_importance_sampling_correction"]:
            inputs["importance_sampling_ratio"] = sampler_ratio(old, sampling, mask, values)
    method = GMPOTrainer if loss_type == "gmpo" else GRPOTrainer
    loss = method._compute_loss(trainer, trainer.model, inputs)
    (gradient,) = torch.autograd.grad(loss, x)
    return loss.detach(), gradient


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize(("loss_type", "keys"), CASES, ids=str)
def test_loss_and_gradient_are_trls(loss_type, keys, variant):
    given = {**keys, **({} if loss_type == "gmpo" else variant)}
    mode = modes.trl(loss_type, **given)
    expected_loss, expected = theirs(loss_type, {**DEFAULTS, **given})
    sampling, old, current, reference, advantages, mask = batch()
    others = {"proximal_log_prob": old, "reference_log_prob": reference}
    expanded = advantages[:, None].expand(mask.shape).clone()
    behavior = sampling
    ours = policy_loss_and_gradient(
        mode, current, behavior, expanded, mask=mask, **{name: others[name] for name in mode.arguments}
    )
    torch.testing.assert_close(ours.gradient, expected, rtol=0.0, atol=1e-9 * float(expected.abs().max()))
    if loss_type != "gmpo":
        torch.testing.assert_close(ours.loss, expected_loss, rtol=1e-9, atol=1e-12)


def test_defaults_are_trls():
    fields = {name: field.default for name, field in GRPOConfig.__dataclass_fields__.items()}
    assert {name: fields[name] for name in DEFAULTS} == DEFAULTS
    assert fields["loss_type"] == "dapo"
    assert GMPOConfig.__dataclass_fields__["epsilon"].default == modes.trl("gmpo").corrections[0].eps_low == 0.4
    assert all(f"`{name!r}`".replace("'", '"') in (GRPOConfig.__doc__ or "") for name in LOSSES if name != "gmpo")
