"""Train two batches under FSDP2 with NEFTune and activation checkpointing; each rank saves its embedding outputs.

Launched with 2 ranks; argument: a folder with the weights to start from, `initial.pt`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from composer import Callback
from composer.utils import dist
from composer.utils.parallelism import FSDP2Config
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.noised_training import data_spec, new_lists, new_model, new_trainer, record_outputs

from rankllm_composer.distributed import average_sharded_gradients


def full_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    # With cpu_offload, only rank 0 gets the full weights.
    shared = [weights]
    torch.distributed.broadcast_object_list(shared)
    return {name: value.clone() for name, value in shared[0].items()}


class WeightsAfterOneBatch(Callback):
    weights: dict[str, torch.Tensor]

    def batch_end(self, state, logger) -> None:
        if state.timestamp.batch == 1:
            self.weights = full_weights(state.model.model)


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    dist.initialize_dist("cpu")
    rank = dist.get_global_rank()
    model = new_model(activation_checkpointing=1.0)
    model.model.load_state_dict(torch.load(folder / "initial.pt"))
    after_one_batch = WeightsAfterOneBatch()
    trainer = new_trainer(
        model,
        data_spec(new_lists(8), 2, 1),
        "1ep",
        callbacks=[after_one_batch],
        parallelism_config={"fsdp": FSDP2Config()},
    )
    average_sharded_gradients(model)
    outputs = record_outputs(model)
    trainer.fit()
    final = full_weights(model.model)
    torch.save(
        {"outputs": outputs, "after_one_batch": after_one_batch.weights, "final": final}, folder / f"rank_{rank}.pt"
    )
    trainer.close()


if __name__ == "__main__":
    main()
