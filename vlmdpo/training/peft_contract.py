"""What vlmdpo relies on in accelerate and PEFT without their promise: see `trl_contract`."""

from __future__ import annotations

from vlmdpo.training.contract import (
    attributes,
    called,
    classes,
    environment,
    messages,
    patched,
)

ACCELERATE = (
    *environment(
        "distributed/processes",
        "accelerate.utils.launch:ACCELERATE_USE_FSDP",
        "accelerate.utils.launch:FSDP_VERSION",
        "accelerate.utils.launch:ACCELERATE_USE_DEEPSPEED",
        "accelerate.utils.launch:ACCELERATE_DEEPSPEED_ZERO_STAGE",
        why="how the launcher tells its processes the strategy, before accelerate has a state",
        breaks="a sharded run would be set up as if each process had the whole model",
    ),
    *called(
        "distributed/launch",
        "accelerate.commands.launch.launch_command(args)",
        "accelerate.commands.launch.launch_command_parser()",
        why="starts processes in a thread, where torch's launcher leaves signals alone",
        breaks="--num-processes",
    ),
    *attributes(
        "training/run_trainer training/sharding",
        "accelerate.state.AcceleratorState.fsdp_plugin",
        "accelerate.state.PartialState.distributed_type",
        "accelerate.FullyShardedDataParallelPlugin.transformer_cls_names_to_wrap",
        why="FSDP is switched on on CPUs, with the language layers as its units",
        breaks="--strategy fsdp2 on CPUs, and with images in some batches only",
    ),
    *attributes(
        "training/sharding",
        "accelerate.FullyShardedDataParallelPlugin.mixed_precision_policy",
        why="log-probs and the sum of gradients stay float32 beside bfloat16 arithmetic",
        breaks="log-probs under FSDP2 would be rounded to whole nats, also those in the cache",
    ),
    *patched(
        "training/auto_batch",
        "accelerate.Accelerator.gather(self, tensor)",
        "accelerate.Accelerator.gather_for_metrics(self, input_data, use_gather_object)",
        why="replaced while parts are computed: a process without memory would be awaited forever",
        breaks="--auto-batch-size with several processes",
    ),
    *patched(
        "training/sharding",
        "accelerate.Accelerator.prepare(self, args, device_placement)",
        why="replaced to hide the embeddings from FSDP while it wraps the model",
        breaks="gradients of the head would stay unsynchronized between processes",
    ),
)

PEFT = (
    *classes(
        "benchmarks/ask",
        "peft.tuners.tuners_utils.BaseTunerLayer",
        "peft.utils.other.AuxiliaryTrainingWrapper",
        why="tell whether an adapter changes what image features are made of",
        breaks="eval-amber would reuse image features that the adapter changes",
    ),
    *attributes(
        "models/adapters",
        "peft.tuners.tuners_utils.BaseTunerLayer._disable_adapters",
        "peft.tuners.tuners_utils.BaseTunerLayer._active_adapter",
        why="an adapter is switched for a forward pass without touching `requires_grad`",
        breaks="reference log-probs would be the policy's",
    ),
    *classes(
        "models/adapters",
        "peft.tuners.tuners_utils.BaseTunerLayer",
        "peft.utils.other.AuxiliaryTrainingWrapper",
        why="the modules that an adapter changes, each with a switch",
        breaks="reference log-probs would be the policy's",
    ),
    *attributes(
        "training/results training/doctor",
        "peft.PeftModel.peft_config",
        why="the saved adapter names its base model as the user did",
        breaks="adapters of the embedded model would name a folder of this machine",
    ),
    *messages(
        "training/make_trainer",
        "peft.tuners.tuners_utils:Target modules",
        "peft.tuners.lora.layer:does not work with lora_dropout",
        why="a wrong --lora-target-modules, and dropout on experts, are recognized by these words",
        breaks="a clear message for it",
    ),
    *messages(
        "engine/side_by_side",
        "peft.tuners.lora.layer:adapter_names",
        "peft.tuners.lora.layer:__base__",
        why="one batch holds rows with and without adapter, unless PEFT refuses in these words",
        breaks="vlmdpo compare on models that PEFT cannot mix",
    ),
)
