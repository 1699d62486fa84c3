"""Two ranks train and export: FSDP2, DDP, LoRA under FSDP2; then an export that fails on rank 0.

Launched with 2 ranks; argument: a folder. Writes `<case>/epoch_0`, `<case>_logits.pt`, `checkpoints/`, `raised_<rank>`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from composer.models import HuggingFaceModel
from composer.utils import dist
from composer.utils.parallelism import FSDP2Config
from peft import LoraConfig, get_peft_model

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.exporting import new_exporter
from support.tiny_training import RandomLists, new_hf_model, new_tokenizer, new_trainer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import rankllm_composer.distributed
from rankllm_composer.training.progress import MetricsFile, ProgressLine


def run(folder: Path, case: str, **options) -> None:
    model = new_hf_model("llama_tied")
    if case.endswith("lora"):
        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
        lora = dict(model.named_parameters())
        torch.manual_seed(3)
        for name in sorted(lora):
            if "lora_B" in name:  # adapters start at zero; ten steps would change too little
                torch.nn.init.normal_(lora[name], std=0.1)
    model.config.use_cache = False
    model.fsdp_wrap_fn = lambda module: isinstance(module, LlamaDecoderLayer)
    model.activation_checkpointing_fn = model.fsdp_wrap_fn
    model = HuggingFaceModel(model, new_tokenizer())
    if case.startswith("fsdp2"):
        options["parallelism_config"] = {"fsdp": FSDP2Config(activation_checkpointing=True)}
    loggers = [MetricsFile(folder / case / "metrics.jsonl"), ProgressLine()]
    trainer = new_trainer(
        model, "1ep", callbacks=[new_exporter(folder / case, "llama_tied")], loggers=loggers, **options
    )
    trainer.fit()
    model.eval()
    with torch.no_grad():
        logits = trainer.state.model({"input_ids": RandomLists(2).rows}).logits
    if dist.get_global_rank() == 0:
        torch.save(logits, folder / f"{case}_logits.pt")
    dist.barrier()
    trainer.close()


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    dist.initialize_dist("cpu")
    rank = dist.get_global_rank()
    checkpoints = {"save_folder": str(folder / "checkpoints"), "save_interval": "1ep"}
    run(folder, "fsdp2", **checkpoints)
    run(folder, "ddp")
    # As if writing took longer than a collective's timeout: rank 0 sends heartbeats to the other ranks meanwhile.
    rankllm_composer.distributed.HEARTBEAT_SECONDS = 0.01
    run(folder, "fsdp2_lora")
    if rank == 0:
        (folder / "occupied" / "epoch_0").mkdir(parents=True)
        (folder / "occupied" / "epoch_0" / "thesis.tex").write_text("mine")
    dist.barrier()
    try:
        run(folder, "occupied")
    except ValueError as error:
        (folder / f"raised_{rank}").write_text(f"{type(error).__name__}: {error}")
    dist.barrier()


main()
