"""The part of the contract that is PyTorch's, datasets' and gradio's, or about devices and data
loaders; see `trl_contract`."""

from __future__ import annotations

from vlmdpo.training.contract import (
    attributes,
    called,
    classes,
    environment,
    messages,
    overridden,
    patched,
)

TORCH = (
    *attributes(
        "engine/forward engine/side_by_side",
        "torch.nn.Module._forward_hooks",
        "torch.nn.Module._forward_pre_hooks",
        "torch.nn.Module._forward_pre_hooks_with_kwargs",
        why="hooks that other libraries leave on modules are removed",
        breaks="slow backward passes; vlmdpo compare after a refused batch",
    ),
    *patched(
        "training/simulate",
        "torch.nn.Module.to(self, args, kwargs)",
        why="modules stay where they are while a step is simulated, with fake tensors",
        breaks="vlmdpo estimate-memory",
    ),
    *overridden(
        "engine/tree_attention",
        "torch.Tensor.__torch_dispatch__",
        why="a mask of a tree has no numbers, and an operation on it is an error",
        breaks="such an operation would compute with garbage",
    ),
    *patched(
        "memory/cuda_autocast",
        "torch.nn.functional.layer_norm(input, normalized_shape, weight, bias, eps)",
        "torch.nn.functional.rms_norm(input, normalized_shape, weight, eps)",
        "torch.nn.functional.group_norm(input, num_groups, weight, bias, eps)",
        "torch.nn.functional.softmax(input, dim, _stacklevel, dtype)",
        "torch.nn.functional.log_softmax(input, dim, _stacklevel, dtype)",
        why="functions that CUDA's autocast runs in float32 do so in simulations on the CPU",
        breaks="memory estimates would miss the float32 outputs of norms",
    ),
    *overridden(
        "memory/measure memory/fake_tensors",
        "torch.utils._python_dispatch.TorchDispatchMode.__torch_dispatch__"
        "(self, func, types, args, kwargs)",
        why="every operation is seen, so that the bytes of its results are counted",
        breaks="memory measurements without CUDA, and vlmdpo estimate-memory",
    ),
    *overridden(
        "memory/fake_tensors",
        "torch.utils._python_dispatch.TorchDispatchMode._should_skip_dynamo()",
        why="nothing is compiled there, and PyTorch's guard against it costs a third of the time",
        breaks="memory estimates would take longer",
        since="2.13",
    ),
    *classes(
        "memory/fake_tensors",
        "torch._subclasses.fake_tensor.FakeTensor",
        "torch._subclasses.fake_tensor.FakeTensorMode",
        "torch.ops.aten._local_scalar_dense",
        "torch.ops.aten._index_put_impl_",
        why="a simulated step has shapes and lifetimes, but no floating-point numbers",
        breaks="vlmdpo estimate-memory",
    ),
    *classes(
        "memory/fake_tensors",
        "torch.ops.aten._grouped_mm",
        why="its rule for tensors without numbers knows bfloat16 only",
        breaks="estimates of mixtures of experts in float32",
        since="2.9",
    ),
    *called(
        "engine/forward memory/measure",
        "torch.utils._pytree.tree_leaves(tree)",
        why="finds the tensors in whatever an operation or a vision tower returns",
        breaks="memory measurements and --feature-cache",
    ),
    *called(
        "engine/tree_attention",
        "torch.utils._python_dispatch._disable_current_modes()",
        why="a causal mask that is only a name is made outside of modes that count operations",
        breaks="flash attention over trees under such a mode",
    ),
    *attributes(
        "memory/measure engine/tree_attention",
        "torch.UntypedStorage._cdata",
        "torch.Tensor._make_wrapper_subclass",
        why="storages are told apart by address; a mask of a tree is a tensor without storage",
        breaks="memory measurements; the shared engine",
    ),
    *attributes(
        "training/auto_batch",
        "torch.nn.parallel.DistributedDataParallel.broadcast_buffers",
        why="switched off, so that no process waits for one that ran out of memory",
        breaks="--auto-batch-size with several processes",
    ),
    *messages(
        "memory/fake_tensors",
        "torch._subclasses.fake_tensor:failed while attempting to run meta",
        why="its logger is silenced, because a step that cannot be simulated is not a bug of ours",
        breaks="estimate-memory would print a traceback before it tries the next engine",
    ),
    *messages(
        "commands/train",
        "torch.utils.data.dataloader:DataLoader worker",
        why="a worker that was killed is recognized by these words",
        breaks="a clear message for it",
    ),
    *attributes(
        "data/hub",
        "datasets.Dataset._fingerprint",
        why="tells whether a dataset on the Hub is the one that was prepared before",
        breaks="vlmdpo prepare would find nothing prepared",
    ),
    *environment(
        "distributed/launch distributed/processes",
        "torch.distributed.elastic.agent.server.local_elastic_agent:RANK",
        "torch.distributed.elastic.agent.server.local_elastic_agent:LOCAL_RANK",
        "torch.distributed.elastic.agent.server.local_elastic_agent:WORLD_SIZE",
        why="how the launcher numbers its processes, read before torch is imported",
        breaks="every process would take itself for the only one",
    ),
    *environment(
        "models/devices",
        "torch.distributed.elastic.agent.server.local_elastic_agent:LOCAL_RANK",
        why="each process takes a GPU of its own, before accelerate has assigned one",
        breaks="every process would load its model onto the first GPU",
    ),
    *environment(
        "training/arguments",
        "torch.distributed.elastic.agent.server.local_elastic_agent:RANK",
        "torch.distributed.elastic.agent.server.local_elastic_agent:LOCAL_WORLD_SIZE",
        why="the processes of a machine share its cores, and one of them speaks",
        breaks="each process would start as many data loader workers as one alone",
    ),
    *attributes(
        "training/arguments",
        "transformers.TrainingArguments._n_gpu",
        why="one process trains on one GPU, however many it sees",
        breaks="TRL would refuse to train where more than one GPU is visible",
    ),
    *environment(
        "training/arguments",
        "accelerate.utils.launch:ACCELERATE_DYNAMO_BACKEND",
        why="how the launcher tells its processes to compile the model",
        breaks="packed rows would be compiled anew for each batch instead of an error",
    ),
    *environment(
        "cli",
        "datasets.config:HF_DATASETS_DISABLE_PROGRESS_BARS",
        "transformers.pipelines.base:TOKENIZERS_PARALLELISM",
        why="set before the libraries are imported: their bars and warnings would mix with ours",
        breaks="output would be interleaved with theirs",
    ),
    *environment(
        "web/app",
        "gradio.analytics:GRADIO_ANALYTICS_ENABLED",
        why="set before gradio is imported, which would otherwise report its use",
        breaks="vlmdpo compare would report its use to gradio's makers",
    ),
)
