"""Updates by verl's own TrainingWorker with its FSDP2 engine, on CPU; run by test_worker.py.

verl has no CPU platform. One is registered here through its plug-in interface, and its engine is registered for it; model,
optimiser, micro-batches, loss and metrics are verl's. Prints one line of JSON: by loss_mode, parameters and metrics.
"""

# ruff: noqa: PLC0415 -- the CPU platform comes before the imports that ask for a device

import json
import os
import socket
import sys
import tempfile
from functools import partial
from types import SimpleNamespace

import torch
from hydra import compose, initialize_config_module
from tensordict import TensorDict
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from verl.plugin.platform.platform_cuda import PlatformCUDA
from verl.plugin.platform.platform_manager import PlatformRegistry

VOCABULARY = 32
PROMPTS, RESPONSES = (3, 2, 5, 1), (4, 6, 2, 3)
ACTOR = "actor_rollout_ref.actor"


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformCUDA):
    """What verl asks of a device, of a CPU."""

    device_name = vendor_name = "cpu"

    @property
    def device_module(self):
        """torch.cpu, with the figures of a device that has no memory of its own."""
        counters = ("max_memory_allocated", "max_memory_reserved", "memory_allocated", "memory_reserved")
        return SimpleNamespace(
            **{name: getattr(torch.cpu, name) for name in torch.cpu.__all__},
            **dict.fromkeys(counters, lambda *_: 0),
            mem_get_info=lambda *_: (0, 0),
            empty_cache=lambda: None,
            get_device_name=lambda *_: "cpu",
            manual_seed=torch.manual_seed,
        )

    def is_available(self):
        """It is."""
        return True

    def current_device(self):
        """Where tensors are put."""
        return "cpu"

    def set_device(self, device_index):
        """There is one."""

    def manual_seed(self, seed):
        """Torch's own."""
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def empty_cache(self):
        """There is none."""

    def communication_backend_name(self):
        """The one of CPUs."""
        return "gloo"


def save_model(folder):
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = Qwen2Config(vocab_size=VOCABULARY, num_hidden_layers=2, max_position_embeddings=64, **size)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCABULARY)}, "t0"))
    special = {"pad_token": "t0", "eos_token": "t1"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)


def batch():
    """One mini-batch as the trainer sends it: nested tensors, and what the engine is to do with them."""
    from verl.utils import tensordict_utils as tu

    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(2, VOCABULARY, (n,), generator=generator) for n in PROMPTS]
    responses = [torch.randint(2, VOCABULARY, (n,), generator=generator) for n in RESPONSES]
    fields = {
        "prompts": prompts,
        "responses": responses,
        "input_ids": [torch.cat(pair) for pair in zip(prompts, responses, strict=True)],
        "position_ids": [torch.arange(p + r) for p, r in zip(PROMPTS, RESPONSES, strict=True)],
        "response_mask": [torch.ones(n, dtype=torch.int64) for n in RESPONSES],
        "loss_mask": [torch.ones(n, dtype=torch.int64) for n in RESPONSES],
        "old_log_probs": [-3.4 + 0.3 * torch.randn(n, generator=generator) for n in RESPONSES],
        "advantages": [torch.randn(n, generator=generator) for n in RESPONSES],
    }
    nested = {name: torch.nested.as_nested_tensor(rows, layout=torch.jagged) for name, rows in fields.items()}
    data = TensorDict(nested, batch_size=len(PROMPTS))
    tu.assign_non_tensor(
        data,
        global_batch_size=len(PROMPTS),
        mini_batch_size=len(PROMPTS),
        epochs=3,
        seed=42,
        dataloader_kwargs={"shuffle": False},
        temperature=1.0,
        use_dynamic_bsz=False,
        micro_batch_size_per_gpu=2,
        calculate_entropy=False,
        use_remove_padding=False,
    )
    return data


def update(folder, loss_mode):
    """Three updates; the parameters after them and the metrics of each."""
    from verl.utils import tensordict_utils as tu
    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers.config import TrainingWorkerConfig
    from verl.workers.engine_workers import TrainingWorker
    from verl.workers.utils.losses import ppo_loss

    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose(
            "ppo_trainer",
            [
                f"{ACTOR}.policy_loss.loss_mode={loss_mode}",
                f"{ACTOR}.clip_ratio_low=0.002",
                f"{ACTOR}.clip_ratio_high=0.004",
                f"+{ACTOR}.use_rollout_log_probs=true",
                f"{ACTOR}.strategy=fsdp2",
                f"{ACTOR}.ppo_micro_batch_size_per_gpu=2",
                f"{ACTOR}.optim.lr=1e-3",
                # or Adam would divide rounding errors by their own size where the gradient is 0
                f"+{ACTOR}.optim.override_optimizer_config.eps=1e-3",
                f"{ACTOR}.fsdp_config.use_torch_compile=false",
                f"{ACTOR}.fsdp_config.dtype=float32",
                f"+{ACTOR}.fsdp_config.mixed_precision={{param_dtype:fp32,reduce_dtype:fp32,buffer_dtype:fp32}}",
                f"actor_rollout_ref.model.path={folder}",
                "actor_rollout_ref.model.use_remove_padding=false",
                "+actor_rollout_ref.model.override_config.attn_implementation=eager",
            ],
        )
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    actor.model_config = omega_conf_to_dataclass(config.actor_rollout_ref.model)
    settings = TrainingWorkerConfig(
        model_type="language_model",
        model_config=actor.model_config,
        engine_config=actor.engine,
        optimizer_config=actor.optim,
        checkpoint_config=actor.checkpoint,
    )
    settings.engine_config.use_dynamic_bsz = False
    settings.engine_config.micro_batch_size_per_gpu = settings.engine_config.infer_micro_batch_size_per_gpu = 2
    worker = TrainingWorker(config=settings)
    worker.reset()
    worker.set_loss_fn(partial(ppo_loss, config=actor))
    metrics = tu.get(worker.train_mini_batch(batch()), "metrics")
    parameters = torch.cat([p.detach().full_tensor().flatten() for p in worker.engine.module.parameters()])
    return {
        "parameters": parameters.tolist(),
        "metrics": {k: [float(x) for x in v] for k, v in metrics.items() if k.startswith("actor/") or k == "grad_norm"},
    }


def main(path, modes):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(VERL_PLATFORM="cpu", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    # verl would ask for "cpu:gloo,cpu:gloo", which torch refuses; it takes a process group that exists
    torch.distributed.init_process_group("gloo")
    from verl.workers.engine import EngineRegistry
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

    EngineRegistry.register(model_type="language_model", backend=["fsdp2"], device=["cpu"])(FSDPEngineWithLMHead)
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder)
        results = {mode: update(folder, mode) for mode in modes}
    with open(path, "w") as file:  # noqa: PTH123
        json.dump(results, file)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
