"""Updates by SkyRL's own FSDP policy worker, on CPU; run by test_worker.py.

SkyRL knows no device but CUDA, and imports flash-attn, which can't be built without it. Here the names of its CUDA calls
lead to the CPU, and flash-attn's two functions, which only packed sequences need, are absent. Configuration, worker, model
wrapper, FSDP2 strategy, micro-batches, loss, optimiser and metrics are SkyRL's. Writes JSON: by policy loss, the
parameters after three updates and the metrics of each.
"""

import json
import os
import socket
import sys
import tempfile
from types import ModuleType
from unittest.mock import patch

import torch
from drpo_torch.integrations import skyrl  # noqa: F401 -- registers the losses
from skyrl.backends.skyrl_train.distributed import fsdp_utils
from skyrl.backends.skyrl_train.training_batch import TrainingInputBatch
from skyrl.backends.skyrl_train.utils.ppo_utils import apply_loss_reduction_to_advantages_minibatch
from skyrl.train.config import SkyRLTrainConfig
from transformers import Qwen2Config, Qwen2ForCausalLM

flash_attn = {name: ModuleType(name) for name in ("flash_attn", "flash_attn.bert_padding")}
flash_attn["flash_attn.bert_padding"].pad_input = flash_attn["flash_attn.bert_padding"].unpad_input = None
with patch.dict(sys.modules, flash_attn):
    from skyrl.backends.skyrl_train.workers.fsdp.fsdp_worker import FSDPPolicyWorkerBase

VOCABULARY = 32
PROMPT, RESPONSE = 5, 6
LENGTHS = (4, 6, 1, 3)
ALGORITHM = "trainer.algorithm"


def on_cpu():
    """What SkyRL asks of CUDA, of the CPU."""
    of_mesh = torch.distributed.device_mesh.init_device_mesh

    def mesh(device_type, **kwargs):
        del device_type
        return of_mesh("cpu", **kwargs)

    torch.distributed.device_mesh.init_device_mesh = fsdp_utils.init_device_mesh = mesh
    torch.cuda.current_device = lambda: "cpu"
    torch.cuda.set_device = lambda _: None
    torch.cuda.empty_cache = torch.cuda.synchronize = lambda: None
    torch.Tensor.cuda = lambda tensor: tensor


def save_model(folder):
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = Qwen2Config(vocab_size=VOCABULARY, num_hidden_layers=2, max_position_embeddings=64, **size)
    Qwen2ForCausalLM(config).save_pretrained(folder)


def batch(reduction):
    """One mini-batch as the trainer sends it: padded on the left, responses at the right, advantages scaled by it."""
    generator = torch.Generator().manual_seed(1)
    rows = len(LENGTHS)
    response = torch.arange(RESPONSE) < torch.tensor(LENGTHS)[:, None]
    loss_mask = response.float()
    loss_mask[1, 2] = 0.0  # a tool's token, say
    attention_mask = torch.cat([torch.ones(rows, PROMPT, dtype=torch.bool), response], dim=1).long()
    attention_mask[0, :2] = 0

    behavior_log_prob = torch.where(response, -3.4 + 0.3 * torch.randn(rows, RESPONSE, generator=generator), 0.0)
    advantages = torch.randn(rows, RESPONSE, generator=generator)
    data = TrainingInputBatch(
        {
            "sequences": torch.randint(2, VOCABULARY, (rows, PROMPT + RESPONSE), generator=generator),
            "attention_mask": attention_mask,
            "response_mask": response.long(),
            "loss_mask": loss_mask,
            # most of SkyRL's own losses take the former, this library the latter
            "action_log_probs": behavior_log_prob,
            "rollout_logprobs": behavior_log_prob,
            "advantages": apply_loss_reduction_to_advantages_minibatch(advantages, loss_mask, reduction, 2, RESPONSE),
        }
    )
    data.metadata = {"response_length": RESPONSE}
    return data


def update(folder, loss_type, dppo_type="binary_tv"):
    """Three updates; the parameters after them and the metrics of each."""
    reduction = "sequence_mean" if "gspo" in loss_type else "token_mean"
    config = SkyRLTrainConfig.from_cli_overrides(
        [
            f"{ALGORITHM}.policy_loss_type={loss_type}",
            f"{ALGORITHM}.loss_reduction={reduction}",
            f"{ALGORITHM}.eps_clip_low=0.002",
            f"{ALGORITHM}.eps_clip_high=0.004",
            f"{ALGORITHM}.dppo.delta_low={0.002 if dppo_type == 'binary_tv' else 0.0002}",
            f"{ALGORITHM}.dppo.delta_high={0.004 if dppo_type == 'binary_tv' else 0.0004}",
            f"{ALGORITHM}.dppo.dppo_type={dppo_type}",
            f"{ALGORITHM}.clip_ratio_c=1.3",
            f"{ALGORITHM}.cispo.cispo_eps_clip_low=1.0",
            f"{ALGORITHM}.cispo.cispo_eps_clip_high=0.1",
            f"{ALGORITHM}.temperature=1.0",
            f"{ALGORITHM}.use_kl_loss=false",
            f"trainer.policy.model.path={folder}",
            "trainer.policy.fsdp_config.mixed_precision.param_dtype=fp32",
            "trainer.policy.optimizer_config.lr=1e-3",
            "trainer.policy.optimizer_config.num_warmup_steps=0",
            "trainer.micro_train_batch_size_per_gpu=2",
            "trainer.flash_attn=false",
            "trainer.remove_microbatch_padding=false",
            "trainer.gradient_checkpointing=false",
            "trainer.use_expandable_segments=false",
        ]
    )
    worker = FSDPPolicyWorkerBase(
        cfg=config.trainer,
        world_size=1,
        rank=0,
        local_rank=0,
        master_addr="127.0.0.1",
        master_port=os.environ["MASTER_PORT"],
        sequence_parallel_size=1,
    )
    worker.init_worker_process_group()
    worker.init_model(folder, num_training_steps=10)
    # SkyRL sets none of AdamW's ε; its own would divide rounding errors by their size where the gradient is 0
    worker.optimizer.param_groups[0]["eps"] = 1e-3
    data = batch(reduction)
    metrics = []
    for _ in range(3):
        of_step = worker.forward_backward(data).metrics
        metrics.append(of_step | {"grad_norm": float(worker.optim_step())})
    parameters = torch.cat([p.detach().full_tensor().flatten() for p in worker.model.model.parameters()])
    return {"parameters": parameters.tolist(), "metrics": metrics}


def main(path, loss_types):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK="0", WORLD_SIZE="1")
    on_cpu()
    # SkyRL would ask for nccl as well; it takes a process group that exists
    torch.distributed.init_process_group("gloo")
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder)
        results = {name: update(folder, *name.split(":")) for name in loss_types}
    with open(path, "w") as file:  # noqa: PTH123
        json.dump(results, file)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
